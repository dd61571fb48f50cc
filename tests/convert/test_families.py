"""Every family against `transformers`: the same weights give the same logits and texts, and go there and back."""

import copy
import functools
import json
import math
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maxlm.config import ModelConfig
from maxlm.convert import tiles
from maxlm.convert.engine import from_hf, open_model, to_hf
from maxlm.convert.folder import open_folder
from maxlm.convert.safetensors import ShardWriter, TensorInfo
from maxlm.infer.generate import RunnableModel, generate
from maxlm.infer.sampling import Sampling
from maxlm.model.decoder import merge, split_model
from maxlm.model.family import Family, FamilyError, family_of, hf_config
from maxlm.model.flops import count_matmul_flops, ledger
from maxlm.model.runtime import Runtime
from maxlm.model.table import bind
from tests.convert.cases import CASES, SHARED, VOCAB, peer
from tests.model.test_flops import as_computed
from tests.tables import to_ours, to_theirs

MISSING = "parity with Hugging Face NOT tested: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)
safetensors_torch = pytest.importorskip("safetensors.torch", reason=MISSING)

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other

PROMPTS = [[1, 5, 9], [1], [1, *(7 * i % VOCAB for i in range(47))]]  # the last is longer than every window
NATIVE = [name for name, case in CASES.items() if not case.foreign]
NEW = 64  # tokens that are generated


class Converted(NamedTuple):
    """The peer, and what was made of it: tensors by name (NumPy), our config, structure, bound table and parameters."""

    peer: Any
    tensors: dict[str, np.ndarray]
    family: Family
    config: ModelConfig
    graphdef: Any
    rows: Any
    params: Any


@functools.cache
def converted(name):
    model = peer(name)
    with tempfile.TemporaryDirectory() as folder:  # in memory, experts are joined
        model.save_pretrained(folder)
        tensors = safetensors_torch.load_file(f"{folder}/model.safetensors")
    hf = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if CASES[name].foreign:
        hf, pack = CASES[name].foreign
        tensors = pack(tensors)
    tensors = {key: value.numpy() for key, value in tensors.items()}
    family = family_of(hf)
    config = family.from_hf(hf)
    parts = split_model(config)
    rows = bind(family.table(config), parts.specs)
    return Converted(model, tensors, family, config, parts.graphdef, rows, to_ours(rows, tensors))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name):
    ours = converted(name)

    @jax.jit
    def forward(params, tokens, length):
        decoder = merge(ours.graphdef, params)
        positions = jnp.minimum(jnp.arange(tokens.shape[1]), length - 1)[None]
        out = decoder.hidden(tokens, positions_BS=positions, segments_BS=None, runtime=Runtime())
        return decoder.logits(out.hidden_BSD)

    for prompt in PROMPTS:
        with torch.no_grad():
            expected = ours.peer(torch.tensor([prompt])).logits.numpy()
        row = np.zeros((1, 48), np.int32)  # one program for all prompts: what follows a prompt does not reach it
        row[0, : len(prompt)] = prompt
        got = np.asarray(forward(ours.params, row, len(prompt)))[:, : len(prompt)]
        assert np.abs(expected).max() > 1  # so that the tolerance has a meaning
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


# The frequencies of `dynamic` change with every token there, and here by how long a row may become.
@pytest.mark.parametrize("name", [name for name in CASES if name != "internlm2"])
def test_greedy_texts_equal_those_of_transformers(name):
    ours = converted(name)
    prompts = PROMPTS[::2]
    if ours.config.rope.scaling == "longrope":
        # The peer turns a row anew when it outgrows the original length; we go by how long it may become.
        prompts = [prompt for prompt in prompts if len(prompt) > ours.config.rope.original_length]
        assert prompts
    model = RunnableModel(ours.config, ours.graphdef, jax.tree.map(jnp.asarray, ours.params), Runtime())
    got = generate(model, prompts, max_new_tokens=NEW, sampling=Sampling(temperature=0.0), key=jax.random.key(0))
    ours.peer.generation_config.eos_token_id = None
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for prompt, row in zip(prompts, got, strict=True):
        given = torch.tensor([prompt])
        whole = ours.peer.generate(given, settings, attention_mask=torch.ones_like(given))[0].tolist()
        if (expected := whole[len(prompt) :]) == row:
            continue
        at = next(i for i in range(NEW) if row[i] != expected[i])
        with torch.no_grad():
            best = ours.peer(torch.tensor([whole[: len(prompt) + at]])).logits[0, -1].topk(2).values
        assert best[0] - best[1] < 1e-4, f"prompt of {len(prompt)}: token {at} is {row[at]}, not {expected[at]}"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bit_equal(name, dtype):
    ours = converted(name)
    tensors = {key: value.astype(dtype) for key, value in ours.tensors.items()}
    back = to_theirs(ours.rows, to_ours(ours.rows, tensors))
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == dtype and back[key].shape == value.shape
        assert back[key].tobytes() == value.tobytes(), key


