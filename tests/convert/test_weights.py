"""Weights brought onto a mesh, from a folder and from a checkpoint; a run that begins with them and hands them back."""

import dataclasses

import jax
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import ParallelConfig
from maxlm.convert import model_config, tiles
from maxlm.convert.engine import family_model, from_hf, to_hf
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import open_folder
from maxlm.convert.weights import open_weights
from maxlm.model.family import family_of
from maxlm.model.table import to_ours
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import named_sharding
from maxlm.train.loop import train
from tests.convert.folders import CONFIG, write_folder
from tests.tiny import tiny_config, write_corpus

HF = CONFIG | {"vocab_size": 264}


def quiet(_line):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`hf`, a folder in bfloat16, and `ours`, converted from it."""
    path = tmp_path_factory.mktemp("weights")
    write_folder(path / "hf", config=HF)
    from_hf(path / "hf", path / "ours", log=quiet)
    return path


def expected_params(path):
    tensors = {name: np.asarray(t.read(slice(None))) for name, t in open_folder(path).tensors.items()}
    return tree.paths(to_ours(family_model(family_of(HF), model_config(path)).rows, tensors))


def shardings(model, mesh):
    specs = family_model(family_of(HF), model).specs
    return tree.from_paths({path: named_sharding(mesh, spec.logical) for path, spec in specs.items()})


@pytest.mark.parametrize("source", ["hf", "ours"])
def test_weights_come_onto_the_mesh_in_float32(place, source, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 3000)
    model = model_config(place / source)
    wanted = shardings(model, make_mesh(ParallelConfig(data=1, fsdp=4, tensor=2)))
    found = tree.paths(open_weights(place / source, model, log=quiet)(wanted))
    for path, value in expected_params(place / "hf").items():
        assert found[path].dtype == np.float32
        assert found[path].sharding.is_equivalent_to(tree.paths(wanted)[path], value.ndim)
        np.testing.assert_array_equal(np.asarray(found[path]), value.astype(np.float32), err_msg=path)


def test_a_longer_vocabulary_has_rows_of_zeros(place):
    model = dataclasses.replace(model_config(place / "hf"), vocab_size=272)
    wanted = shardings(model, make_mesh(ParallelConfig(data=1, fsdp=4, tensor=2)))
    found = tree.paths(open_weights(place / "hf", model, log=quiet)(wanted))
    expected = expected_params(place / "hf")["head/kernel"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(found["head/kernel"]), np.pad(expected, ((0, 0), (0, 8))))


@pytest.mark.parametrize("source", ["hf", "ours"])
def test_another_model_is_refused_by_what_differs(place, source):
    model = dataclasses.replace(model_config(place / source), num_layers=5, norm_epsilon=1e-3)
    with pytest.raises(ConversionError) as raised:
        open_weights(place / source, model, log=quiet)
    for part in ("model.num_layers is 5, there 3", "model.norm_epsilon is 0.001, there 1e-05", "model_config"):
        assert part in str(raised.value)


def test_a_run_begins_with_them_and_hands_them_back(place, tmp_path):
    config = tiny_config(
        write_corpus(tmp_path / "corpus"),
        model=model_config(place / "hf"),
        train__init_from=str(place / "hf"),
        train__steps=3,
        parallel__fsdp=2,
        optim__peak_lr=0.0,  # the weights stay what they are
        optim__weight_decay=0.0,
        checkpoint__every_steps=2,
        eval__prompts=(),
    )
    assert train(config, tmp_path / "run", log=quiet) == 0
    to_hf(tmp_path / "run", tmp_path / "back", dtype="bfloat16", log=quiet)
    given, back = open_folder(place / "hf").tensors, open_folder(tmp_path / "back").tensors
    assert given.keys() == back.keys()
    for name, tensor in given.items():
        assert tensor.read(slice(None)).tobytes() == back[name].read(slice(None)).tobytes(), name
    assert (tmp_path / "back" / "generation_config.json").exists()
    # The run's own checkpoint is a beginning, too.
    model = model_config(tmp_path / "run")
    wanted = shardings(model, make_mesh(ParallelConfig(data=8)))
    found = tree.paths(open_weights(tmp_path / "run", model, log=quiet)(wanted))
    for path, value in expected_params(place / "hf").items():
        np.testing.assert_array_equal(jax.device_get(found[path]), value.astype(np.float32))
