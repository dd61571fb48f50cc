"""The weights of a Hugging Face folder, a converted model or a run, brought onto a mesh.

A folder is read straight: each device's part of each array is put together from the tiles that it crosses, so that the
host holds one such part and one tile at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
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
from maxlm.convert.folder import HuggingFaceFolder, is_huggingface_folder, tell_left_out
from maxlm.convert.stored import CHECKPOINTS, open_stored
from maxlm.convert.tiles import Region, Tile, tiles
from maxlm.data.workers import Progress
from maxlm.model.decoder import split_model
from maxlm.model.family import unlike

Log = Callable[[str], None]
Place = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Shardings (nested dict) -> parameters, float32 (nested dict of arrays)."""


def open_weights(path: str | Path, model: ModelConfig, *, log: Log) -> Place:
    """What brings the weights at `path` onto devices, after checking that they are those of `model`.

    The vocabulary of `model` may have more rows than a Hugging Face folder's; they are zeros. It may be without the
    layers there that predict further tokens.

    Raises:
      ConversionError, FamilyError, CheckpointError: there are none, they are damaged, or they are of another model; the
        settings that differ are named.
    """
    source = Path(path).expanduser()
    if is_huggingface_folder(source):
        folder, described = open_model(source, further=bool(model.mtp_layers))
        tell_left_out(folder, log)
        longer = max(model.vocab_size, described.model.vocab_size)
        _check(source, model, dataclasses.replace(described.model, vocab_size=longer))
        return lambda shardings: _from_folder(folder, described, model, shardings)
    stored = open_stored(source, log=log)
    _check(source, model, stored.model)

    def place(shardings: Mapping[str, Any]) -> dict[str, Any]:
        specs = split_model(model).specs
        abstract = tree.map_paths(
            lambda name, spec, sharding: jax.ShapeDtypeStruct(
                spec.shape, jnp.dtype(stored.info(name).dtype), sharding=sharding
            ),
            specs,
            shardings,
        )
        restored = CheckpointReader(source / CHECKPOINTS, log=log).restore_params(abstract, part=stored.part)
        assert restored is not None  # `open_stored` found one
        log(f"weights of the checkpoint of step {restored.step} of {source}")
        return tree.map_paths(lambda _, x, spec: x.astype(spec.dtype), restored.state, specs)

    return place


def _check(source: Path, model: ModelConfig, found: ModelConfig) -> None:
    differing = unlike(model, found)
    if differing:
        listed = "".join(f"\n  model.{path} is {mine!r}, there {theirs!r}" for path, mine, theirs in differing)
        raise ConversionError(
            f"the config's model is not that of {source}:{listed}\nTake it from there: "
            f"model=maxlm.convert.model_config({str(source)!r}) in the config file"
        )


def _from_folder(
    folder: HuggingFaceFolder, described: FamilyModel, model: ModelConfig, shardings: Mapping[str, Any]
) -> dict[str, Any]:
    specs, places = tree.paths(split_model(model).specs), tree.paths(shardings)
    covering: dict[str, list[Tile]] = {path: [] for path in specs}
    for tile in itertools.chain.from_iterable(map(tiles, described.rows)):
        for path in tile.regions:
            covering[path].append(tile)
    out = {}
    with Progress(f"reading {folder.path.name}", sum(spec.size for spec in specs.values()) * 4) as progress:
        for path, spec in specs.items():
            out[path] = jax.make_array_from_callback(
                spec.shape, places[path], _parts(folder, covering[path], path, spec.shape)
            )
            progress.advance(spec.size * 4)
    return tree.from_paths(out)


def _parts(
    folder: HuggingFaceFolder, covering: list[Tile], path: str, shape: tuple[int, ...]
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """Index of a device's part of one of our arrays -> the part; those of replicas are made once."""
    made: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        key = str(index)
        if key not in made:
            made[key] = _assembled(folder, covering, path, index or (), shape)
        return made[key]

    return part


def _assembled(
    folder: HuggingFaceFolder, covering: list[Tile], path: str, index: tuple[slice, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """A region of one of our arrays, float32; zeros where no tile reaches (a padded vocabulary)."""
    region = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
    out = np.zeros([part.stop - part.start for part in region], np.float32)
    for tile in covering:
        own = tile.regions[path]
        common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(own, region, strict=True))
        if any(part.start >= part.stop for part in common):
            continue
        block = tile.ours(lambda name, rows: folder.tensors[name].read(rows))[path]
        out[_within(common, region)] = block[_within(common, own)]
    return out


def _within(region: Region, outer: Region) -> Region:
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(region, outer, strict=True))
