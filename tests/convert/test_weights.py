"""Weights brought onto a mesh, from a folder and from a checkpoint; a run that begins with them and hands them back."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import ParallelConfig
from maxlm.convert import model_config, tiles
from maxlm.convert.engine import family_model, from_hf, to_hf
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import open_folder
from maxlm.convert.stored import CARRIED
from maxlm.convert.weights import open_weights
from maxlm.infer.pretrained import PretrainedText
from maxlm.model.family import family_of
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import named_sharding
from maxlm.train.run import train
from tests.convert.folders import CONFIG, write_folder
from tests.infer.test_load import tokenizer_json
from tests.runs import Runs
from tests.tables import to_ours
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


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "pipeline": 3}], ids=["tensor", "pipeline"])
@pytest.mark.parametrize("source", ["hf", "ours"])
def test_weights_come_onto_the_mesh_in_float32(place, source, mesh, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 3000)
    model = model_config(place / source)
    devices = jax.devices()[: math.prod(mesh.values())]
    wanted = shardings(model, make_mesh(ParallelConfig(data=1, **mesh), devices))
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
    """With a longer vocabulary: some of the new rows are tokens of the run's tokenizer, and the rest are padding."""
    few = tmp_path / "hf"
    write_folder(few, config=HF | {"vocab_size": 250})
    (few / "tokenizer.json").write_text(tokenizer_json())  # of other tokens than the run's
    config = tiny_config(
        write_corpus(tmp_path / "corpus"),
        model=dataclasses.replace(model_config(few), vocab_size=264),
        train__init_from=str(few),
        train__steps=3,
        parallel__fsdp=2,
        optim__peak_lr=0.0,  # the weights stay what they are
        optim__weight_decay=0.0,
        checkpoint__every_steps=2,
    )
    assert train(config, tmp_path / "run", log=quiet) == 0
    to_hf(tmp_path / "run", tmp_path / "back", dtype="bfloat16", log=quiet)
    given, back = open_folder(few).tensors, open_folder(tmp_path / "back").tensors
    assert given.keys() == back.keys()
    for name, tensor in given.items():
        rows = back[name].read(slice(None))
        assert rows.shape[0] == (257 if tensor.info.shape[0] == 250 else tensor.info.shape[0]), name
        assert tensor.read(slice(None)).tobytes() == rows[: tensor.info.shape[0]].tobytes(), name
    content = json.loads((tmp_path / "back/config.json").read_text())
    assert content == HF | {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": None} | {
        name: value for name, value in content.items() if name not in HF
    }
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == {}
    assert PretrainedText(tmp_path / "back").encode("a\n") == [256, *b"a\n"]
    # The run's own checkpoint is a beginning, too.
    model = model_config(tmp_path / "run")
    wanted = shardings(model, make_mesh(ParallelConfig(data=8)))
    found = tree.paths(open_weights(tmp_path / "run", model, log=quiet)(wanted))
    for path, value in expected_params(few).items():
        region = tuple(slice(size) for size in value.shape)
        np.testing.assert_array_equal(jax.device_get(found[path])[region], value.astype(np.float32))
    # As if it had been trained from nothing: what is written says all that `transformers` needs.
    shutil.rmtree(tmp_path / "run" / CARRIED)
    lines = []
    to_hf(tmp_path / "run", tmp_path / "alone", family="llama", log=lines.append)
    assert not any("no tokenizer" in line for line in lines)
    transformers = pytest.importorskip(
        "transformers", reason="NOT tested with transformers: pip install -e '.[parity]'"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "alone")
    assert tokenizer("Grüße\n")["input_ids"] == [256, *"Grüße\n".encode()]
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "alone", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert peer.config.bos_token_id == 256 and peer.config.eos_token_id is None


@pytest.mark.slow
@pytest.mark.parametrize("source", ["hf", "ours"])
def test_processes_with_a_pipeline_begin_with_them(tmp_path, source):
    """Two processes of two devices: stages are on different ones, and so are the shards of each matrix."""
    write_folder(tmp_path / "hf", config=HF | {"num_hidden_layers": 2})
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    runs = Runs(
        tmp_path,
        steps=3,
        model=model_config(tmp_path / "hf"),
        train__init_from=str(tmp_path / source),
        train__accumulation=2,
        parallel=ParallelConfig(data=1, fsdp=2, pipeline=2),
        optim__peak_lr=0.0,
        optim__weight_decay=0.0,
    )
    processes = runs.start_together("run", processes=2, devices=2)
    assert [process.wait(timeout=600) for process in processes] == [0, 0], runs.log("run")
    to_hf(tmp_path / "run", tmp_path / "back", dtype="bfloat16", log=quiet)
    given, back = open_folder(tmp_path / "hf").tensors, open_folder(tmp_path / "back").tensors
    assert given.keys() == back.keys()
    for name, tensor in given.items():
        assert tensor.read(slice(None)).tobytes() == back[name].read(slice(None)).tobytes(), name
