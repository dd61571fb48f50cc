"""Checkpoints written and read block by block, for arrays that do not fit into memory.

Orbax saves whole arrays. Here TensorStore writes the same layout (zarr3, and the tree's description in `_METADATA`), so
that `CheckpointReader` restores and proves it like any other; the digests are summed up from the blocks.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from maxlm.checkpoint.digest import digest_block
from maxlm.checkpoint.reader import (
    COMMIT_MARKER,
    RECORD_FILE,
    RECORD_ITEM,
    STATE_ITEM,
    ArrayInfo,
    CheckpointError,
    Record,
    record_to_json,
)

Region = tuple[slice, ...]
DIGESTS = "digests"
TREE_FILE = "_METADATA"  # Orbax's name


class Digests:
    """The digests of arrays of which blocks are seen one by one, each element exactly once."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, path: str, block: np.ndarray, region: Region, shape: tuple[int, ...]) -> None:
        """Counts the block that lies at `region` of the array."""
        start = np.array([part.start for part in region], np.uint32)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            part = np.asarray(_digest(block, start, shape=shape))
        self._sums[path] = self._sums.get(path, np.zeros(2, np.uint32)) + part

    def __getitem__(self, path: str) -> np.ndarray:
        return self._sums.get(path, np.zeros(2, np.uint32))


@functools.partial(jax.jit, static_argnames="shape")
def _digest(block: jax.Array, start: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    return digest_block(block, start, shape=shape)


class BlockWriter:
    """Writes one checkpoint: every block of every array, then `finish`.

    Args:
      folder: of the checkpoint (its step); made here. It counts as a checkpoint only once `finish` has returned.
      arrays: shape and dtype by path, as `params/layers/...`.
      chunks: shape of the blocks of each array, by path: the grid in which it is stored.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, ArrayInfo], chunks: Mapping[str, tuple[int, ...]]):
        self._folder, self._arrays = folder, dict(arrays)
        self._digests = Digests()
        (folder / STATE_ITEM).mkdir(parents=True)
        self._stores = {
            path: ts.open(array_spec(_at(folder, array_key(path)), info, chunks[path]), create=True).result()
            for path, info in self._arrays.items()
        }

    def write(self, path: str, region: Region, block: np.ndarray) -> None:
        """Puts a block into its place; blocks of the grid are fastest."""
        info = self._arrays[path]
        block = np.ascontiguousarray(block)
        if str(block.dtype) != info.dtype or block.shape != tuple(part.stop - part.start for part in region):
            raise ValueError(f"{path} is {info}, but was given {block.dtype}{list(block.shape)} for {region}")
        self._digests.add(path, block, region, info.shape)
        self._stores[path][region].write(block).result()

    def finish(self, step: int, metadata: Mapping[str, Any]) -> None:
        """Writes digests, record and the commit marker."""
        state = self._folder / STATE_ITEM
        digests = np.stack([self._digests[path] for path in self._arrays])
        info = ArrayInfo(digests.shape, "uint32")
        spec = array_spec(_at(self._folder, (DIGESTS,)), info, digests.shape)
        ts.open(spec, create=True).result().write(digests).result()
        (state / TREE_FILE).write_text(describe_tree(self._arrays))
        record = Record(step, time.time(), self._arrays, dict(metadata))
        (self._folder / RECORD_ITEM).mkdir()
        (self._folder / RECORD_ITEM / RECORD_FILE).write_text(json.dumps(record_to_json(record)))
        for file in self._folder.rglob("*"):
            if file.is_file():
                _sync(file)
        (self._folder / COMMIT_MARKER).write_text("")


class BlockReader:
    """Reads blocks of a checkpoint's arrays, and proves them once each element has been read.

    Args:
      folder: of the checkpoint.
      record: what `CheckpointReader.record` says of it.
    """

    def __init__(self, folder: Path, record: Record):
        self._folder, self._record = folder, record
        self._seen = Digests()
        self._stores: dict[str, Any] = {}

    def read(self, path: str, region: Region) -> np.ndarray:
        """The block of an array, by its path in the record."""
        if path not in self._stores:
            self._stores[path] = self._open(array_key(path))
        block = self._stores[path][region].read().result()
        self._seen.add(path, block, region, self._record.arrays[path].shape)
        return block

    def prove(self) -> None:
        """Compares the arrays that were read, each as a whole and once, with their digests.

        Raises:
          CheckpointError: some differ.
        """
        saved = self._open((DIGESTS,)).read().result()
        wrong = [
            path
            for path, digest in zip(self._record.arrays, saved, strict=True)
            if path in self._stores and not np.array_equal(digest, self._seen[path])
        ]
        if wrong:
            raise CheckpointError(f"{self._folder} is damaged: arrays differ from their digests: {', '.join(wrong)}")

    def _open(self, key: tuple[str, ...]) -> Any:
        state = self._folder / STATE_ITEM
        if (state / "manifest.ocdbt").exists():
            store: dict[str, Any] = {"driver": "ocdbt", "base": state.as_uri(), "path": ".".join(key)}
        else:
            store = {"driver": "file", "path": str(state / ".".join(key))}
        try:
            return ts.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()
        except ValueError as error:
            raise CheckpointError(f"{self._folder} cannot be read: {str(error)[:300]}") from None


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def array_key(path: str) -> tuple[str, ...]:
    """Where an array stands in the saved tree."""
    return ("arrays", *path.split("/"))


def array_spec(kvstore: Mapping[str, Any], info: ArrayInfo, chunk: tuple[int, ...]) -> dict[str, Any]:
    """TensorStore's description of an array as it is stored: zarr3, in chunks, not compressed.

    Args:
      kvstore: where its files or objects are.
      info: of the array.
      chunk: shape of the blocks of the grid in which it is stored.
    """
    return {
        "driver": "zarr3",
        "kvstore": dict(kvstore),
        "store_data_equal_to_fill_value": True,  # a missing chunk is damage, not zeros
        "metadata": {
            "shape": list(info.shape),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "data_type": info.dtype,
        },
    }


def describe_tree(arrays: Mapping[str, ArrayInfo]) -> str:
    """What Orbax wants to know of the saved tree: the arrays and their digests."""
    keys = [array_key(path) for path in arrays]
    described = {str(key): _described(key, "jax.Array") for key in keys}
    described[str((DIGESTS,))] = _described((DIGESTS,), "np.ndarray")
    tree = {
        "tree_metadata": described,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    return json.dumps(tree)


def _at(folder: Path, key: tuple[str, ...]) -> dict[str, Any]:
    """Files of an array below a checkpoint's folder; `finish` brings all of them to the disk."""
    return {
        "driver": "file",
        "path": str(folder / STATE_ITEM / ".".join(key)),
        "context": {"file_io_sync": False},
    }


def _described(key: tuple[str, ...], kind: str) -> dict[str, Any]:
    return {
        "key_metadata": [{"key": part, "key_type": 2} for part in key],
        "value_metadata": {"value_type": kind, "skip_deserialize": False},
    }
