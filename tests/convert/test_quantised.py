"""Quantised folders against references written here, element by element."""

import json

import ml_dtypes
import numpy as np
import pytest

from maxlm.convert.engine import from_hf, to_hf
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import open_folder
from maxlm.convert.safetensors import ShardWriter, TensorInfo
from tests.convert.folders import tensor_infos

DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 83,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 83,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_theta": 1e4,
}


def write(path, tensors, quantization, config=None):
    path.mkdir()
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in tensors.items()}
    with ShardWriter(path, infos, shard_bytes=10**9) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    (path / "config.json").write_text(json.dumps((config or {}) | {"quantization_config": quantization}))


def e4m3(bits):
    """Micikevicius et al. 2022: sign, four bits of exponent biased by 7, three bits of mantissa; no infinities."""
    sign, exponent, mantissa = -1 if bits & 128 else 1, bits >> 3 & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def e2m1(bits):
    """Sign, two bits of exponent biased by 1, one bit of mantissa."""
    sign, exponent, mantissa = -1 if bits & 8 else 1, bits >> 1 & 3, bits & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


@pytest.mark.parametrize("exact", [True, False], ids=["powers of two", "any scale"])
def test_fp8_in_blocks(tmp_path, exact):
    rng = np.random.default_rng(0)
    shape, block = (10, 7), (4, 3)  # neither dim is a multiple of its block
    bits = rng.integers(0, 256, shape, dtype=np.uint8)
    bits[bits & 127 == 127] = 0  # no NaNs
    scale = rng.normal(size=(3, 3)).astype(np.float32)
    if exact:
        scale = np.exp2(rng.integers(-9, 9, (3, 3))).astype(np.float32)
    tensors = {
        "a.weight": bits.view(ml_dtypes.float8_e4m3fn),
        "a.weight_scale_inv": scale,
        "b.weight": rng.normal(size=(3,)).astype(ml_dtypes.bfloat16),
    }
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    write(tmp_path / "hf", tensors, settings)
    found = open_folder(tmp_path / "hf").tensors
    assert found.keys() == {"a.weight", "b.weight"}
    expected = [[e4m3(int(bits[i, j])) * float(scale[i // 4, j // 3]) for j in range(7)] for i in range(10)]
    got = found["a.weight"].read(slice(None))
    assert got.dtype == found["a.weight"].info.dtype == ml_dtypes.bfloat16
    if exact:
        np.testing.assert_array_equal(got.astype(np.float64), expected)
    np.testing.assert_array_equal(got, np.array(expected).astype(np.float32).astype(ml_dtypes.bfloat16))
    for rows in (slice(3, 9), slice(4, 8), slice(9, 10), slice(0, 1)):
        np.testing.assert_array_equal(found["a.weight"].read(rows), got[rows])
    np.testing.assert_array_equal(found["b.weight"].read(slice(None)), tensors["b.weight"])


def test_mxfp4_is_exact_in_bfloat16(tmp_path):
    rng = np.random.default_rng(0)
    experts, columns, groups = 3, 5, 2
    blocks = rng.integers(0, 256, (experts, columns, groups, 16), dtype=np.uint8)
    scales = rng.integers(100, 150, (experts, columns, groups), dtype=np.uint8)
    write(tmp_path / "hf", {"m.w_blocks": blocks, "m.w_scales": scales}, {"quant_method": "mxfp4"})
    found = open_folder(tmp_path / "hf").tensors
    assert found.keys() == {"m.w"}
    got = found["m.w"].read(slice(None))
    assert got.shape == found["m.w"].info.shape == (experts, groups * 32, columns)
    assert got.dtype == ml_dtypes.bfloat16
    for e, n, m in np.ndindex(experts, columns, groups * 32):
        group, place = divmod(m, 32)
        byte = int(blocks[e, n, group, place // 2])
        half = byte >> 4 if place % 2 else byte & 15
        assert float(got[e, m, n]) == e2m1(half) * 2.0 ** (int(scales[e, n, group]) - 127)
    np.testing.assert_array_equal(found["m.w"].read(slice(1, 3)), got[1:3])


def fp8_model():
    """Tensors as DeepSeek-V3 publishes them, and what they stand for: projections in blocks of 8 x 6, the rest not."""
    rng, tensors, meant = np.random.default_rng(0), {}, {}
    values = np.array([e4m3(bits) for bits in range(256)])
    first = ("model.embed_tokens.weight", "lm_head.weight")
    infos = dict(sorted(tensor_infos(DEEPSEEK).items(), key=lambda item: item[0] not in first))
    infos |= {
        "model.layers.2.embed_tokens.weight": infos[first[0]],
        "model.layers.2.shared_head.head.weight": infos[first[1]],
    }
    for name, info in infos.items():
        if "proj" not in name or "eh_proj" in name:
            copied = {"embed_tokens.weight": first[0], "shared_head.head.weight": first[1]}
            original = copied.get(name.removeprefix("model.layers.2."))
            tensors[name] = tensors[original] if original else rng.normal(size=info.shape).astype(info.dtype)
            meant[name] = tensors[name]
            continue
        (rows, columns), bits = info.shape, rng.integers(0, 126, info.shape, dtype=np.uint8)
        bits |= rng.integers(0, 2, info.shape, dtype=np.uint8) << 7
        scale = rng.uniform(0.01, 0.1, (-(-rows // 8), -(-columns // 6))).astype(np.float32)
        tensors |= {name: bits.view(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": scale}
        spread = scale[np.arange(rows)[:, None] // 8, np.arange(columns)[None] // 6].astype(np.float64)
        meant[name] = (values[bits] * spread).astype(np.float32).astype(ml_dtypes.bfloat16)
    return tensors, meant, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 6]}


def mxfp4_model():
    """Tensors as gpt-oss publishes them, and what they stand for: experts in groups of 32, the rest not."""
    rng, tensors, meant = np.random.default_rng(0), {}, {}
    values = np.array([e2m1(bits) for bits in range(16)])
    for name, info in tensor_infos(GPT_OSS).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = meant[name] = rng.normal(size=info.shape).astype(info.dtype)
            continue
        experts, inner, outer = info.shape
        numbers = rng.integers(0, 16, (experts, outer, inner), dtype=np.uint8)  # the dim that is summed over is last
        scales = rng.integers(118, 130, (experts, outer, inner // 32), dtype=np.uint8)
        packed = numbers[..., 0::2] | numbers[..., 1::2] << 4
        tensors |= {f"{name}_blocks": packed.reshape(experts, outer, inner // 32, 16), f"{name}_scales": scales}
        factors = np.repeat(np.exp2(scales.astype(np.float64) - 127), 32, axis=-1)
        meant[name] = np.swapaxes(values[numbers] * factors, 1, 2).astype(ml_dtypes.bfloat16)
    return tensors, meant, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


@pytest.mark.parametrize(
    ("made", "config"), [(fp8_model, DEEPSEEK), (mxfp4_model, GPT_OSS)], ids=["deepseek_v3", "gpt_oss"]
)
def test_a_quantised_model_comes_back_in_bfloat16(tmp_path, made, config):
    tensors, meant, settings = made()
    write(tmp_path / "hf", tensors, settings, config)
    from_hf(tmp_path / "hf", tmp_path / "ours", log=lambda _: None)
    to_hf(tmp_path / "ours", tmp_path / "back", log=lambda _: None)
    back = open_folder(tmp_path / "back")
    assert "quantization_config" not in back.config
    assert back.config["torch_dtype"] == "bfloat16" and back.config | config == back.config
    assert len(tensors) > len(meant) and back.tensors.keys() == meant.keys()
    for name, value in meant.items():
        assert back.tensors[name].info == TensorInfo(value.shape, np.dtype(ml_dtypes.bfloat16)), name
        np.testing.assert_array_equal(back.tensors[name].read(slice(None)), value, err_msg=name)


def test_codes_without_a_scale_are_no_weights(tmp_path):
    tensors, _, settings = fp8_model()
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    write(tmp_path / "hf", tensors, settings, DEEPSEEK)
    with pytest.raises(ConversionError, match="up_proj.weight is of dtype float8_e4m3fn and has no scale"):
        from_hf(tmp_path / "hf", tmp_path / "ours", log=lambda _: None)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"a_scale_inv": np.ones((1, 1), np.float32)}, {"weight_block_size": [2, 2]}, "scales a, which is missing"),
        (
            {"a": np.ones((4, 4), np.float32), "a_scale_inv": np.ones((1, 1), np.float32)},
            {"weight_block_size": [2, 2]},
            r"\[1, 1\], expected \[2, 2\]",
        ),
        ({"a": np.ones(1, np.float32)}, {}, "weight_block_size None"),
        ({"a_blocks": np.ones((1, 1, 1, 16), np.uint8)}, {"quant_method": "mxfp4"}, "no a_scales of shape"),
        ({"a": np.ones(1, np.float32)}, {"quant_method": "awq"}, "quantised by 'awq'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, tensors, settings, message):
    write(tmp_path / "hf", tensors, {"quant_method": "fp8"} | settings)
    with pytest.raises(ConversionError, match=message):
        open_folder(tmp_path / "hf")
