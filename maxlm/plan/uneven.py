"""How often parts of a compiled step run that depend on where a device stands, on the step, or on the data: averages.

Norms are made in one of `train.norms_every` steps, by a conditional (`train.step.every`).

Attention in blocks passes over a pair of blocks in which no query sees a key, by a conditional (`kernels/chunked.py`).
The pairs that meet follow from the blocks' places in the row; over all devices and hops of a row, every block of
queries comes to every block of keys once, so that their share of all pairs is that of the average turn.

The experts' products on CPUs are a loop over as many blocks of rows as a group was sent (`kernels/grouped.py`), and
their exchange sends of its buffers the rows that there are. Both are counted as if every expert were sent as many
(`even_rows`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from maxlm.config import Config
from maxlm.kernels import grouped
from maxlm.kernels.chunked import block_size, meet
from maxlm.kernels.mask import Mask
from maxlm.plan.hlo import Instruction, Module, counted, fused_flops

_GROUPED = re.compile(rf"\b({'|'.join(grouped.NAMES)})\b")


def settled(module: Module, config: Config) -> Module:
    """The module with the shares of the norms' and of attention's branches and the turns of the experts' loops.

    Args:
      config: resolved, of which the module is the step.
    """
    return dataclasses.replace(
        module, shares={**module.shares, **_shares(module, config)}, turns=_turns(module, config)
    )


def once(module: Module) -> list[Instruction]:
    """The loops of a settled module of which nobody knows how often they turn: they are counted as if once."""
    return [loop for loop in _loops(module) if loop.name not in module.turns]


def even_rows(config: Config) -> float:
    """Rows that a device exchanges and multiplies in a microbatch's layer, were every expert sent as many."""
    spread = math.prod(config.parallel.sizes[axis] for axis in ("data", "fsdp", "expert", "context"))
    tokens = config.data.batch_size * config.data.sequence_length / config.train.accumulation
    return tokens * config.model.moe.active / spread


# --- norms and attention ---------------------------------------------------------------------------------------------


def _shares(module: Module, config: Config) -> dict[str, float]:
    """Of the branches of the norms' conditional, and of attention's, one of which leaves everything as it is."""
    found: dict[str, float] = {}
    for instruction in _all(module):
        if instruction.opcode != "conditional":
            continue
        if instruction.op_name.endswith("/metrics/cond") and config.train.norms_every:
            idle, makes = sorted(instruction.called, key=lambda name: len(module.computations[name]))
            found |= {idle: 1.0 - 1.0 / config.train.norms_every, makes: 1.0 / config.train.norms_every}
        elif re.search(r"\battention\b", instruction.op_name):
            work = {branch: _multiplies(module, branch) for branch in instruction.called}
            if sorted(work.values()) == [False, True]:
                met = meeting(config)
                found |= {branch: met if multiplies else 1.0 - met for branch, multiplies in work.items()}
    return found


def meeting(config: Config) -> float:
    """The share of all pairs of blocks that meet, over the layers of a resolved config."""
    model, context = config.model, config.parallel.context
    windows, layers = model.attention.windows, model.num_layers + model.mtp_layers
    stretches = 2 * context if context > 1 else 1  # into which a row is cut before it is cut into blocks
    groups = model.attention.q_heads // model.attention.kv_heads
    shares = [_meeting(window, config.data.sequence_length, stretches, groups) for window in windows]
    return sum(shares[i % len(windows)] for i in range(layers)) / layers


@functools.lru_cache(maxsize=64)
def _meeting(window: int, length: int, stretches: int, groups: int) -> float:
    chunk = length // stretches
    sizes = block_size(chunk, groups), block_size(chunk)

    def starts(size: int) -> Any:
        # In NumPy: JAX would start its devices, and those of a forecast for CPUs could not be as many as asked for.
        return np.add.outer(np.arange(stretches) * chunk, np.arange(0, chunk, size)).reshape(-1)

    queries, keys = map(starts, sizes)
    met = meet(Mask(scale=1.0, window=window), queries[:, None], sizes[0], keys[None, :], sizes[1])
    return float(np.mean(met))


def _multiplies(module: Module, computation: str) -> bool:
    return any(
        fused_flops(module, computation, i) or any(_multiplies(module, called) for called in i.called)
        for i in module.computations.get(computation, ())
    )


# --- experts ---------------------------------------------------------------------------------------------------------


def _turns(module: Module, config: Config) -> dict[str, float]:
    """Of the loops over blocks of a group's rows: what is multiplied at even load, over what one turn multiplies."""
    model = config.model
    if not model.moe.experts:
        return {}
    groups = model.moe.experts // config.parallel.expert
    matrix = model.embed_dim * model.moe.dim / config.parallel.tensor
    even = 2.0 * even_rows(config) * matrix / groups
    done = {
        loop.name: _flops(module, loop.attribute("body").lstrip("%"))
        for loop in _loops(module)
        if _GROUPED.search(loop.op_name)
    }
    return {name: even / flops for name, flops in done.items() if flops}


def _flops(module: Module, computation: str) -> float:
    """Of the products of one run of a computation without loops."""
    return sum(
        sum(_flops(module, called) for called in i.called)
        if i.opcode == "call"
        else fused_flops(module, computation, i)
        for i in module.computations[computation]
    )


def _loops(module: Module) -> Iterator[Instruction]:
    """Those that do not say how often they turn."""
    return (i for i in _all(module) if i.opcode == "while" and counted(module, i) is None)


def _all(module: Module) -> Iterator[Instruction]:
    return (i for name in module.runs for i in module.computations[name])
