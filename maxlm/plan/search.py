"""Looks for the fastest way to run a training on given hardware: a model judges all ways, the compiler the best.

Nothing of what the run computes is changed (`plan/candidates.py`). Every candidate is judged by the analytical model;
those that fit are compiled in the order of their predicted times, as long as the time that was given lasts, and ranked
by what the compiler's own figures say.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from maxlm.config import Config
from maxlm.errors import UserError
from maxlm.parallel.mesh import spreads
from maxlm.plan.analytic import Estimate, Estimator
from maxlm.plan.candidates import candidates, leanest
from maxlm.plan.compile import OutOfTime
from maxlm.plan.topology import Topology, TopologyError, parse_topology
from maxlm.resolve import relations, resolve

COMPILED = 6  # candidates at most
CONSIDERED = 500  # of those that fit, the fastest by the model
SLACK = 0.05  # of the memory: by how much a candidate may seem too large and still be compiled
LARGER = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


class SearchError(UserError):
    """Nothing fits, nothing could be compiled, or there is nothing to search."""


class Verdict(NamedTuple):
    """What the compiler says of a candidate: bytes on a device, seconds of a step, and these by part."""

    bytes: float
    seconds: float
    parts: Mapping[str, float]


class Slice(NamedTuple):
    """Hardware that can hold a run. across: the `parallel.across_slices` with which it does."""

    topology: Topology
    across: str


Judge = Callable[[Config, Topology, float], Verdict]  # the last: the seconds that it may take
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A candidate. verdict: None where it was not compiled. refused: why the compiler would not have it."""

    config: Config
    estimate: Estimate
    verdict: Verdict | None = None
    refused: str = ""

    @property
    def seconds(self) -> float:
        """Of a step: as compiled, or else as the model has it."""
        return self.verdict.seconds if self.verdict else self.estimate.time.total

    @property
    def bytes(self) -> float:
        """On a device, likewise."""
        return self.verdict.bytes if self.verdict else self.estimate.memory.total


@dataclasses.dataclass(frozen=True)
class Found:
    """best: the fastest first, compiled ones before others. judged: how many the model judged. fitting: of these.

    late: whether the time was over before the last compilation was done.
    """

    best: tuple[Ranked, ...]
    judged: int
    fitting: int
    seconds: float  # that judging took
    late: bool = False

    @property
    def winner(self) -> Ranked:
        """The first."""
        return self.best[0]