def test_the_files_of_gpt2_as_published_are_read(tmp_path):
    """They leave out the name of the outer module, and hold the causal masks."""
    ours = converted("gpt2")
    ours.peer.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    tensors = {key.removeprefix("transformer."): value for key, value in safetensors_torch.load_file(file).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128) for layer in range(3)}
    safetensors_torch.save_file(tensors | masks, file, {"format": "pt"})
    from_hf(tmp_path / "hf", tmp_path / "ours", log=lambda _: None)
    to_hf(tmp_path / "ours", tmp_path / "back", log=lambda _: None)
    back = open_folder(tmp_path / "back").tensors
    assert back.keys() == {f"transformer.{name}" for name in tensors}
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[f"transformer.{key}"].read(slice(None)), value.numpy())


def test_the_text_half_of_a_model_that_sees_is_read_and_written_by_itself(tmp_path):
    """Gemma 3 as it is published from 4B on, with what its config.json leaves out, under either kind of names."""
    text = {key: value for key, value in (SHARED | CASES["gemma3"].settings).items() if "num_" not in key}
    text |= {"num_hidden_layers": 3, "head_dim": 4}
    sight = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval().float()
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if "language_model" in name:
                weight.normal_(0, 1 / math.sqrt(weight.shape[-1])) if weight.ndim > 1 else weight.normal_(0, 0.1)
    whole.save_pretrained(tmp_path / "hf")
    file, lines = tmp_path / "hf/config.json", []
    content = json.loads(file.read_text())
    for word in ("num_attention_heads", "num_key_value_heads"):  # 8 and 4, as the 4B model has them
        del content["text_config"][word]
    file.write_text(json.dumps(content))
    from_hf(tmp_path / "hf", tmp_path / "ours", log=lines.append)
    assert any("left out are the tensors of multi_modal_projector (2), vision_tower (" in line for line in lines)
    to_hf(tmp_path / "ours", tmp_path / "back", log=lines.append)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager", dtype="float32"
    )
    assert type(back).__name__ == "Gemma3ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    folder, described = open_model(tmp_path / "hf")
    tensors = {name: np.array(tensor.read(slice(None))) for name, tensor in folder.tensors.items()}
    params = to_ours(described.rows, {name: tensors[name] for row in described.rows for name, _ in row.tensors()})
    decoder = merge(split_model(described.model).graphdef, params)
    prompt = PROMPTS[-1]
    with torch.no_grad():
        expected, got = (m(torch.tensor([prompt])).logits.numpy() for m in (whole, back))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)

    @jax.jit
    def forward(decoder, tokens):
        positions = jnp.arange(tokens.shape[1])[None]
        out = decoder.hidden(tokens, positions_BS=positions, segments_BS=None, runtime=Runtime())
        return decoder.logits(out.hidden_BSD)

    np.testing.assert_allclose(np.asarray(forward(decoder, jnp.asarray([prompt]))), expected, atol=1e-4, rtol=0)
    # The other kind of names, which depends on who wrote the file, gives the same tensors.
    saved = safetensors_torch.load_file(tmp_path / "hf/model.safetensors")
    kinds = ("language_model.model.", "model.language_model.")
    was = next(kind for kind in kinds if any(name.startswith(kind) for name in saved))
    became = kinds[1 - kinds.index(was)]
    renamed = {name.replace(was, became, 1) if name.startswith(was) else name: x for name, x in saved.items()}
    renamed = {
        f"model.{name}" if became == kinds[1] and name.startswith(("vision_tower", "multi_modal")) else name: x
        for name, x in renamed.items()
    }
    safetensors_torch.save_file(renamed, tmp_path / "hf/model.safetensors", {"format": "pt"})
    other, _ = open_model(tmp_path / "hf")
    assert len(other.left_out) == len(folder.left_out) and other.tensors.keys() == tensors.keys()
    for name, tensor in other.tensors.items():
        np.testing.assert_array_equal(tensor.read(slice(None)), tensors[name])
    file.write_text(json.dumps({"architectures": ["Gemma3ForConditionalGeneration"]}))
    with pytest.raises(FamilyError, match="Gemma3ForConditionalGeneration has no 'text_config'"):
        open_model(tmp_path / "hf")


