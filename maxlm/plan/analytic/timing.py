"""Seconds of a step, from the config alone: products, attention, memory, collectives by mesh axis, and the bubble.

The amounts are those of the traced step (`anatomy.py`), FLOPs of attention those of the ledger, the rates those of
the chip table, and collectives go by the rule of `plan/network.py`. Nothing is measured: `RATES` says what share of a
chip's figures such programs reach.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from maxlm.config import MESH_AXES, Config, ModelConfig
from maxlm.model.flops import ledger
from maxlm.parallel.context import choose_method
from maxlm.parallel.mesh import crossing, spreads
from maxlm.parallel.pipeline.schedule import build, report
from maxlm.plan import network
from maxlm.plan.analytic.backends import attention_backends
from maxlm.plan.analytic.memory import Facts, StateBytes, state_bytes
from maxlm.plan.analytic.symbols import values
from maxlm.plan.analytic.walk import KINDS
from maxlm.plan.topology import Topology

PARTS = ("products", "attention", "memory", "bubble", *(f"network: {axis}" for axis in MESH_AXES))


class Rates(NamedTuple):
    """Shares of a chip's figures.

    products: of its peak. attention: of its peak, in kernels that leave out what a causal mask hides. memory: of its
      bandwidth. hidden: share of the collectives of weights that other work is done beside.
    """

    products: float
    attention: float
    memory: float
    hidden: float


RATES: Mapping[str, Rates] = {
    # Products as XLA's own cycles have them in an 8B step on v5p (`plan.predict.PRODUCTS`); the rest is assumed.
    "tpu": Rates(products=0.8, attention=0.5, memory=0.8, hidden=0.0),
    # Assumed, and held against no run. XLA runs collectives on streams of their own.
    "gpu": Rates(products=0.7, attention=0.45, memory=0.8, hidden=0.7),
    "cpu": Rates(products=1.0, attention=1.0, memory=1.0, hidden=0.0),
}

BACKWARD = 2.5
"""Products of attention's backward pass over those of the forward: five for two. The back ends of `TWICE` make the
scores, and what comes to them, again for the gradient of the queries: seven for two."""
TWICE = {"splash": 3.5, "triton": 3.5}
KERNELS = {"splash", "triton", "cudnn"}
"""Attention back ends that keep scores on the chip."""
SCORE_BYTES = 12.0, 26.0
"""Bytes that XLA moves through memory for a score of a head without such a kernel, forwards and backwards: it writes
and reads scores, and their gradient, in float32, and weights in the compute dtype. Together they are what an 8B step
over a ring of two shows when it is compiled (`plan.predict`): 38."""


class Time(NamedTuple):
    """Seconds of a step by part; they add up to the whole."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self.parts.values())


@functools.lru_cache(maxsize=64)
def _scores(model: ModelConfig, sequence: int) -> float:
    """FLOPs of attention's two products, of a token through all layers."""
    return ledger(model, sequence_length=sequence).forward["scores"]


class _Schedule(NamedTuple):
    """bubble: the share of the time in which a stage does nothing. ticks: of the table."""

    bubble: float
    ticks: int


@functools.lru_cache(maxsize=4096)
def _schedule(name: str, stages: int, microbatches: int, virtual: int) -> _Schedule:
    table = build(name, stages=stages, microbatches=microbatches, virtual=virtual)
    return _Schedule(report(table).bubble, len(table.ticks))


def _pipeline(config: Config) -> _Schedule:
    parallel = config.parallel
    return _schedule(parallel.pipeline_schedule, parallel.pipeline, config.train.accumulation, parallel.virtual_stages)