def search(
    config: Config,
    topology: Topology,
    judge: Judge | None,
    *,
    budget_seconds: float,
    log: Log = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """The best ways to run a resolved config on the hardware.

    Args:
      judge: compiles a candidate; None: the model judges alone.
      budget_seconds: for all of it; a compilation is begun only if the last one would have fitted into what is left,
        and ended when nothing is.

    Raises:
      SearchError: nothing fits; the message names the smallest slice of that chip that can hold the run. Or none of
        what should fit could be compiled, or the table does not know the chip's speed or memory.
    """
    _check_known(topology, config.train.precision)
    begun = clock()
    judged, least = 0, math.inf
    fitting: list[Ranked] = []
    slack = SLACK * topology.chip.usable_bytes if judge else 0.0
    for candidate, guess in judged_candidates(config, topology):
        judged, least = judged + 1, min(least, guess.memory.total)
        if guess.room >= -slack:
            fitting.append(Ranked(candidate, guess))
    took, many = clock() - begun, sum(ranked.estimate.fits for ranked in fitting)
    log(f"{judged:,} ways to run it judged in {took:.1f} s; {many:,} of them fit by the model's memory")
    fitting.sort(key=lambda ranked: ranked.estimate.time.total)
    fitting = list(itertools.islice(_accepted(fitting, topology), CONSIDERED))
    if not fitting:
        raise SearchError(nothing_fits(config, topology, least=least, log=log))
    if judge is None:
        return Found(tuple(fitting[:COMPILED]), judged, many, took)

    compiled: list[Ranked] = []
    longest, late = 0.0, False
    for ranked in fitting:
        fit = [done for done in compiled if _fits(done, topology)]
        if len(fit) >= COMPILED or (compiled and clock() - begun + longest > budget_seconds):
            break
        if _tells_little(ranked, compiled, topology):
            continue
        before = clock()
        try:
            compiled.append(_compile(ranked, topology, judge, begun + budget_seconds - before))
        except OutOfTime as error:
            late = True
            log(f"{error}: the time of the search is over")
            break
        longest = max(longest, clock() - before)
        log(f"compiled in {clock() - before:.0f} s: {describe(compiled[-1], topology)}")
    good = sorted((done for done in compiled if _fits(done, topology)), key=lambda done: done.seconds)
    done = [ranked.config for ranked in compiled]
    rest = [
        ranked
        for ranked in fitting
        if ranked.estimate.fits and ranked.config not in done and not _too_large(ranked, compiled, topology)
    ]
    best = (good + rest)[:COMPILED]
    if not best:
        raise SearchError(_none_left(config, topology, compiled, least=least, log=log))
    return Found(tuple(best), judged, many, took, late)


def _check_known(topology: Topology, precision: str) -> None:
    chip = topology.chip
    figures = {
        f"peak in {precision} (flops)": chip.peak(precision),
        "bandwidth of memory (hbm_bandwidth)": chip.hbm_bandwidth,
        "memory (usable_bytes)": chip.usable_bytes,
    }
    if missing := [name for name, value in figures.items() if not value]:
        raise SearchError(
            f"--search compares ways of running by the chip's figures, and the table has no {', '.join(missing)} of "
            f"{chip.name}; plan without --search, or give the figures in a file for --chips (docs/plan.md)"
        )


def judged_candidates(
    config: Config, topology: Topology, ways: Callable[[Config, Topology], Iterator[Config]] = candidates
) -> Iterator[tuple[Config, Estimate]]:
    """Candidates with the model's estimate; whether `resolve` accepts them is yet to be seen (`_accepted`)."""
    estimator = Estimator(config, topology)
    for candidate in ways(config, topology):
        yield candidate, estimator(candidate)


def _accepted(ranked: Iterable[Ranked], topology: Topology) -> Iterator[Ranked]:
    return (one for one in ranked if not relations(one.config, devices=topology.devices))


def _compile(ranked: Ranked, topology: Topology, judge: Judge, seconds: float) -> Ranked:
    try:
        config = resolve(ranked.config, devices=topology.devices)
        return dataclasses.replace(ranked, verdict=judge(config, topology, seconds))
    except OutOfTime:
        raise
    except UserError as error:
        return dataclasses.replace(ranked, refused=str(error))


def _fits(ranked: Ranked, topology: Topology) -> bool:
    return ranked.verdict is not None and ranked.bytes <= topology.chip.usable_bytes


def _tells_little(ranked: Ranked, compiled: list[Ranked], topology: Topology) -> bool:
    """Whether near twins are compiled already: two of its mesh, or one of its mesh and remat.

    One that turned out too large stands for those alone that by the model take as much.
    """
    same = [done for done in _twins(ranked, compiled) if done.verdict is None or _fits(done, topology)]
    return len(same) >= 2 or _policy(ranked) in map(_policy, same) or _too_large(ranked, compiled, topology)


def _too_large(ranked: Ranked, compiled: list[Ranked], topology: Topology) -> bool:
    """Whether one of its mesh that by the model takes no more turned out too large."""
    return any(
        done.verdict is not None
        and not _fits(done, topology)
        and ranked.estimate.memory.total >= done.estimate.memory.total
        for done in _twins(ranked, compiled)
    )


def _twins(ranked: Ranked, compiled: list[Ranked]) -> list[Ranked]:
    return [done for done in compiled if done.config.parallel.sizes == ranked.config.parallel.sizes]


def _policy(ranked: Ranked) -> tuple:
    return ranked.config.train.remat, ranked.config.train.remat_names


def _none_left(config: Config, topology: Topology, compiled: list[Ranked], *, least: float, log: Log) -> str:
    """Why nothing is left of what was worth compiling; arguments as of `nothing_fits`."""
    sizes = [done.bytes for done in compiled if done.verdict is not None]
    if compiled and not sizes:
        return (
            f"{config.name} fits {topology.name} by the model or nearly so, but none of the {len(compiled)} ways that "
            f"were tried could be compiled ({compiled[0].refused}); --budget_minutes=0 judges by the model alone"
        )
    return nothing_fits(config, topology, least=min(sizes, default=least), log=log)


def nothing_fits(config: Config, topology: Topology, *, least: float, log: Log) -> str:
    """That nothing does, how near the nearest is, and the smallest slice of that chip that can hold the run.

    Args:
      least: bytes of a device that any way of running it takes, of those compiled if there are any; infinite: there is
        none.
    """
    usable, gib = topology.chip.usable_bytes, 2**30
    near = "no mesh divides"
    if least < math.inf:
        near = f"the least that any way of running it takes is {least / gib:.1f} GiB a device"
    found = smallest_slice(config, topology, log=log)
    if found is None:
        rescue = "no slice that is known can; lower data.sequence_length, or take a chip with more memory"
    elif found.topology is topology:
        rescue = f"with parallel.across_slices={found.across} it does, by the model"
    else:
        rescue = f"the smallest slice that can hold it is {found.topology.name} ({found.topology.devices} devices)"
        if found.across != config.parallel.across_slices:
            rescue += f", with parallel.across_slices={found.across}"
    return (
        f"{config.name} does not fit {topology.name}: {near}, and a program may use {usable / gib:.1f} GiB of a "
        f"{topology.chip.name}; {rescue}"
    )


def smallest_slice(config: Config, topology: Topology, *, log: Log = lambda line: None) -> Slice | None:
    """The smallest slice, or number of nodes, of that chip on which something fits by the model; None: none does.

    One slice of no more devices counts where several were asked for: no mesh has to be shared out over them. The
    several count too, with another axis across them.
    """
    asked = (topology.devices, -topology.slices)
    larger = (other for other in slices_of(topology) if (other.devices, -other.slices) > asked)
    for other in itertools.chain([topology] if topology.slices > 1 else [], larger):
        log(f"does it fit {other.name} ({other.devices} devices)?")
        if across := _crossing(config, other, own=other is not topology):
            return Slice(other, across)
    return None


def _crossing(config: Config, topology: Topology, *, own: bool) -> str:
    """The `parallel.across_slices` with which something fits by the model: the config's where it can be; "": none.

    Args:
      own: whether it can be the config's.
    """
    settings = list(dict.fromkeys((config.parallel.across_slices, "data", "pipeline", "any")))
    freely = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, across_slices="any"))
    first = len(settings)
    for candidate, guess in judged_candidates(freely, topology, leanest):
        if not guess.fits:
            continue
        sizes = candidate.parallel.sizes
        place = next(i for i, across in enumerate(settings) if spreads(sizes, across, slices=topology.slices))
        if (own or place) and place < first and not relations(candidate, devices=topology.devices):
            first = place
            if not first:
                break
    return (*settings, "")[first]


