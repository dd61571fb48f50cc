"""What to change so that a run fits: for a plan that does not, and for a run that has stopped for want of memory.

Each change is a few settings that leave alone what is computed, and is judged by the analytical model. Where more is
known to be needed (compiled, or asked of a device and refused), the model's figures are raised in proportion.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from maxlm.chips import CHIPS, Chip
from maxlm.config import Config
from maxlm.parallel.mesh import spreads
from maxlm.plan.analytic import Estimate, Estimator
from maxlm.plan.candidates import changed, overrides, policies
from maxlm.plan.topology import Topology
from maxlm.resolve import relations

SHOWN = 3
LEAST = 1e-3  # of the memory: what saves less saves nothing
LIKE: Mapping[str, Chip] = {
    "tpu": CHIPS["v5p"],
    "gpu": CHIPS["h100"],
    "cpu": dataclasses.replace(CHIPS["cpu"], flops=dict.fromkeys(CHIPS["cpu"].flops, 1e11), hbm_bandwidth=2e10),
}
"""What stands for a chip whose speed is not known: changes are compared, for which proportions are enough."""


class Change(NamedTuple):
    """words: what it does. overrides: words of a command line, unquoted. slower: seconds of a step over those of the
    config as it is, as a fraction; below nought: faster. bytes: on a device afterwards.
    """

    words: str
    overrides: list[str]
    slower: float
    bytes: float


def cheapest(config: Config, topology: Topology, *, needs: float = 0.0, usable: float = 0.0) -> list[Change]:
    """The changes that make a resolved config fit, the cheapest first, `SHOWN` at most; [] if none of them does.

    A chip whose speed the table does not know is taken to have the proportions of `LIKE`.

    Args:
      needs: bytes of a device that the config is known to need at least; 0: as the model says. What is as much as
        `usable` was refused: then a change has to take less than that, and less than the config by the model.
      usable: bytes of a device that a program may use; 0: as the chip table says.
    """
    usable = usable or topology.chip.usable_bytes
    topology = dataclasses.replace(topology, chip=_paced(topology.chip, config.train.precision))
    estimator = Estimator(config, topology, usable=usable)
    before = estimator(config)
    scale = max(needs / before.memory.total, 1.0)  # what one allocation asked for is not all that is needed
    found: list[Change] = []
    for words, candidate in _changes(config):
        parallel = candidate.parallel
        if not spreads(parallel.sizes, parallel.across_slices, slices=topology.slices):
            continue
        if relations(candidate, devices=topology.devices):
            continue
        after = estimator(candidate)
        if after.memory.total * scale < usable and after.memory.total < (1 - LEAST) * before.memory.total:
            slower = _slower(after, before)
            found.append(Change(words, overrides(config, candidate), slower, after.memory.total * scale))
    found.sort(key=lambda change: change.slower)
    kinds: dict[str, Change] = {}
    for change in found:  # of each kind the cheapest, so that three different ways are shown
        kinds.setdefault(change.words.split(":")[0], change)
    return list(kinds.values())[:SHOWN]


def _paced(chip: Chip, precision: str) -> Chip:
    if chip.peak(precision) and chip.hbm_bandwidth:
        return chip
    rates = ("flops", "hbm_bandwidth", "link_bandwidth", "network_bandwidth")
    return dataclasses.replace(chip, **{name: getattr(LIKE[chip.platform], name) for name in rates})


def _slower(after: Estimate, before: Estimate) -> float:
    return after.time.total / before.time.total - 1 if before.time.total else 0.0


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Single changes, as (what it does, the config)."""
    train, optim = config.train, config.optim
    # Of names that are none of the policies it is not known which policies keep less: those that the model finds so.
    remats = policies(config.model)
    lesser = remats[remats.index(train.remat if train.remat in remats else "matmuls") + 1 :]
    for remat in lesser:
        yield f"keep less for the backward pass: {remat}", changed(config, train={"remat": remat})
    for factor in (2, 4, 8):
        words = f"smaller microbatches: {train.accumulation * factor} a step"
        yield words, changed(config, train={"accumulation": train.accumulation * factor})
        for remat in lesser:
            more = {"accumulation": train.accumulation * factor, "remat": remat}
            words = f"smaller microbatches and less kept: {more['accumulation']} a step, {remat}"
            yield words, changed(config, train=more)
    if train.loss_chunk > 256:
        for factor in (2, 4, 8):
            chunk = max(train.loss_chunk // factor, 256)
            yield f"smaller chunks of the loss: {chunk} positions", changed(config, train={"loss_chunk": chunk})
    yield from _meshes(config)
    if optim.moments_dtype == "float32" and optim.b2 <= 1 - 2**-8 and optim.b1 <= 1 - 2**-8:
        yield "narrower moments: bfloat16", changed(config, optim={"moments_dtype": "bfloat16"})


def _meshes(config: Config) -> Iterator[tuple[str, Config]]:
    """Devices moved from replicas to axes that cut the state or the activations, or among these."""
    sizes = config.parallel.sizes
    for source in ("data", "fsdp", "expert"):
        for target in ("fsdp", "tensor", "context", "pipeline"):
            factor = 2
            while source != target and sizes[source] % factor == 0:
                moved: dict[str, Any] = {source: sizes[source] // factor, target: sizes[target] * factor}
                words = f"devices from {source} to {target}: {source} {moved[source]}, {target} {moved[target]}"
                micro = max(config.train.accumulation, moved.get("pipeline", 1))
                yield words, changed(config, parallel=moved, train={"accumulation": micro})
                factor *= 2


def sentences(changes: list[Change]) -> list[str]:
    """A line for each, with what to type."""
    return [
        f"{c.words} ({c.bytes / 2**30:.2f} GiB a device, {_pace(c.slower)}): {shlex.join(c.overrides)}" for c in changes
    ]


def _pace(slower: float) -> str:
    if abs(slower) < 0.01:
        return "about as fast"
    return f"{abs(slower):.0%} {'slower' if slower > 0 else 'faster'}"
