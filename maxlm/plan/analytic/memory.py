"""Bytes on a device, from the config alone: what the state takes, and the fullest moment of a step.

The state is read off the parameters' declarations, the optimizer's state and the sharding table; the rest off the
traced step (`anatomy.py`). A pipeline keeps as many microbatches as its table has slots for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from maxlm import tree
from maxlm.config import Config, ModelConfig, OptimConfig
from maxlm.model.decoder import split_model
from maxlm.optim.optimizers import make_optimizer
from maxlm.parallel.pipeline.schedule import build
from maxlm.parallel.pipeline.slots import Slots, assign
from maxlm.parallel.sharding import RULES
from maxlm.plan.analytic.anatomy import Anatomy, dissect
from maxlm.plan.analytic.symbols import PLACE, values
from maxlm.plan.analytic.walk import ROLES
from maxlm.train.state import abstract_shapes

STATE = ("parameters", "optimizer", "moving average")
BATCH = "batch"
PIPELINE = "pipeline buffers"
COMPONENTS = (*STATE, BATCH, *ROLES, PIPELINE)


class Memory(NamedTuple):
    """Bytes on a device.

    parts: by component: the state, and the rest at the fullest moment of a step.
    place: what the step does at that moment.
    """

    parts: Mapping[str, float]
    place: str

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())


class Facts(NamedTuple):
    """What is the same for all meshes, batches and lengths of a model and a remat policy.

    anatomy: of the step. unremat: of the step that keeps everything, where a pipeline may need it.
    state: bytes of the state.
    """

    anatomy: Anatomy
    unremat: Anatomy | None
    state: tuple[StateBytes, ...]


def facts(config: Config, *, named: bool = True) -> Facts:
    """The facts of a resolved config.

    Args:
      named: whether the attention kernel names its results for remat.
    """
    unremat = None
    if config.parallel.pipeline > 1:
        unremat = dissect(dataclasses.replace(config, train=dataclasses.replace(config.train, remat="none")))
    return Facts(dissect(config, named=named), unremat, state_leaves(config.model, config.optim))


def memory(config: Config, known: Facts) -> Memory:
    """Of a resolved config with a whole mesh (no -1)."""
    anatomy, columns, buffers = known.anatomy, values(config), 0.0
    sizes = anatomy.sizes(columns)
    if config.parallel.pipeline > 1:
        kept, buffers = _pipelined(config, known, columns)
        sizes = sizes * kept
    totals = anatomy.moments @ sizes
    fullest = int(totals.argmax())
    held = (anatomy.moments[fullest] * sizes) @ anatomy.roles
    parts = state_bytes(config, known.state) | {BATCH: batch_bytes(config)}
    parts |= dict(zip(ROLES, held.tolist(), strict=True)) | {PIPELINE: buffers}
    return Memory(parts, anatomy.places[fullest])


# --- the state -------------------------------------------------------------------------------------------------------


class StateBytes(NamedTuple):
    """Bytes of a part of the state by the mesh axes that cut them."""

    part: str
    cut_by: frozenset[str]
    bytes: float


@functools.lru_cache(maxsize=32)
def state_leaves(model: ModelConfig, optim: OptimConfig) -> tuple[StateBytes, ...]:
    """The whole state's bytes, by part and by the mesh axes that cut them."""
    config = Config(model=model, optim=optim)
    specs = split_model(model).specs
    optimizer = make_optimizer(optim, specs)
    shapes = abstract_shapes(config, optimizer)
    params = tree.map_paths(lambda _, spec: _cut_by(spec.logical), specs)
    moments = optimizer.shardings(shapes.opt_state, _cut_by)
    sums: dict[tuple[str, frozenset[str]], int] = {}
    named: tuple[tuple[str, Any, Any], ...] = (
        ("parameters", shapes.params, params),
        ("optimizer", shapes.opt_state, moments),
        ("moving average", shapes.average, params if shapes.average else {}),
    )
    for part, arrays, cuts in named:
        for leaf, cut in zip(jax.tree.leaves(arrays), jax.tree.leaves(cuts), strict=True):
            key = (part, cut)
            sums[key] = sums.get(key, 0) + math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return tuple(StateBytes(part, cut, size) for (part, cut), size in sums.items())


def _cut_by(logical: tuple[str | None, ...]) -> frozenset[str]:
    """A set, since JAX takes tuples for trees."""
    return frozenset(axis for name in logical if name is not None for axis in RULES[name])


def state_bytes(config: Config, leaves: tuple[StateBytes, ...]) -> dict[str, float]:
    """Of parameters, optimizer and moving average on a device."""
    sizes, sums = config.parallel.sizes, dict.fromkeys(STATE, 0.0)
    for part, cut_by, total in leaves:
        for axis in cut_by:
            total /= sizes[axis]
        sums[part] += total
    return sums


def batch_bytes(config: Config) -> float:
    """Of the five arrays of a batch on a device."""
    parallel = config.parallel
    shards = math.prod(parallel.sizes[axis] for name in ("batch", "seq") for axis in RULES[name])
    return 5 * 4 * config.data.batch_size * config.data.sequence_length / shards


# --- a pipeline ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def slots(name: str, stages: int, microbatches: int, virtual: int) -> Slots:
    """How many slots each buffer of a schedule has."""
    return assign(build(name, stages=stages, microbatches=microbatches, virtual=virtual))


def _pipelined(config: Config, known: Facts, columns: np.ndarray) -> tuple[np.ndarray, float]:
    """By what the size of each kind of array is multiplied, and the bytes of what travels between stages.

    Activations are kept for as many microbatches as there are slots, a virtual stage's layers each. Where backward
    passes are cut in two, the operands of the weights' products are kept in between: of a layer, as much as remat none
    keeps of it, and gradients beside.
    """
    parallel, place = config.parallel, ROLES.index("activations")
    table = slots(parallel.pipeline_schedule, parallel.pipeline, config.train.accumulation, parallel.virtual_stages)
    stream = columns[PLACE["rows"]] * config.data.sequence_length / parallel.context * config.model.embed_dim
    stream *= 4 if config.train.precision == "float32" else 2
    buffers = (table.inputs + table.seeds + 4) * stream
    if table.pairs and known.unremat is not None:
        whole = known.unremat
        most = (whole.moments @ (whole.sizes(columns) * whole.roles[:, place])).max()
        buffers += 2 * most / parallel.virtual_stages * table.pairs
    activations = known.anatomy.roles[:, place] > 0
    return np.where(activations, table.kept / parallel.virtual_stages, 1.0), float(buffers)
