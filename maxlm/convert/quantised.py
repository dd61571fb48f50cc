"""Reading quantised weights: each becomes a bfloat16 tensor under the name that it has in an unquantised folder.

Block-scaled FP8 (DeepSeek-V3, arXiv:2412.19437, section 3.3): `X.weight` in float8_e4m3 and `X.weight_scale_inv`,
float32, a factor for each block of the weight; the product is rounded to bfloat16 as in the reference's conversion.
MXFP4 (gpt-oss; OCP Microscaling Formats 1.0): `X_blocks` (E, N, M / 32, 16) uint8, two four-bit floats a byte with the
lower half first, and `X_scales` (E, N, M / 32) uint8, powers of two biased by 127. X is (E, M, N). Exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from maxlm.convert.errors import ConversionError
from maxlm.convert.safetensors import TensorInfo

if TYPE_CHECKING:
    from maxlm.convert.folder import Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_FP4, -_FP4])  # the fourth bit is the sign


def unquantised(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors with those that config.json's `quantization_config` speaks of as bfloat16.

    Raises:
      ConversionError: the method is not read here, or a scale or its weight is missing or of the wrong shape.
    """
    settings = config.get("quantization_config")
    if not settings:
        return tensors
    match settings.get("quant_method"):
        case "fp8":
            return _with_fp8(tensors, tuple(settings.get("weight_block_size") or ()))
        case "mxfp4":
            return _with_mxfp4(tensors)
        case other:
            raise ConversionError(
                f"the weights are quantised by {other!r}, which is not read (fp8 in blocks and mxfp4 are); convert the "
                "unquantised checkpoint, or write it out with transformers' dequantize() first"
            )


def _with_fp8(tensors: Mapping[str, Tensor], block: tuple[int, ...]) -> Mapping[str, Tensor]:
    if len(block) != 2:
        raise ConversionError(
            f"quantization_config has weight_block_size {block or None}, but only blocks (rows, columns) are read"
        )
    out = dict(tensors)
    for name in [name for name in tensors if name.endswith(_SCALE)]:
        target = name.removesuffix(_SCALE)
        scale, weight = out.pop(name), tensors.get(target)
        if weight is None or len(weight.info.shape) != 2:
            raise ConversionError(f"{name} scales {target}, which is missing or no matrix")
        expected = tuple(-(-size // step) for size, step in zip(weight.info.shape, block, strict=True))
        if scale.info.shape != expected:
            raise ConversionError(f"{name} is {list(scale.info.shape)}, expected {list(expected)} for blocks {block}")
        out[target] = _fp8(weight, scale, block)
    return out


def _fp8(weight: Tensor, scale: Tensor, block: tuple[int, ...]) -> Tensor:
    rows_in_all, columns = weight.info.shape

    def read(rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(rows_in_all)
        first = start // block[0]
        factors = scale.read(slice(first, -(-stop // block[0])))
        factors = np.repeat(np.repeat(factors, block[0], 0), block[1], 1)
        factors = factors[start - first * block[0] :][: stop - start, :columns]
        return (weight.read(slice(start, stop)).astype(np.float32) * factors).astype(_BFLOAT16)

    return weight._replace(info=TensorInfo(weight.info.shape, _BFLOAT16), read=read)


def _with_mxfp4(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    out = dict(tensors)
    for name in [name for name in tensors if name.endswith(_BLOCKS)]:
        target = name.removesuffix(_BLOCKS)
        blocks, scales = out.pop(name), out.pop(target + _SCALES, None)
        if scales is None or len(blocks.info.shape) != 4 or scales.info.shape != blocks.info.shape[:3]:
            raise ConversionError(f"{name} has no {target + _SCALES} of shape {list(blocks.info.shape[:3])}")
        out[target] = _mxfp4(blocks, scales)
    return out


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    experts, columns, groups, half = blocks.info.shape

    def read(rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(experts)
        packed = blocks.read(slice(start, stop))
        halves = _FP4_VALUES[np.stack([packed & 15, packed >> 4], axis=-1)]
        exponents = scales.read(slice(start, stop)).astype(np.int32) - 127
        values = np.ldexp(halves, exponents[..., None, None]).astype(_BFLOAT16)
        return values.reshape(stop - start, columns, groups * half * 2).swapaxes(1, 2)

    return blocks._replace(info=TensorInfo((experts, groups * half * 2, columns), _BFLOAT16), read=read)
