"""The weights of a Hugging Face folder, a converted model or a run, brought onto a mesh.

A folder is read straight, each tile once: the parts of an array (of all that one tensor of theirs holds) that the
devices of this process have are put together from the tiles that they cross, and go to the devices before the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm import tree
from maxlm.checkpoint.reader import CheckpointReader
from maxlm.config import ModelConfig
from maxlm.convert.engine import FamilyModel, open_model
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import HuggingFaceFolder, described_by, is_huggingface_folder, tell_left_out
from maxlm.convert.stored import CHECKPOINTS, open_stored
from maxlm.convert.tiles import Region, extent, tiles
from maxlm.data.workers import Progress
from maxlm.model.decoder import split_model
from maxlm.model.family import unlike

Log = Callable[[str], None]
Place = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Shardings (nested dict) -> parameters (nested dict of arrays)."""


def open_weights(path: str | Path, model: ModelConfig, *, dtype: Any = jnp.float32, log: Log) -> Place:
    """What brings the weights at `path` onto devices, after checking that they are those of `model`.

    The vocabulary of `model` may have more rows than a Hugging Face folder's; they are zeros. It may be without the
    layers there that predict further tokens.

    Args:
      dtype: in which the matrices and the table are held, where no gradient is wanted: that of the products. Norms,
        biases and routers are float32 regardless.

    Raises:
      ConversionError, FamilyError, CheckpointError: there are none, they are damaged, or they are of another model; the
        settings that differ are named.
    """
    source, dtype = Path(path).expanduser(), jnp.dtype(dtype)
    if is_huggingface_folder(source):
        folder, described = open_model(source, further=bool(model.mtp_layers))
        tell_left_out(folder, log)
        _without_further(source, model, described_by(source, folder.config, folder.tensors)[1], log=log)
        longer = max(model.vocab_size, described.model.vocab_size)
        _check(source, model, dataclasses.replace(described.model, vocab_size=longer))
        return lambda shardings: _from_folder(folder, described, model, shardings, dtype=dtype)
    stored = open_stored(source, log=log)
    _check(source, model, _without_further(source, model, stored.model, log=log))

    def place(shardings: Mapping[str, Any]) -> dict[str, Any]:
        specs = split_model(model).specs
        abstract = tree.map_paths(
            lambda name, spec, sharding: jax.ShapeDtypeStruct(
                spec.shape, jnp.dtype(stored.info(name).dtype), sharding=sharding
            ),
            specs,
            shardings,
        )
        leaving = None if model.mtp_layers else "mtp/"
        reader = CheckpointReader(source / CHECKPOINTS, log=log)
        restored = reader.restore_params(abstract, part=stored.part, leaving=leaving)
        assert restored is not None  # `open_stored` found one
        log(f"weights of the checkpoint of step {restored.step} of {source}")
        held = _held(model, {name: stored.info(name).dtype for name in tree.paths(specs)}, dtype)
        return tree.map_paths(lambda name, x: _cast(x, held[name]), restored.state)

    return place


def _without_further(source: Path, model: ModelConfig, found: ModelConfig, *, log: Log) -> ModelConfig:
    """What was found, without the layers that predict further tokens where the model has none, which is said."""
    if model.mtp_layers or not found.mtp_layers:
        return found
    log(f"{source}: left out are the {found.mtp_layers} layer(s) that predict further tokens (model.mtp_layers=0)")
    return dataclasses.replace(found, mtp_layers=0)


def _held(model: ModelConfig, stored: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The dtype of each parameter in memory: `dtype` for what products cast to it before all else.

    Rows of a table that are scaled or added to, and a head that is normed, are rounded afterwards only: these are held
    in `dtype` where that is how they are stored.
    """
    wide = {"embedding/table"} if model.embed_scale or model.learned_positions else set()
    wide |= {"head/kernel"} if model.normed_head else set()
    out = {}
    for path, spec in tree.paths(split_model(model).specs).items():
        operand = spec.role != "vector" and "router" not in spec.logical
        out[path] = dtype if operand and (path not in wide or stored[path] == dtype) else spec.dtype
    return out


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """The array in another dtype; what it was is given up at once, so that no more than one is there twice."""
    if x.dtype == dtype:
        return x
    cast = x.astype(dtype).block_until_ready()
    x.delete()
    return cast


def _check(source: Path, model: ModelConfig, found: ModelConfig) -> None:
    differing = unlike(model, found)
    if differing:
        listed = "".join(f"\n  model.{path} is {mine!r}, there {theirs!r}" for path, mine, theirs in differing)
        raise ConversionError(
            f"the config's model is not that of {source}:{listed}\nTake it from there: "
            f"model=maxlm.convert.model_config({str(source)!r}) in the config file"
        )


def _from_folder(
    folder: HuggingFaceFolder, described: FamilyModel, model: ModelConfig, shardings: Mapping[str, Any], *, dtype: Any
) -> dict[str, Any]:
    specs, places = tree.paths(split_model(model).specs), tree.paths(shardings)
    stored: dict[str, Any] = {}
    for row in described.rows:
        found = {folder.tensors[name].info.dtype for name, _ in row.tensors()}
        stored |= {piece.ours: found.pop() if len(found) == 1 else None for piece in row.row.pieces}
    held, out = _held(model, stored, dtype), {}
    with Progress(f"reading {folder.path.name}", sum(spec.size for spec in specs.values())) as progress:
        for row in described.rows:
            paths = [piece.ours for piece in row.row.pieces]
            parts = {path: _Parts(specs[path].shape, places[path], held[path]) for path in paths}
            for tile in tiles(row):
                if any(parts[path].reaches(region) for path, region in tile.regions.items()):
                    for path, block in tile.ours(lambda name, rows: folder.tensors[name].read(rows)).items():
                        parts[path].fill(tile.regions[path], block)
            for path in paths:
                out[path] = parts.pop(path).array()
                progress.advance(specs[path].size)
    return tree.from_paths(out)


class _Parts:
    """The parts of one of our arrays that this process's devices have, each once; zeros where nothing is filled in (a
    padded vocabulary)."""

    def __init__(self, shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: Any):
        self._shape, self._sharding = shape, sharding
        regions = map(self._region, sharding.addressable_devices_indices_map(shape).values())
        self._regions = {str(region): region for region in regions}
        self._parts = {key: np.zeros(extent(region), dtype) for key, region in self._regions.items()}

    def _region(self, index: tuple[slice, ...] | None) -> Region:
        return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index or (), self._shape, strict=True))

    def reaches(self, region: Region) -> bool:
        """Whether a region of the array has anything in common with a part."""
        return any(_common(region, own) for own in self._regions.values())

    def fill(self, region: Region, block: np.ndarray) -> None:
        """Puts a region's values into all parts that it crosses."""
        for key, own in self._regions.items():
            if common := _common(region, own):
                self._parts[key][_within(common, own)] = block[_within(common, region)]

    def array(self) -> jax.Array:
        """The array on its devices."""
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: self._parts[str(self._region(index))]
        )


def _common(one: Region, other: Region) -> Region | None:
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return None if any(part.start >= part.stop for part in common) else common


def _within(region: Region, outer: Region) -> Region:
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(region, outer, strict=True))