def step_time(config: Config, topology: Topology, known: Facts) -> Time:
    """Of a resolved config with a whole mesh (no -1) on a topology of as many devices."""
    parallel, chip = config.parallel, topology.chip
    rates, peak = RATES[chip.platform], chip.peak(config.train.precision)
    amounts = known.anatomy.amounts(values(config))
    done = dict(zip(KINDS, np.maximum(known.anatomy.kinds @ amounts, 0.0).tolist(), strict=True))

    attention, scores = _attention_flops(config, done, chip.platform), _scores_bytes(config, done, chip.platform)
    state = state_bytes(config, known.state)
    # Products run at the rate of the slower of the two; the optimizer reads and writes the state, and reads gradients.
    products = max(done["product"] / (peak * rates.products), done["operands"] / (chip.hbm_bandwidth * rates.memory))
    parts = {
        "products": products,
        "attention": attention / (peak * rates.attention),
        "memory": (done["traffic"] + scores + 2.5 * sum(state.values())) / (chip.hbm_bandwidth * rates.memory),
    }
    busy = sum(parts.values())
    bubble = 0.0
    if parallel.pipeline > 1:
        lost = _pipeline(config).bubble
        bubble = busy * lost / (1 - lost)
    exposed = _network(config, topology, done, state=known.state, hidden=rates.hidden)
    return Time(parts | {"bubble": bubble} | {f"network: {axis}": exposed.get(axis, 0.0) for axis in MESH_AXES})


def _attention_flops(config: Config, done: Mapping[str, float], platform: str) -> float:
    """Of a device, recomputation included."""
    backward = BACKWARD
    if config.parallel.context == 1:
        backward = max(TWICE.get(name, BACKWARD) for name in attention_backends(config, platform))
    return _over_scores(config, done, 1.0, backward)


def _scores_bytes(config: Config, done: Mapping[str, float], platform: str) -> float:
    """That scores cost a device's memory; on CPUs they stay in caches."""
    if platform == "cpu" or (config.parallel.context == 1 and attention_backends(config, platform) <= KERNELS):
        return 0.0
    forward, backward = SCORE_BYTES
    flops = 2.0 * (config.model.attention.head_dim + config.model.attention.value_dim)  # of a score of a head
    return _over_scores(config, done, forward / flops, backward / flops)


def _over_scores(config: Config, done: Mapping[str, float], forward: float, backward: float) -> float:
    """Of a device, recomputation included, so much for each FLOP of a forward pass's scores in either direction."""
    model, parallel = config.model, config.parallel
    devices = math.prod(parallel.sizes.values())
    tokens = config.data.batch_size * config.data.sequence_length / devices
    flops = _scores(model, config.data.sequence_length) * tokens
    layers = (model.num_layers + model.mtp_layers) / parallel.pipeline * max(config.train.accumulation, 1)
    return flops * (forward * done["attention_forward"] + backward * done["attention_backward"]) / layers


# --- collectives -----------------------------------------------------------------------------------------------------


def _network(
    config: Config,
    topology: Topology,
    done: Mapping[str, float],
    *,
    state: tuple[StateBytes, ...],
    hidden: float,
) -> dict[str, float]:
    """Seconds of collectives that nothing else is done beside, by mesh axis."""
    parallel = config.parallel
    sides = tuple(zip(topology.shape, topology.wrapped, strict=True)) if topology.chip.torus_dims else ()
    spans = axis_spans(tuple(parallel.sizes.items()), parallel.across_slices, slices=topology.slices, sides=sides)

    def take(axis: str, kind: str, payload: float) -> float:
        return network.seconds(kind, payload, spans[axis], topology) if parallel.sizes[axis] > 1 else 0.0

    weights = take("fsdp", "all-gather", done["gather_weights"])
    weights += take("fsdp", "reduce-scatter", done["reduce_weights"])
    stream = _stream_bytes(config)
    # Each has sums of its own, before it is added to the others.
    micros = config.train.accumulation
    exposed = {
        axis: micros * take(axis, "all-reduce", _summed(config, state, axis)) * (1 - hidden)
        for axis in ("data", "expert", "context")
    }
    exposed["fsdp"] = weights * (1 - hidden)
    exposed["tensor"] = take("tensor", "all-gather", done["gather_stream"])
    exposed["tensor"] += take("tensor", "reduce-scatter", done["reduce_stream"])
    exposed["expert"] += take("expert", "ragged-all-to-all", done["experts"])
    if parallel.context > 1:
        exposed["context"] += _context(config, take)
    if parallel.pipeline > 1:
        exposed["pipeline"] = 2 * _pipeline(config).ticks * take("pipeline", "collective-permute", stream)
    return {axis: float(seconds) for axis, seconds in exposed.items() if seconds}


