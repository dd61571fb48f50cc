"""Other ways to run the same training on the same devices: meshes, recomputation, microbatches, pipeline schedules.

What a run computes stays the same: the model, the rows and positions of a batch, the optimizer. Everything else of the
config is left as it is, but for `eval.batch_size`, which is rounded up to what the mesh can share out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from maxlm.config import MESH_AXES, Config, ModelConfig
from maxlm.parallel.mesh import spreads
from maxlm.plan.topology import Topology
from maxlm.resolve import leaves, relations

REMATS = (
    "none",
    "matmuls",
    "attention_qkv+attention_out+attention_proj+mlp_gate+mlp_up",
    "attention_qkv+attention_out+mlp_gate+mlp_up",
    "attention_qkv+attention_out+mlp_up",
    "attention_out+mlp_up",
    "attention_qkv+attention_out",
    "attention_out",
    "full",
)
"""Policies (`train.remat`) of models whose feed-forward half has a gate, the one that keeps most first."""

LARGEST = {"tensor": 16, "context": 32, "pipeline": 32}
"""Beyond these an axis costs more than any other use of its devices."""

MICROBATCHES = 64
"""At most; of a pipeline, four a stage where that is more: a bubble of a fifth is left."""
VIRTUAL = (2, 4)


def policies(model: ModelConfig) -> tuple[str, ...]:
    """The policies of a model: where there is no gate none keeps it, and those that then are equal are one."""
    if model.mlp.gated:
        return REMATS
    kept = ([name for name in remat.split("+") if name != "mlp_gate"] for remat in REMATS)
    return tuple(dict.fromkeys(map("+".join, kept)))


def meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
    """Sizes of the mesh axes whose product is `devices`, and that the model's dims divide into."""
    model = config.model
    limits = {axis: devices for axis in MESH_AXES} | LARGEST
    limits["expert"] = model.moe.experts or 1
    hidden = (model.mlp.dim,) if model.has_dense_layers else ()
    whole = {
        "tensor": math.gcd(model.attention.kv_heads, model.vocab_size, *hidden),
        "expert": model.moe.experts or 1,
        "fsdp": model.embed_dim,
        "context": config.data.sequence_length // 2,
        "pipeline": model.num_layers // len(model.attention.windows),
    }
    if model.moe.dense_layers:
        limits["pipeline"] = 1

    def sizes(axes: tuple[str, ...], left: int) -> Iterator[dict[str, int]]:
        axis, *rest = axes
        if not rest:
            yield {axis: left}
            return
        for size in (d for d in range(1, min(left, limits[axis]) + 1) if left % d == 0):
            if whole[axis] % size == 0:
                for others in sizes(tuple(rest), left // size):
                    yield {axis: size} | others

    yield from sizes(("tensor", "expert", "context", "pipeline", "fsdp", "data"), devices)


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """Configs as `resolve` fills them in, whose relations (`resolve.relations`) are the caller's to check.

    The config itself is the first, if `resolve` accepts it for these devices and the slices or nodes can share it out:
    of one that cannot run, the model cannot say anything either.
    """
    if _runs(config, topology):
        yield config
    for mesh, counts in _shared_out(config, topology):
        for accumulation in counts:
            yield from (one for one in _settled(config, mesh, accumulation, policies(config.model)) if one != config)


def _runs(config: Config, topology: Topology) -> bool:
    own = config.parallel
    whole = min(*own.sizes.values(), own.virtual_stages) >= 1  # what is below, `relations` takes to be settled
    here = whole and spreads(own.sizes, own.across_slices, slices=topology.slices)
    return here and not relations(config, devices=topology.devices)


def leanest(config: Config, topology: Topology) -> Iterator[Config]:
    """Of the candidates of every mesh those that take least memory: where none of these fits, none does.

    They keep least for the backward pass, and have as many microbatches as there may be, or as few: a single one needs
    no sums of gradients.
    """
    for mesh, counts in _shared_out(config, topology):
        for accumulation in sorted({counts[0], counts[-1]}):
            yield from _settled(config, mesh, accumulation, policies(config.model)[-1:])


def _shared_out(config: Config, topology: Topology) -> Iterator[tuple[dict[str, int], list[int]]]:
    """Meshes that the slices or nodes and the batch's rows can share out, with the microbatches that each may have."""
    for mesh in meshes(config, topology.devices):
        if not spreads(mesh, config.parallel.across_slices, slices=topology.slices):
            continue
        rows, odd = divmod(config.data.batch_size, mesh["data"] * mesh["fsdp"] * mesh["expert"])
        if odd or (mesh["context"] > 1 and config.model.moe.capacity_factor):
            continue
        if counts := microbatches(rows, mesh["pipeline"]):
            yield mesh, counts


def _settled(config: Config, mesh: dict[str, int], accumulation: int, remats: tuple[str, ...]) -> Iterator[Config]:
    """The config with this mesh and so many microbatches, in every way that suits them, with each of the policies."""
    for parallel in _ways(config, mesh, accumulation):
        for remat in remats:
            yield changed(config, parallel=parallel, train={"accumulation": accumulation, "remat": remat})


def microbatches(rows: int, stages: int) -> list[int]:
    """Into how many microbatches a device's rows may be cut: a pipeline has as many as stages at least."""
    most = max(MICROBATCHES, 4 * stages if stages > 1 else 0)
    return [count for count in range(stages, min(rows, most) + 1) if rows % count == 0]


def _ways(config: Config, mesh: dict[str, int], accumulation: int) -> Iterator[dict[str, Any]]:
    """A mesh with every pipeline schedule and every way of context parallelism that suit it."""
    methods: tuple[str, ...] = ("auto",)
    if mesh["context"] > 1 and mesh["pipeline"] == 1:
        methods = ("ring", "gather")
    elif mesh["context"] == 1:
        methods = (config.parallel.context_method,)
    for schedule, virtual in schedules(config, mesh, accumulation):
        for method in methods:
            yield mesh | {"pipeline_schedule": schedule, "virtual_stages": virtual, "context_method": method}


def schedules(config: Config, mesh: dict[str, int], accumulation: int) -> Iterator[tuple[str, int]]:
    """Pipeline schedules and virtual stages that so many microbatches suit; those of the config without a pipeline."""
    stages = mesh["pipeline"]
    if stages == 1:
        yield config.parallel.pipeline_schedule, 1
        return
    yield from (("1f1b", 1), ("zero_bubble", 1), ("gpipe", 1))
    units = config.model.num_layers // len(config.model.attention.windows)
    if accumulation % stages == 0:
        yield from (("interleaved", virtual) for virtual in VIRTUAL if units % (stages * virtual) == 0)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with leaves of sections replaced, and an evaluation batch that the mesh can share out."""
    config = dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )
    shards = config.parallel.data * config.parallel.fsdp * config.parallel.expert
    rows = config.eval.batch_size
    if rows % shards:
        rounded = dataclasses.replace(config.eval, batch_size=-(-rows // shards) * shards)
        config = dataclasses.replace(config, eval=rounded)
    return config


def overrides(before: Config, after: Config) -> list[str]:
    """What to add to `maxlm train` to turn one config into another: `--config.parallel.fsdp=16`, …, each one word.

    Words are as a program takes them, unquoted and without blanks, so that a shell can be given them by `$(cat FILE)`,
    which removes no quotes; a line that is to be typed needs `shlex.join`.
    """
    old = {path: value for path, _, value in leaves(before)}
    return [f"--config.{path}={_written(value)}" for path, _, value in leaves(after) if old.get(path) != value]


def _written(value: Any) -> str:
    """A leaf's value as the command line takes it: tuples as Python has them, but without blanks."""
    if not isinstance(value, tuple):
        return str(value)
    items = [_written(item) if isinstance(item, tuple) else repr(item) for item in value]
    return f"({','.join(items)}{',' if len(items) == 1 else ''})"
