"""Weights brought onto a mesh, from a folder and from a checkpoint; a run that begins with them and hands them back."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import ParallelConfig
from maxlm.convert import model_config, tiles, weights
from maxlm.convert.engine import family_model, from_hf, open_model, to_hf
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import open_folder
from maxlm.convert.safetensors import TensorInfo
from maxlm.convert.stored import CARRIED
from maxlm.convert.weights import open_weights
from maxlm.infer.load import load_model
from maxlm.infer.pretrained import PretrainedText
from maxlm.model.decoder import merge, split_model
from maxlm.model.family import family_of
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import named_sharding
from maxlm.train.run import train
from tests.convert.folders import CONFIG, hf_content, tensor_infos, write_folder
from tests.infer.test_load import tokenizer_json
from tests.runs import Runs
from tests.tables import to_ours
from tests.tiny import tiny_config, write_corpus

HF = CONFIG | {"vocab_size": 264}
PHI3 = HF | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_hidden_layers": 2}
"""Of which one tensor holds queries, keys and values, and another gate and hidden dims."""


def quiet(_line):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`hf`, a folder in bfloat16, and `ours`, converted from it; `fused`, one with tensors of several arrays."""
    path = tmp_path_factory.mktemp("weights")
    write_folder(path / "hf", config=HF)
    write_folder(path / "fused", config=PHI3)
    from_hf(path / "hf", path / "ours", log=quiet)
    return path


def expected_params(path, hf=HF):
    tensors = {name: np.asarray(t.read(slice(None))) for name, t in open_folder(path).tensors.items()}
    return tree.paths(to_ours(family_model(family_of(hf), model_config(path)).rows, tensors))


def shardings(model, mesh, hf=HF):
    specs = family_model(family_of(hf), model).specs
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


def test_each_tile_is_read_once_for_all_devices(place, monkeypatch):
    """And a tensor that holds several of our arrays once for all of them."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 3000)
    read = []

    def counted(path, **kwargs):
        folder, described = open_model(path, **kwargs)

        def counting(name, tensor):
            return tensor._replace(read=lambda rows: (read.append((name, rows.start, rows.stop)), tensor.read(rows))[1])

        return folder._replace(tensors={k: counting(k, t) for k, t in folder.tensors.items()}), described

    monkeypatch.setattr(weights, "open_model", counted)
    model = model_config(place / "fused")
    wanted = shardings(model, make_mesh(ParallelConfig(data=1, fsdp=4, tensor=2)), PHI3)
    found = tree.paths(open_weights(place / "fused", model, log=quiet)(wanted))
    assert len(read) == len(set(read)) > 30
    for path, value in expected_params(place / "fused", PHI3).items():
        np.testing.assert_array_equal(np.asarray(found[path]), value.astype(np.float32), err_msg=path)


def precise_infos(config):
    """A folder's tensors: matrices and tables in bfloat16, and in float32 what is computed with in float32."""
    family = family_of(config)
    described = family_model(family, family.from_hf(config))
    infos = tensor_infos(config)
    for row in described.rows:
        spec = described.specs[row.row.pieces[0].ours]
        if spec.role == "vector" or "router" in spec.logical:
            infos |= {name: TensorInfo(infos[name].shape, np.dtype(np.float32)) for name, _ in row.tensors()}
    return infos


@pytest.mark.parametrize("name", ["gemma", "baichuan", "ernie4_5_moe"])
def test_what_generation_holds_in_the_compute_dtype_changes_no_logit(tmp_path, name):
    """A scaled table, a head that is normed, and routers with biases: what has to stay float32 is not a bfloat16."""
    config = hf_content(name)
    write_folder(tmp_path / "hf", config=config, infos=precise_infos(config))
    model = load_model(tmp_path / "hf", dtype="bfloat16", log=quiet, devices=jax.devices()[:1])
    wide = load_model(tmp_path / "hf", dtype="float32", log=quiet, devices=jax.devices()[:1]).params
    specs = tree.paths(split_model(model.config).specs)
    for path, value in tree.paths(model.params).items():
        narrow = specs[path].role != "vector" and "router" not in path
        assert value.dtype == (jnp.bfloat16 if narrow else jnp.float32), path
        np.testing.assert_array_equal(np.asarray(value, np.float32), tree.paths(wide)[path], err_msg=path)

    @jax.jit
    def logits(params):
        decoder, tokens = merge(model.graphdef, params), jnp.asarray([[1, 5, 9, 70, 2, 5, 8, 11]])
        places = jnp.arange(8)[None]
        out = decoder.hidden(tokens, positions_BS=places, segments_BS=None, runtime=model.runtime)
        return decoder.logits(out.hidden_BSD)

    expected = np.asarray(logits(wide))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_array_equal(np.asarray(logits(model.params)), expected)


def test_a_table_that_is_scaled_is_not_rounded_before(tmp_path):
    write_folder(tmp_path / "hf", config=hf_content("gemma"), dtype=np.float32)
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    for source in ("hf", "ours"):
        params = load_model(tmp_path / source, dtype="bfloat16", log=quiet, devices=jax.devices()[:1]).params
        assert params["embedding"]["table"].dtype == jnp.float32
        assert params["layers"]["mlp"]["up"].dtype == jnp.bfloat16


def test_a_run_may_leave_out_the_layers_that_predict_further_tokens(tmp_path):
    write_folder(tmp_path / "hf", config=hf_content("deepseek_v3"), dtype=np.float32)
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    found = {}
    for source in ("hf", "ours"):
        whole = model_config(tmp_path / source)
        assert whole.mtp_layers == 1
        for model in (whole, dataclasses.replace(whole, mtp_layers=0)):
            lines, mesh = [], make_mesh(ParallelConfig(data=1, fsdp=2), jax.devices()[:2])
            specs = tree.paths(split_model(model).specs)
            wanted = tree.from_paths({path: named_sharding(mesh, spec.logical) for path, spec in specs.items()})
            params = tree.paths(open_weights(tmp_path / source, model, log=lines.append)(wanted))
            found[source, model.mtp_layers] = params
            assert any("left out" in line and "model.mtp_layers=0" in line for line in lines) == (not model.mtp_layers)
    whole, without = found["hf", 1], found["ours", 0]
    assert set(whole) - set(without) == {path for path in whole if path.startswith("mtp/")} != set()
    for path, value in whole.items():
        for other in found.values():
            if path in other:
                np.testing.assert_array_equal(np.asarray(other[path]), np.asarray(value), err_msg=path)
    with pytest.raises(ConversionError, match="model.mtp_layers is 2, there 1"):
        open_weights(tmp_path / "ours", dataclasses.replace(model_config(tmp_path / "ours"), mtp_layers=2), log=quiet)


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