def slices_of(topology: Topology) -> Iterator[Topology]:
    """Slices of the chip in order of size; of GPUs, parts of a node, then full nodes."""
    chip = topology.chip
    if chip.torus_dims:
        names = [f"{chip.name}-{count * chip.named_per_chip}" for count in LARGER]
    else:
        node = chip.devices_per_host or topology.shape[0]
        names = [f"{chip.name}x{count}" for count in (*(few for few in LARGER if few < node), node)]
        names += [f"{chip.name}x{node}x{count}" for count in LARGER[1:]]
    for name in names:
        try:
            yield parse_topology(name, {chip.name: chip})
        except TopologyError:
            continue


def describe(ranked: Ranked, topology: Topology) -> str:
    """A candidate in a line: how it runs, what it takes."""
    parallel, train, gib = ranked.config.parallel, ranked.config.train, 2**30
    mesh = " x ".join(f"{axis} {size}" for axis, size in parallel.sizes.items() if size > 1) or "one device"
    policy = "+".join(train.remat_names) if train.remat == "custom" else train.remat
    how = f"{mesh}, remat {policy}, {train.accumulation} microbatch{'es' if train.accumulation > 1 else ''}"
    if parallel.pipeline > 1:
        how += f", {parallel.pipeline_schedule}" + (
            f" x{parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""
        )
    if ranked.refused:
        return f"{how}: refused ({ranked.refused})"
    room = (topology.chip.usable_bytes - ranked.bytes) / gib
    return f"{how}: {ranked.seconds:.3f} s, {ranked.bytes / gib:.1f} GiB ({room:.1f} GiB free)"


def why(found: Found, topology: Topology) -> str:
    """What the winner has over the one after it, in a sentence."""
    first = found.winner
    if len(found.best) < 2:
        return "it is the only one that fits"
    second = found.best[1]
    if first.verdict and not second.verdict:
        return "it is the only one that was compiled and fits"
    by, mine, others = "by the model it is", first.estimate.time.parts, second.estimate.time.parts
    if first.verdict and second.verdict:
        by, mine, others = "it is", first.verdict.parts, second.verdict.parts
    gains = {part: others.get(part, 0.0) - mine.get(part, 0.0) for part in [*mine, *others]}
    part, gain = max(gains.items(), key=lambda item: item[1], default=("", 0.0))
    lead = second.seconds / first.seconds - 1 if first.seconds else 0.0
    if gain <= 0:
        return f"{by} {lead:.1%} faster than the next, which differs from it in no part of the time"
    return f"{by} {lead:.1%} faster than the next ({describe(second, topology)}), which loses {gain:.3f} s on {part}"
