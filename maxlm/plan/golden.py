"""A recipe's step in some thirty lines of text, kept and compared in tests: what it sends, what it holds and computes.

The recipe is compiled at reduced depth, which changes nothing of how a layer is laid out over the mesh; for the CPU,
where a test has seconds, at reduced width on eight devices too. A change that adds a collective, or keeps an activation
more, changes a line of the text, and so shows in review.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from maxlm.config import MESH_AXES, Config, ParallelConfig
from maxlm.kernels import grouped
from maxlm.parallel.experts import sharded_experts
from maxlm.parallel.mesh import make_mesh
from maxlm.plan.collectives import find
from maxlm.plan.hlo import parse, total_flops
from maxlm.plan.memory import read_memory
from maxlm.resolve import resolve
from maxlm.train.setup import Setup, make_runtime, make_setup
from maxlm.train.step import separates_documents

ConstrainFn = Callable[..., jax.Array]
SMALL_DEVICES = 8
SMALL_LATENT = {"kv_dim": 40, "query_dim": 48, "rope_dim": 8, "value_dim": 16}
SCOPES = ("embed", "router", "experts", "mlp", "attention", "final_norm", "loss", "optimizer", "guard", "metrics")
CYCLES = 2  # of windows, which are single layers where all have the same: a loop that turns once is no loop
SMALLEST = 1e-4  # a kind of collective with less of all bytes is not told of


def shallow(config: Config) -> Config:
    """The config with one dense layer in front, where it has some, and two layers or cycles of windows of the rest."""
    model = config.model
    dense = min(model.moe.dense_layers, 1)
    layers = dense + CYCLES * len(model.attention.windows)
    small = dataclasses.replace(model, num_layers=layers, moe=dataclasses.replace(model.moe, dense_layers=dense))
    return resolve(dataclasses.replace(config, model=small))


def small(config: Config) -> Config:
    """The shallow config at a width that a CPU compiles in seconds, on eight devices along the same mesh axes.

    Every dim keeps what makes it special (grouped heads, a latent, shared experts, groups of experts); steps, rows and
    positions are few.
    """
    config = shallow(config)
    model, parallel = config.model, _eight(config.parallel)
    heads, moe, latent = model.attention, model.moe, model.attention.latent
    attention = dataclasses.replace(
        heads,
        q_heads=8,
        kv_heads=8 if heads.kv_heads == heads.q_heads else 4,
        head_dim=24 if latent.kv_dim else 16,
        windows=tuple(min(window, 32) for window in heads.windows),
        latent=dataclasses.replace(latent, **SMALL_LATENT) if latent.kv_dim else latent,
    )
    groups = min(moe.groups, 4)
    experts = dataclasses.replace(
        moe,
        experts=8,
        active=2,
        dim=96,
        shared_dim=96 if moe.shared_dim else 0,
        groups=groups,
        top_groups=min(groups, 2),
    )
    width = dataclasses.replace(
        model,
        vocab_size=512,
        embed_dim=64,
        attention=attention,
        mlp=dataclasses.replace(model.mlp, dim=192),
        moe=experts if moe.experts else moe,
        learned_positions=64 if model.learned_positions else 0,
    )
    return resolve(
        dataclasses.replace(
            config,
            model=width,
            data=dataclasses.replace(config.data, sequence_length=64, batch_size=16 * config.train.accumulation),
            train=dataclasses.replace(config.train, loss_chunk=64),
            eval=dataclasses.replace(config.eval, batch_size=16),
            parallel=parallel,
        ),
        devices=SMALL_DEVICES,
    )


def small_setup(config: Config, *, constrain: ConstrainFn | None = None) -> Setup:
    """The setup of a small config on virtual CPU devices, with experts by `lax.ragged_dot`.

    The CPU's own back end loops over blocks as often as the data asks for, and so has no number of products.

    Args:
      constrain: takes the place of the runtime's, e.g. to plant a collective.
    """
    mesh = make_mesh(config.parallel)
    segments = separates_documents(config.data)
    limited = bool(config.model.moe.capacity_factor)
    runtime, _ = make_runtime(config, mesh, segments=segments, experts_limited=limited)
    ragged = next(backend for backend in grouped.BACKENDS if backend.name == "ragged")
    experts = sharded_experts(ragged, mesh, reduce_dtype=runtime.reduce_dtype)
    chosen = runtime.constrain if constrain is None else functools.partial(constrain, runtime.constrain)
    return make_setup(config, mesh, runtime=dataclasses.replace(runtime, experts=experts, constrain=chosen))


def _eight(parallel: ParallelConfig) -> ParallelConfig:
    """Eight devices over the axes that are in use, the inner ones first; all along `data` where none is."""
    used = [axis for axis in MESH_AXES if parallel.sizes[axis] > 1] or ["data"]
    sizes: dict[str, Any] = dict.fromkeys(MESH_AXES, 1)
    for turn in range(SMALL_DEVICES.bit_length() - 1):
        sizes[used[-1 - turn % len(used)]] *= 2
    return dataclasses.replace(parallel, **sizes)


def summary(program: str, mesh: Mapping[str, int], *, buffers: str = "", ranges: str = "") -> list[str]:
    """The lines of a compiled program.

    Args:
      program: text of the scheduled program.
      mesh: size of every mesh axis.
      buffers, ranges: XLA's reports of its memory; without them nothing is said of it.
    """
    module = parse(program)
    lines = [f"products {total_flops(module) / 1e9:.6g} GFLOP a device, without those inside kernels"]
    counts: dict[tuple[str, str, str], float] = defaultdict(float)
    sizes: dict[tuple[str, str, str], float] = defaultdict(float)
    for sent in find(module, mesh):
        row = sent.kind, " x ".join(sent.axes), part_of(sent.op_name)
        counts[row] += sent.times
        sizes[row] += sent.times * sent.payload
    for row in sorted(sizes):
        if sizes[row] >= SMALLEST * sum(sizes.values()):
            kind, axes, part = row
            lines.append(f"{kind} over {axes}, {part}: {counts[row]:g} a step, {sizes[row] / 1e6:.6g} MB")
    if buffers:
        memory = read_memory(module, buffers, ranges)
        lines += [f"{name}: {size / 2**20:.0f} MiB" for name, size in memory.components.items() if size >= 2**20]
    return lines


def part_of(op_name: str) -> str:
    """The part of the step that an instruction belongs to, by the path of its code: "mlp", "backward attention"."""
    path = op_name.replace("loss_and_gradients", "")
    part = next((scope for scope in SCOPES if re.search(rf"\b{scope}\b", path)), "elsewhere")
    if "rematted_computation" in path:
        return f"recomputed {part}"
    return f"backward {part}" if "transpose(" in path else part


def state_lines(setup: Setup) -> list[str]:
    """Bytes of parameters and optimizer that a device holds, exactly, from shapes and shardings."""
    state = setup.abstract_state()
    sizes: Counter[str] = Counter()
    for name, tree in (("parameters", state.params), ("optimizer", state.opt_state)):
        for leaf in jax.tree.leaves(tree):
            sizes[name] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    return [f"state, {name}: {size} bytes a device" for name, size in sizes.items()]


def page(title: str, config: Config, lines: list[str]) -> str:
    """The text of a golden."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in config.parallel.sizes.items() if size > 1) or "one device"
    work = f"{config.model.num_layers} layers, {config.data.batch_size} rows of {config.data.sequence_length}"
    return "\n".join([title, f"mesh {mesh}; {work}", *lines]) + "\n"


def differences(kept: str, found: str) -> str:
    """What changed, as a diff of lines; "" where nothing did."""
    lines = difflib.unified_diff(kept.splitlines(), found.splitlines(), "kept", "found", lineterm="", n=0)
    return "\n".join(lines)
