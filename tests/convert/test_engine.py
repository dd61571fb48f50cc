"""Folders to checkpoints and back: every bit, every file, bounded memory, and nothing left behind after an error."""

import filecmp
import json
import math
import re
import shutil
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from maxlm import tree
from maxlm.checkpoint import blocks
from maxlm.checkpoint.reader import CheckpointError, CheckpointReader
from maxlm.config import ParallelConfig
from maxlm.convert import model_config, tiles
from maxlm.convert.engine import family_model, from_hf, to_hf
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import open_folder
from maxlm.convert.safetensors import INDEX, TensorInfo, read_header
from maxlm.errors import UserError
from maxlm.model.family import FamilyError, families, family_of
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import named_sharding
from tests.convert.folders import CONFIG, hf_content, tensor_infos, write_folder
from tests.tables import to_ours


def quiet(_line):
    pass


def read_all(path):
    return {name: np.array(tensor.read(slice(None))) for name, tensor in open_folder(path).tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture(params=[None, 600], ids=["whole", "cut"])
def small_tiles(request, monkeypatch):
    """Tiles of the usual size, or so small that every matrix is cut."""
    if request.param:
        monkeypatch.setattr(tiles, "TILE_BYTES", request.param)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_there_and_back_is_bit_equal(tmp_path, small_tiles, dtype):
    tensors = write_folder(tmp_path / "hf", dtype=dtype, shard_bytes=10_000)
    lines = []
    from_hf(tmp_path / "hf", tmp_path / "ours", log=lines.append)
    to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=20_000, log=lines.append)
    assert_same(read_all(tmp_path / "back"), tensors)
    assert len(json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]) == len(tensors)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    expected = CONFIG | {"torch_dtype": np.dtype(dtype).name}
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == expected
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "hf" / name).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "ours"]


def test_pieces_of_the_largest_models_are_small():
    """Matrices of attention and those that hold several of ours, too; what stays whole is a single expert."""
    for family in families().values():
        model = max(family.presets.values(), key=lambda model: model.num_layers * model.embed_dim)
        for row in family_model(family, model).rows:
            for path, cell in tiles.chunks(row).items():
                assert 4 * math.prod(cell) <= 2 * tiles.TILE_BYTES, (family.name, path, cell)


