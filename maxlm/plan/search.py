"""Looks for the fastest way to run a training on given hardware: a model judges all ways, the compiler the best.

Nothing of what the run computes is changed (`plan/candidates.py`). Every candidate is judged by the analytical model.
The config itself, and then those that fit in the order of their predicted times, are compiled until their memory is
laid out, which takes a minute and not several, as long as the time that was given lasts, and ranked by one rule for
what was compiled. With what is left of the time the winner is compiled to the end.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from maxlm.config import Config
from maxlm.errors import UserError
from maxlm.parallel.mesh import spreads
from maxlm.plan.analytic import Estimate, Estimator
from maxlm.plan.candidates import candidates, leanest
from maxlm.plan.compile import OutOfTime
from maxlm.plan.topology import Topology, TopologyError, parse_topology
from maxlm.resolve import relations, resolve

COMPILED = 6  # candidates that fit, at most, besides the config itself
CONSIDERED = 500  # of those that fit, the fastest by the model
SLACK = 0.05  # of the memory: by how much a candidate may seem too large and still be compiled
LARGER = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
SEVERAL = (2, 4, 8)  # of the largest slice that a chip has


class SearchError(UserError):
    """Nothing fits, nothing could be compiled, or there is nothing to search."""


class Verdict(NamedTuple):
    """What the compiler says of a candidate: bytes on a device, seconds of a step, and these by part.

    whole: whether it was compiled to the end; on TPUs its times are the compiler's cycles, and else by FLOPs and bytes,
      so that only verdicts of one kind are compared.
    """

    bytes: float
    seconds: float
    parts: Mapping[str, float]
    whole: bool = False


class Slice(NamedTuple):
    """Hardware that can hold a run. across: the `parallel.across_slices` with which it does."""

    topology: Topology
    across: str


class Judge(Protocol):
    """Compiles a candidate."""

    def __call__(self, config: Config, topology: Topology, *, seconds: float, whole: bool) -> Verdict:
        """`seconds` that it may take, and `whole`, as of `compile.compile_step`."""


Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A candidate.

    own: whether it is the config that was given.
    verdict: None where it was not compiled.
    refused: why the compiler would not have it.
    """

    config: Config
    estimate: Estimate
    own: bool = False
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

    late: whether the time was over while something was left to compile.
    own: the config itself; None where it is no candidate: its mesh is for other hardware, or cannot run.
    ended: the winner compiled to the end; None: it was not.
    """

    best: tuple[Ranked, ...]
    judged: int
    fitting: int
    seconds: float  # that judging took
    late: bool = False
    own: Ranked | None = None
    ended: Verdict | None = None

    @property
    def winner(self) -> Ranked:
        """The first."""
        return self.best[0]

    @property
    def over_own(self) -> float | None:
        """A step of the config itself over the winner's, in figures of one kind; None where that cannot be said."""
        own, winner = self.own, self.winner
        if own is None or own.refused:
            return None
        if own.verdict and winner.verdict:
            return own.verdict.seconds / winner.verdict.seconds
        return own.estimate.time.total / winner.estimate.time.total


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
      judge: None: the model judges alone.
      budget_seconds: for all of it; a compilation is begun only if the longest one so far would have fitted into what
        is left, and ended when nothing is.

    Raises:
      SearchError: nothing fits; the message names the smallest slice of that chip that can hold the run. Or none of
        what should fit could be compiled, or the table does not know the chip's speed or memory.
    """
    _check_known(topology, config.train.precision)
    begun = clock()
    judged, least, own = 0, math.inf, None
    fitting: list[Ranked] = []
    slack = SLACK * topology.chip.usable_bytes if judge else 0.0
    for candidate, guess in judged_candidates(config, topology):
        judged, least = judged + 1, min(least, guess.memory.total)
        ranked = Ranked(candidate, guess, own=candidate == config)
        own = ranked if ranked.own else own
        if guess.room >= -slack:
            fitting.append(ranked)
    took, many = clock() - begun, sum(ranked.estimate.fits for ranked in fitting)
    log(f"{judged:,} ways to run it judged in {took:.1f} s; {many:,} of them fit by the model's memory")
    fitting.sort(key=lambda ranked: (not ranked.estimate.fits, ranked.estimate.time.total))
    first = list(_accepted((ranked for ranked in fitting if ranked.own), topology))
    fitting = list(itertools.islice(_accepted(fitting, topology), CONSIDERED))
    if not fitting:
        raise SearchError(nothing_fits(config, topology, least=least, log=log))
    if judge is None:
        return Found(tuple(fitting[:COMPILED]), judged, many, took, own=own)

    def left() -> float:
        return begun + budget_seconds - clock()

    ways = [*first, *(ranked for ranked in fitting if not ranked.own)]
    tried = _compiled(ways, topology, judge, left=left, log=log)
    good = sorted((done for done in tried.done if _fits(done, topology)), key=lambda done: done.seconds)
    good, ended = _to_the_end(good, topology, judge, longest=tried.longest, left=left, log=log)
    done = [ranked.config for ranked in tried.done]
    rest = [
        ranked
        for ranked in fitting
        if ranked.estimate.fits and ranked.config not in done and not _too_large(ranked, tried.done, topology)
    ]
    best = (good + rest)[:COMPILED]
    if not best:
        raise SearchError(_none_left(config, topology, tried.done, least=least, log=log))
    own = next((ranked for ranked in tried.done if ranked.own), own)
    return Found(tuple(best), judged, many, took, tried.late, own, ended)


class _Tried(NamedTuple):
    """done: what was compiled, in order. longest: seconds that one of them took. late: as of `Found`."""

    done: list[Ranked]
    longest: float
    late: bool


def _compiled(
    ways: Iterable[Ranked], topology: Topology, judge: Judge, *, left: Callable[[], float], log: Log
) -> _Tried:
    """As many as there may be, until their memory is laid out.

    Args:
      left: seconds of the search.
    """
    done: list[Ranked] = []
    longest = 0.0
    for ranked in ways:
        if sum(_fits(one, topology) for one in done if not one.own) >= COMPILED:
            break
        if _tells_little(ranked, done, topology):
            continue
        before = left()
        if done and before < longest:
            return _Tried(done, longest, True)
        try:
            done.append(_compile(ranked, topology, judge, seconds=before))
        except OutOfTime as error:
            log(f"{error}: the time of the search is over")
            return _Tried(done, longest, True)
        took = before - left()
        longest = max(longest, took)
        log(f"compiled in {took:.0f} s: {describe(done[-1], topology)}{' (the config itself)' if ranked.own else ''}")
    return _Tried(done, longest, False)


class _End(NamedTuple):
    """good: candidates without those that do not fit when compiled to the end. verdict: of the first, so compiled."""

    good: list[Ranked]
    verdict: Verdict | None


def _to_the_end(
    good: list[Ranked], topology: Topology, judge: Judge, *, longest: float, left: Callable[[], float], log: Log
) -> _End:
    """Compiles the first to the end, as long as time is left.

    Args:
      good: those that fit as their memory is laid out, the fastest first.
      longest: seconds that laying out took; to the end it takes longer.
    """
    for place, ranked in enumerate(good):
        verdict = ranked.verdict
        if verdict is None or not verdict.whole:
            if left() < longest:
                log("no time is left to compile the winner to the end")
                return _End(good[place:], None)
            try:
                verdict = judge(resolve(ranked.config, devices=topology.devices), topology, seconds=left(), whole=True)
            except UserError as error:
                log(f"the winner could not be compiled to the end: {error}")
                return _End(good[place:], None)
        if verdict.bytes <= topology.chip.usable_bytes:
            return _End(good[place:], verdict)
        log(f"compiled to the end it takes {verdict.bytes / 2**30:.1f} GiB, too many: {describe(ranked, topology)}")
    return _End([], None)


def _check_known(topology: Topology, precision: str) -> None:
    chip = topology.chip
    figures = {
        f"peak in {precision} (flops)": chip.peak(precision),
        "bandwidth of memory (hbm_bandwidth)": chip.hbm_bandwidth,
        "memory (usable_bytes)": chip.usable_bytes,
    }
    if topology.devices_per_slice > 1:
        figures["bandwidth of links (link_bandwidth)"] = chip.link_bandwidth
    if topology.slices > 1:
        figures["bandwidth of the network (network_bandwidth)"] = chip.network_bandwidth
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


def _compile(ranked: Ranked, topology: Topology, judge: Judge, *, seconds: float) -> Ranked:
    try:
        config = resolve(ranked.config, devices=topology.devices)
        return dataclasses.replace(ranked, verdict=judge(config, topology, seconds=seconds, whole=False))
    except OutOfTime:
        raise
    except UserError as error:
        return dataclasses.replace(ranked, refused=str(error))


def _fits(ranked: Ranked, topology: Topology) -> bool:
    return ranked.verdict is not None and ranked.bytes <= topology.chip.usable_bytes


def _tells_little(ranked: Ranked, compiled: list[Ranked], topology: Topology) -> bool:
    """Whether near twins are compiled already: two of its mesh, or one of its mesh and remat.

    One that turned out too large stands for those alone that by the model take as much, and the config itself, which
    nobody says is the fastest of its mesh, for none.
    """
    same = [
        done for done in _twins(ranked, compiled) if not done.own and (done.verdict is None or _fits(done, topology))
    ]
    alike = any(done.config.train.remat == ranked.config.train.remat for done in same)
    return len(same) >= 2 or alike or _too_large(ranked, compiled, topology)


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
        several = f", nor can {SEVERAL[-1]} of the largest together" if topology.chip.torus_dims else ""
        rescue = (
            f"no slice that is known can{several}; lower data.sequence_length, keep moments in bfloat16 "
            "(optim.moments_dtype), or take a chip with more memory"
        )
    elif found.topology is topology:
        rescue = f"with parallel.across_slices={found.across} it does, by the model"
    else:
        several = f"{found.topology.slices} slices, " if topology.chip.torus_dims and found.topology.slices > 1 else ""
        rescue = (
            f"the smallest slice that can hold it is {found.topology.name} ({several}{found.topology.devices} devices)"
        )
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
    """Slices of the chip in order of size, then several of the largest; of GPUs, parts of a node, then full nodes."""
    chip = topology.chip
    if chip.torus_dims:
        names = [f"{chip.name}-{count * chip.named_per_chip}" for count in sorted({*LARGER, chip.slice_chips})]
    else:
        node = chip.devices_per_host or topology.shape[0]
        names = [f"{chip.name}x{count}" for count in (*(few for few in LARGER if few < node), node)]
        names += [f"{chip.name}x{node}x{count}" for count in LARGER[1:]]
    largest = ""
    for name in names:
        try:
            yield parse_topology(name, {chip.name: chip})
        except TopologyError:
            continue
        largest = name
    if chip.torus_dims:
        yield from (parse_topology(f"{count}*{largest}", {chip.name: chip}) for count in SEVERAL)


def describe(ranked: Ranked, topology: Topology) -> str:
    """A candidate in a line: how it runs, what it takes."""
    parallel, train, gib = ranked.config.parallel, ranked.config.train, 2**30
    mesh = " x ".join(f"{axis} {size}" for axis, size in parallel.sizes.items() if size > 1) or "one device"
    how = f"{mesh}, remat {train.remat}, {train.accumulation} microbatch{'es' if train.accumulation > 1 else ''}"
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


def against_own(found: Found, topology: Topology) -> str:
    """What the winner has over the config itself, in a sentence; "" where the config is no candidate."""
    own, over = found.own, found.over_own
    if own is None:
        return ""
    if own.refused:
        return f"the config itself is refused: {own.refused}"
    size = f"{own.bytes / 2**30:.1f} GiB of {topology.chip.usable_bytes / 2**30:.1f}"
    if own.bytes > topology.chip.usable_bytes:
        return f"the config itself does not fit: it takes {size}{'' if own.verdict else ' by the model'}"
    if found.winner.own or over is None:
        alone = own.verdict and not any(ranked.verdict for ranked in found.best if not ranked.own)
        return "the config itself is the winner" + (": nothing else was compiled that fits" if alone else "")
    by = "" if own.verdict and found.winner.verdict else "by the model "
    return f"{by}the winner is {over - 1:.1%} faster than the config itself ({describe(own, topology)})"