@pytest.mark.parametrize("name", NATIVE)
def test_files_go_there_and_back_bit_for_bit(name, tmp_path):
    """What `save_pretrained` writes, through a checkpoint of ours, in bfloat16."""
    copy.deepcopy(converted(name).peer).bfloat16().save_pretrained(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours", log=lambda _: None)
    to_hf(tmp_path / "ours", tmp_path / "back", log=lambda _: None)
    given, back = (open_folder(tmp_path / path).tensors for path in ("hf", "back"))
    assert given.keys() == back.keys()
    for key, tensor in given.items():
        assert tensor.info == back[key].info
        assert tensor.read(slice(None)).tobytes() == back[key].read(slice(None)).tobytes(), key
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "hf/config.json").read_text()
    )


@pytest.mark.parametrize("name", ["internlm2", "chatglm3", "baichuan2", "phi3", "gpt_oss"])
def test_fused_tensors_go_there_and_back_in_small_tiles(name, tmp_path, monkeypatch):
    """Those of families that `transformers` does not have among them; tiles so small that what can be cut is cut."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 600)
    ours = converted(name)
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in ours.tensors.items()}
    (tmp_path / "hf").mkdir()
    content = CASES[name].foreign[0] if CASES[name].foreign else hf_config(ours.family, ours.config)
    (tmp_path / "hf/config.json").write_text(json.dumps(content))
    infos = {key: TensorInfo(value.shape, value.dtype) for key, value in tensors.items()}
    with ShardWriter(tmp_path / "hf", infos, shard_bytes=20_000) as writer:
        for key, value in tensors.items():
            writer.write(key, value)
    from_hf(tmp_path / "hf", tmp_path / "ours", log=lambda _: None)
    to_hf(tmp_path / "ours", tmp_path / "back", log=lambda _: None)
    back = open_folder(tmp_path / "back").tensors
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert (back[key].info.shape, back[key].info.dtype) == (value.shape, value.dtype)
        assert back[key].read(slice(None)).tobytes() == value.tobytes(), key
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written == content | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("name", NATIVE)
def test_transformers_loads_what_we_write(name, tmp_path):
    """With no key missing or left over, to the same logits: the config says all that the weights do not."""
    ours = converted(name)
    ids = {name: SHARED[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}  # carried along, otherwise
    (tmp_path / "config.json").write_text(json.dumps(hf_config(ours.family, ours.config) | ids))
    written = to_theirs(ours.rows, ours.params)
    infos = {key: TensorInfo(value.shape, value.dtype) for key, value in written.items()}
    with ShardWriter(tmp_path, infos, shard_bytes=20_000) as writer:
        for key, value in written.items():
            writer.write(key, value)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", experts_implementation="eager", dtype="float32"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    loaded, weights = model.state_dict(), ours.peer.state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)
    for prompt in PROMPTS:
        with torch.no_grad():
            got, expected = (m(torch.tensor([prompt])).logits.numpy() for m in (model, ours.peer))
        # Equal weights at other addresses: on some processors PyTorch then adds up in another order.
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_config_goes_there_and_back(name):
    ours = converted(name)
    written = json.loads(json.dumps(hf_config(ours.family, ours.config)))
    assert family_of(written) is ours.family
    assert ours.family.from_hf(written) == ours.config


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_counts_the_products_of_the_traced_program(name):
    ours, length = converted(name), 16

    def forward(params, tokens):
        decoder = merge(ours.graphdef, params)
        positions = jnp.arange(length)[None]
        out = decoder.hidden(tokens, positions_BS=positions, segments_BS=None, runtime=Runtime())
        return decoder.logits(out.hidden_BSD)

    traced = count_matmul_flops(jax.make_jaxpr(forward)(ours.params, jnp.zeros((1, length), jnp.int32)))
    counts = ledger(ours.config, sequence_length=length)
    assert traced == pytest.approx(length * as_computed(ours.config, length), rel=1e-3)
    # The other column: what causality and windows leave of the scores, counted pair by pair.
    attention, back = ours.config.attention, np.arange(length)[:, None] - np.arange(length)
    cycle = [attention.windows[i % len(attention.windows)] for i in range(ours.config.num_layers)]
    pairs = sum(np.count_nonzero((back >= 0) & (back < (window or length))) for window in cycle)
    scores = 2 * attention.q_heads * (attention.head_dim + attention.value_dim)
    everything = scores * length * ours.config.num_layers
    assert counts.causal_exact == pytest.approx(3 * (traced / length - everything + scores * pairs / length), rel=1e-9)