def test_dtypes_may_be_mixed_and_chosen(tmp_path):
    infos = tensor_infos()
    for name in infos:
        if "norm" in name:
            infos[name] = TensorInfo(infos[name].shape, np.dtype(np.float32))
    tensors = write_folder(tmp_path / "hf", infos=infos)
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    to_hf(tmp_path / "ours", tmp_path / "back", log=quiet)
    assert_same(read_all(tmp_path / "back"), tensors)
    from_hf(tmp_path / "hf", tmp_path / "wide", dtype="float32", log=quiet)
    to_hf(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16", log=quiet)
    assert_same(read_all(tmp_path / "narrow"), {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})


@pytest.mark.parametrize(
    ("name", "precise"), [("ernie4_5_moe", ("bias", "mlp.gate.weight")), ("deepseek_v3", ("bias",))]
)
def test_biases_of_the_choice_of_experts_are_not_rounded(tmp_path, name, precise):
    """Training moves them by a thousandth, of which bfloat16 has none at 0.7; `transformers` keeps them in float32."""
    config = hf_content(name)
    tensors = write_folder(tmp_path / "hf", config=config, dtype=np.float32)
    from_hf(tmp_path / "hf", tmp_path / "wide", log=quiet)
    to_hf(tmp_path / "wide", tmp_path / "there", dtype="bfloat16", log=quiet)
    from_hf(tmp_path / "hf", tmp_path / "narrow", dtype="bfloat16", log=quiet)
    to_hf(tmp_path / "narrow", tmp_path / "back", log=quiet)
    to_hf(tmp_path / "narrow", tmp_path / "again", dtype="float32", log=quiet)
    for folder in ("there", "back"):
        found = read_all(tmp_path / folder)
        assert any(key.endswith(precise) for key in found)
        for key, value in tensors.items():
            kept = value if key.endswith(precise) else value.astype(ml_dtypes.bfloat16)
            assert found[key].dtype == kept.dtype and found[key].tobytes() == kept.tobytes(), key
    assert {value.dtype for value in read_all(tmp_path / "again").values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_told_of_pytorch_files_writes_their_weights(tmp_path, shards):
    torch = pytest.importorskip("torch", reason="NOT tested with torch: pip install maxlm[parity]")
    tensors = write_folder(tmp_path / "hf", dtype=np.float32)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({"lr": 1}, tmp_path / "hf" / "training_args.bin")
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        some = list(tensors)[i::shards]
        torch.save({key: torch.tensor(tensors[key]).t().contiguous().t() for key in some}, tmp_path / "hf" / name)
    with pytest.raises(ConversionError) as raised:
        open_folder(tmp_path / "hf")
    exec(str(raised.value).split("<<'END'\n")[1].removesuffix("END"), {})  # as a shell would hand it to Python
    assert_same(read_all(tmp_path / "hf"), tensors)


def test_a_checkpoint_goes_onto_any_mesh_and_proves_itself(tmp_path, small_tiles):
    tensors = write_folder(tmp_path / "hf", dtype=np.float32, config=CONFIG | {"vocab_size": 84})
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    family = family_of(CONFIG)
    described = family_model(family, model_config(tmp_path / "ours"))
    expected = tree.paths(to_ours(described.rows, tensors))
    reader = CheckpointReader(tmp_path / "ours" / "checkpoints")
    mesh = make_mesh(ParallelConfig(data=1, fsdp=4, tensor=2))
    abstract = {
        path: jax.ShapeDtypeStruct(spec.shape, np.float32, sharding=named_sharding(mesh, spec.logical))
        for path, spec in described.specs.items()
    }
    restored = reader.restore_params(tree.from_paths(abstract))
    for path, value in tree.paths(restored.state).items():
        assert value.sharding == abstract[path].sharding
        np.testing.assert_array_equal(np.asarray(value), expected[path], err_msg=path)
    # One flipped bit, and neither reader takes it.
    file = max((tmp_path / "ours").rglob("c/*/*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="digests"):
        reader.restore_params(tree.from_paths(abstract))
    with pytest.raises(CheckpointError, match="digests"):
        to_hf(tmp_path / "ours", tmp_path / "back", log=quiet)
    assert not (tmp_path / "back").exists()


def test_padding_of_the_vocabulary_is_recorded_and_removed(tmp_path, small_tiles):
    tensors = write_folder(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours", pad_vocab=16, log=quiet)
    assert model_config(tmp_path / "hf").vocab_size == 83
    assert model_config(tmp_path / "ours").vocab_size == 96
    record = CheckpointReader(tmp_path / "ours" / "checkpoints").record(0)
    assert record.arrays["params/embedding/table"].shape == (96, 24)
    assert record.arrays["params/head/kernel"].shape == (24, 96)
    to_hf(tmp_path / "ours", tmp_path / "back", log=quiet)
    assert_same(read_all(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 83


def test_a_tied_head_that_is_written_out_has_to_be_a_copy(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    infos = tensor_infos(config)
    infos["lm_head.weight"] = infos["model.embed_tokens.weight"]
    infos["model.layers.0.self_attn.rotary_emb.inv_freq"] = TensorInfo((4,), np.dtype(np.float32))
    write_folder(tmp_path / "hf", config=config, infos=infos)
    with pytest.raises(ConversionError, match="lm_head.weight differs from model.embed_tokens.weight"):
        from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    header = read_header(tmp_path / "hf" / "model.safetensors")
    data = bytearray((tmp_path / "hf" / "model.safetensors").read_bytes())
    head, table = header["lm_head.weight"], header["model.embed_tokens.weight"]
    data[head.offset : head.offset + head.info.nbytes] = data[table.offset : table.offset + table.info.nbytes]
    (tmp_path / "hf" / "model.safetensors").write_bytes(data)
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    to_hf(tmp_path / "ours", tmp_path / "back", log=quiet)
    assert not read_all(tmp_path / "back").keys() & {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


def _edit_tensors(path, change):
    infos = tensor_infos()
    change(infos)
    shutil.rmtree(path)
    write_folder(path, infos=infos)


def _drop_and_add(infos):
    infos["extra.weight"] = infos.pop("model.norm.weight")
    infos.pop("model.layers.2.mlp.up_proj.weight")


def _edit_config(path, **changes):
    (path / "config.json").write_text(json.dumps(CONFIG | changes))


def _truncate(path):
    file = sorted(path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])


def _only_torch(path):
    for file in [*path.glob("*.safetensors"), path / INDEX]:
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"?")


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (lambda p: (p / "model-00002-of-00004.safetensors").unlink(), ["lacks model-00002-of-00004.safetensors"]),
        (_truncate, ["model-00004-of-00004.safetensors has", "promises"]),
        (lambda p: (p / "model-00001-of-00004.safetensors").write_bytes(b"abc"), ["00001-of-00004.* truncated"]),
        (lambda p: (p / INDEX).unlink(), ["no model.safetensors.index.json"]),
        (lambda p: (p / INDEX).write_text("[]"), ["is no index"]),
        (_only_torch, ["pytorch_model.bin", "weights_only=True"]),
        (lambda p: (p / "config.json").unlink(), ["config.json cannot be read"]),
        (lambda p: _edit_config(p, architectures=["NoSuchForCausalLM"]), ["NoSuchForCausalLM", "LlamaForCausalLM"]),
        (lambda p: _edit_config(p, hidden_act="gelu"), ['hidden_act is "gelu"']),
        (lambda p: _edit_config(p, quantization_config={"quant_method": "gptq"}), ["quantised by 'gptq'"]),
        (
            lambda p: _edit_tensors(p, _drop_and_add),
            [
                r"model.norm.weight \[24\] is missing",
                r"layers.2.mlp.up_proj.weight \[40, 24\] is missing",
                r"extra.weight \[24\] is unexpected",
            ],
        ),
        (
            lambda p: _edit_config(p, intermediate_size=48),
            [rf"layers.{i}.mlp.{name}_proj.weight is \[" for i in range(3) for name in ("gate", "up", "down")],
        ),
    ],
)
def test_one_error_names_what_is_wrong_and_nothing_is_left(tmp_path, damage, messages):
    write_folder(tmp_path / "hf", shard_bytes=12_000)
    damage(tmp_path / "hf")
    with pytest.raises(UserError) as raised:
        from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    for message in messages:
        raised.match(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_what_is_in_the_way_is_not_overwritten_and_what_was_interrupted_is_removed(tmp_path):
    write_folder(tmp_path / "hf")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "thing").write_text("mine")
    with pytest.raises(ConversionError, match="exists already"):
        from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    assert (tmp_path / "ours" / "thing").read_text() == "mine"
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "half").write_text("")
    lines = []
    from_hf(tmp_path / "hf", tmp_path / "new", log=lines.append)
    assert any("interrupted" in line for line in lines)
    assert not (tmp_path / ".new.partial").exists() and not (tmp_path / "new" / "half").exists()


def test_a_step_or_a_family_that_is_not_there(tmp_path):
    write_folder(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    with pytest.raises(ConversionError, match=r"no checkpoint of step 7, only \[0\]"):
        to_hf(tmp_path / "ours", tmp_path / "back", step=7, log=quiet)
    with pytest.raises(FamilyError, match="no family 'nothing'"):
        to_hf(tmp_path / "ours", tmp_path / "back", family="nothing", log=quiet)
    with pytest.raises(ConversionError, match="has no checkpoint"):
        to_hf(tmp_path / "elsewhere", tmp_path / "back", log=quiet)
    with pytest.raises(ConversionError, match="type `maxlm convert to-hf gs://bucket/run FOLDER`"):
        model_config("gs://bucket/run")


class _Watch(threading.Thread):
    """The most anonymous memory that this process holds while it runs, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.going = self.now(), True

    @staticmethod
    def now():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s*(\d+)", status)[1])

    def run(self):
        while self.going:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """1 GiB, with the bound that 2.5 GiB are for 8; a tenth of it goes first, for what is made once."""
    # The tests' quick compilation would make hashing five times as slow as it is.
    options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    hashed = jax.jit(blocks._digest.__wrapped__, static_argnames="shape", compiler_options=options)
    monkeypatch.setattr(blocks, "_digest", hashed)
    sizes = {"vocab_size": 8000, "hidden_size": 2048, "intermediate_size": 4096, "head_dim": 512}
    for name, layers in (("first", 1), ("whole", 13)):
        write_folder(tmp_path / name, config=CONFIG | sizes | {"num_hidden_layers": layers}, constant=True)
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    assert 0.9 < size / 2**30 < 1.1
    before, watch = 0, None
    for name in ("first", "whole"):
        if name == "whole":
            watch = _Watch()
            before = watch.now()
            watch.start()
        from_hf(tmp_path / name, tmp_path / "ours", log=quiet)
        to_hf(tmp_path / "ours", tmp_path / f"{name} back", log=quiet)
        shutil.rmtree(tmp_path / "ours")
    watch.going = False
    watch.join()
    assert filecmp.cmp(tmp_path / "whole" / "model.safetensors", tmp_path / "whole back" / "model.safetensors", False)
    assert watch.peak - before < size * 2.5 / 8
