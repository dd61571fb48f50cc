"""The safetensors format: reading by memory map, and writing tensors piece by piece into files of a planned layout.

A file is the length of a header (8 bytes, little endian), the header (JSON: name -> dtype, shape, offsets) and the
tensors' bytes (https://huggingface.co/docs/safetensors). The package of that name writes whole files from memory only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from maxlm.convert.errors import ConversionError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; what the format allows
INDEX = "model.safetensors.index.json"


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor in a file: `offset` is that of its first byte from the file's beginning."""

    info: TensorInfo
    file: Path
    offset: int

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or rows of its first axis, mapped from the file: nothing is read before it is looked at."""
        start, stop, _ = rows.indices(self.info.shape[0]) if self.info.shape else (0, 1, 1)
        inner = self.info.shape[1:]
        size = math.prod(inner) * self.info.dtype.itemsize
        if not (stop - start) * size:
            return np.zeros((stop - start, *inner), self.info.dtype)
        shape = ((stop - start) * size,)
        raw = np.memmap(self.file, np.uint8, "r", offset=self.offset + start * size, shape=shape)
        return np.asarray(raw).view(self.info.dtype).reshape((stop - start, *inner) if self.info.shape else ())


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, after checking that all their bytes are there.

    Raises:
      ConversionError: the file is missing, truncated, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ConversionError(f"{file} is truncated or no safetensors file: its header is not all there")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, entry, 8 + length) for name, entry in header.items()}
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{file} is damaged or no safetensors file: {error}") from None
    end = max((tensor.offset + tensor.info.nbytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise ConversionError(f"{file} has {size:,} bytes where its header promises {end:,}; get the file anew")
    return tensors


def _stored(file: Path, entry: Mapping[str, Any], base: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"the dtype {entry['dtype']} is unknown")
    info = TensorInfo(tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]]))
    start, stop = entry["data_offsets"]
    if stop - start != info.nbytes or start < 0:
        raise ValueError(f"a tensor of shape {info.shape} in {entry['dtype']} has {stop - start} bytes")
    return StoredTensor(info, file, base + start)


class ShardWriter:
    """Files of a planned layout whose tensors are written in pieces, in any order; an index where there are several.

    Args:
      folder: exists already.
      tensors: all tensors, in their order in the files.
      shard_bytes: tensors that one file holds at most (a tensor is never cut).
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], *, shard_bytes: int):
        self._tensors = tensors
        shards: list[dict[str, TensorInfo]] = [{}]
        filled = 0
        for name, info in tensors.items():
            if shards[-1] and filled + info.nbytes > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = info
            filled += info.nbytes
        self._places: dict[str, tuple[int, int]] = {}  # file descriptor, offset
        self._files: list[int] = []
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._begin(folder / name, shard)
            weight_map |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            total = sum(info.nbytes for info in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, file: Path, shard: Mapping[str, TensorInfo]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it `transformers` refuses a file
        offset = 0
        for name, info in shard.items():
            offsets = [offset, offset + info.nbytes]
            header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._files.append(descriptor)
        base = 8 + len(text)
        _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(descriptor, base + offset)
        self._places |= {name: (descriptor, base + header[name]["data_offsets"][0]) for name in shard}

    def write(self, name: str, block: np.ndarray, *, row: int = 0) -> None:
        """Puts rows of a tensor's first axis, from `row` on, into their place."""
        info = self._tensors[name]
        inner = info.shape[1:] if info.shape else ()
        if block.dtype != info.dtype or block.shape[1:] != inner:
            raise ValueError(f"{name} is {info}, but was given rows of {block.dtype}{list(block.shape)}")
        descriptor, offset = self._places[name]
        offset += row * math.prod(inner) * info.dtype.itemsize
        _write_all(descriptor, np.ascontiguousarray(block).reshape(-1).view(np.uint8).data, offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files:
            if error is None:
                os.fsync(descriptor)
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:  # one call writes no more than 2 GiB
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