def _summed(config: Config, state: tuple[StateBytes, ...], axis: str) -> float:
    """Bytes on a device of the gradients that an axis of the batch adds up: of parameters that it does not cut."""
    whole = tuple(leaf for leaf in state if leaf.part == "parameters" and axis not in leaf.cut_by)
    experts = tuple(leaf for leaf in whole if "expert" in leaf.cut_by)  # are added up in float32 here
    narrow = 0.5 if config.train.reduce_dtype == "bfloat16" else 1.0
    wide = state_bytes(config, experts)["parameters"]
    return narrow * (state_bytes(config, whole)["parameters"] - wide) + wide


def _stream_bytes(config: Config) -> float:
    """Of a microbatch's stream on a device."""
    parallel = config.parallel
    shards = parallel.data * parallel.fsdp * parallel.expert * parallel.context
    rows = config.data.batch_size * config.data.sequence_length / config.train.accumulation / shards
    return rows * config.model.embed_dim * (4 if config.train.precision == "float32" else 2)


def _context(config: Config, take: Callable[[str, str, float], float]) -> float:
    """Keys and values to all shards of the sequence, forwards and backwards, and their gradients in float32 back."""
    parallel, attention = config.parallel, config.model.attention
    width = attention.kv_heads * (attention.head_dim + attention.value_dim) / parallel.tensor
    shards = parallel.data * parallel.fsdp * parallel.expert
    layers = config.model.num_layers / parallel.pipeline
    positions = config.data.batch_size * config.data.sequence_length / shards
    narrow, wide = positions * width * (4 if config.train.precision == "float32" else 2), positions * width * 4
    method = choose_method(
        "gather" if parallel.pipeline > 1 else parallel.context_method,
        devices=parallel.context,
        q_heads=attention.q_heads,
        kv_heads=attention.kv_heads,
    )
    seconds = 2 * take("context", "all-gather", narrow) + take("context", "reduce-scatter", wide)
    # A ring's hops go on beside the products of the keys that are there.
    return layers * seconds * (0.5 if method == "ring" else 1.0)


@functools.lru_cache(maxsize=4096)
def axis_spans(
    sizes: tuple[tuple[str, int], ...], across_slices: str, *, slices: int, sides: tuple[tuple[int, bool], ...]
) -> Mapping[str, network.Span]:
    """How the groups along each mesh axis lie in the hardware, as `mesh_utils` lays them.

    An axis takes whole sides of the torus where its size is a product of them, and else a part of one, which is open.

    Args:
      sizes: of the mesh axes, outermost first.
      across_slices: the axis that crosses from slice to slice, or "any".
      slices: TPU slices or nodes.
      sides: of a slice's torus, each with whether it is closed; () for devices behind a switch.
    """
    left = list(sides)
    spans: dict[str, network.Span] = {}
    named = across_slices if spreads(dict(sizes), across_slices, slices=slices) else "any"
    crossed = crossing(dict(sizes), named, slices=slices)
    for axis, size in reversed(sizes):  # the innermost axes are given the nearest neighbours
        across = crossed[axis]
        inner = size // across
        if not sides or inner == 1:
            spans[axis] = network.Span(size, across)
            continue
        taken = _sides(left, inner)
        spanned = tuple((share, left[place][1] and left[place][0] == share) for place, share in taken.items())
        spans[axis] = network.Span(size, across, spanned)
        for place, share in taken.items():
            left[place] = (left[place][0] // share, False)  # what is left of a ring is open
    return spans


def _sides(left: list[tuple[int, bool]], size: int) -> dict[int, int]:
    """Which sides a group of this size takes how much of: whole ones, on as many links as there are, or parts."""
    best: tuple[dict[int, int], float] = ({}, 0.0)
    places = [place for place, (whole, _) in enumerate(left) if whole > 1]
    for count in range(1, 2 ** len(places)):
        chosen = [place for bit, place in enumerate(places) if count >> bit & 1]
        if math.prod(left[place][0] for place in chosen) == size:
            lanes = sum(2.0 if left[place][1] else 1.0 for place in chosen)
            if lanes > best[1]:
                best = ({place: left[place][0] for place in chosen}, lanes)
    if best[0]:
        return best[0]
    taken, rest = {}, size
    for place in sorted(places, key=lambda p: -left[p][0]):
        share = math.gcd(left[place][0], rest)
        if share > 1:
            taken[place] = share
            rest //= share
    return taken
