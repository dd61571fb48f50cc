"""Quantised folders against references written here, element by element."""

import json

import ml_dtypes
import numpy as np
import pytest

from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import open_folder
from maxlm.convert.safetensors import ShardWriter, TensorInfo


def write(path, tensors, quantization):
    path.mkdir()
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in tensors.items()}
    with ShardWriter(path, infos, shard_bytes=10**9) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization}))


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
