"""Pipeline schedules as data: a table of ticks x stages that says which unit of work a stage does when.

A tick is one round in which every stage does at most one unit and then hands on what it made, so a unit can use what
other stages made in earlier ticks only. A model that is cut into stages x virtual stages chunks has chunk g on stage
g % stages as its virtual stage g // stages.

- GPipe (Huang et al. 2019): all microbatches forwards, then all backwards, each backward pass whole.
- 1F1B (Narayanan et al. 2019, PipeDream-Flush): a backward pass as soon as there is one, in two units: the gradient of
  the input goes to the stage before while this stage does its weights.
- Interleaved 1F1B (Narayanan et al. 2021): several chunks a stage, so that filling and draining take less.
- Zero bubble (Qi et al. 2023, ZB-H1): the weights' part waits until a stage would otherwise be idle.

`check` is the judge of a table, whoever made it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Unit(enum.IntEnum):
    """What a stage does in a tick. A backward pass is BACKWARD, or INPUT and later WEIGHT.

    Where the remat policy asks for it, BACKWARD and INPUT first compute again what the forward pass did not keep.
    """

    IDLE = 0
    FORWARD = 1
    INPUT = 2  # the gradient of the chunk's input
    WEIGHT = 3  # the gradients of its weights
    BACKWARD = 4  # both at once


COSTS: Mapping[Unit, float] = {
    Unit.IDLE: 0.0,
    Unit.FORWARD: 1.0,
    Unit.INPUT: 1.0,
    Unit.WEIGHT: 1.0,
    Unit.BACKWARD: 2.0,
}
"""Time of a unit over a whole stage, in forward passes: a backward pass is two products for each of the forward's."""


class Cell(NamedTuple):
    """A unit of one microbatch on one of a stage's virtual stages."""

    unit: Unit
    micro: int
    virtual: int = 0


class Report(NamedTuple):
    """makespan: in forward passes of a whole stage, a tick lasting as long as its slowest stage.
    bubble: the share of the makespan in which a stage has nothing to do, on average.
    idle: idle ticks of each stage.
    held: most (microbatch, virtual stage) pairs of each stage that were forward and whose backward was not finished.
    """

    makespan: float
    bubble: float
    idle: tuple[int, ...]
    held: tuple[int, ...]


class ScheduleError(ValueError):
    """A table in which a unit is missing, stands twice, or comes before what it needs."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`ticks[t][s]` is what stage s does in tick t, None for nothing."""

    name: str
    stages: int
    microbatches: int
    virtual: int
    ticks: tuple[tuple[Cell | None, ...], ...]

    def cells(self) -> Iterator[tuple[int, int, Cell]]:
        """(tick, stage, cell) of all that is done, in the order of ticks."""
        for tick, row in enumerate(self.ticks):
            for stage, cell in enumerate(row):
                if cell is not None:
                    yield tick, stage, cell

    def chunk(self, stage: int, virtual: int) -> int:
        """Which part of the model, in its order, a virtual stage is."""
        return virtual * self.stages + stage

    def finish(self) -> dict[tuple[Unit, int, int], int]:
        """The tick of each (unit, microbatch, chunk); BACKWARD counts as INPUT and as WEIGHT as well."""
        done: dict[tuple[Unit, int, int], int] = {}
        for tick, stage, cell in self.cells():
            units = [Unit.INPUT, Unit.WEIGHT] if cell.unit is Unit.BACKWARD else [cell.unit]
            for unit in units:
                key = (unit, cell.micro, self.chunk(stage, cell.virtual))
                if key in done:
                    raise ScheduleError(f"{self.name}: {_words(key)} stands in the ticks {done[key]} and {tick}")
                done[key] = tick
        return done


def _words(key: tuple[Unit, int, int]) -> str:
    unit, micro, chunk = key
    return f"{unit.name.lower()} of microbatch {micro} on chunk {chunk}"


def needs(unit: Unit, micro: int, chunk: int, chunks: int) -> list[tuple[Unit, int, int]]:
    """What has to be finished in an earlier tick."""
    match unit:
        case Unit.FORWARD:
            return [(Unit.FORWARD, micro, chunk - 1)] if chunk else []
        case Unit.INPUT | Unit.BACKWARD:
            after = [(Unit.INPUT, micro, chunk + 1)] if chunk + 1 < chunks else []
            return [(Unit.FORWARD, micro, chunk), *after]
        case _:
            return [(Unit.INPUT, micro, chunk)]


def check(schedule: Schedule) -> None:
    """Every unit stands once, after all it needs; the weights' parts of a chunk come in the order of microbatches.

    That order makes the sums of gradients, and so every bit of them, the same for all schedules.

    Raises:
      ScheduleError: naming the first unit that breaks a rule.
    """
    chunks, done = schedule.stages * schedule.virtual, schedule.finish()
    expected = {
        (unit, micro, chunk)
        for unit in (Unit.FORWARD, Unit.INPUT, Unit.WEIGHT)
        for micro in range(schedule.microbatches)
        for chunk in range(chunks)
    }
    if missing := expected - set(done):
        raise ScheduleError(f"{schedule.name}: {_words(min(missing))} is missing")
    if stray := set(done) - expected:
        raise ScheduleError(f"{schedule.name}: {_words(min(stray))} is not part of the model or the batch")
    for tick, stage, cell in schedule.cells():
        chunk = schedule.chunk(stage, cell.virtual)
        for key in needs(cell.unit, cell.micro, chunk, chunks):
            if done[key] >= tick:
                this = _words((cell.unit, cell.micro, chunk))
                raise ScheduleError(f"{schedule.name}: {this} is in tick {tick}, but {_words(key)} in tick {done[key]}")
        before = (Unit.WEIGHT, cell.micro - 1, chunk)
        if cell.unit in (Unit.WEIGHT, Unit.BACKWARD) and cell.micro and done[before] >= tick:
            raise ScheduleError(f"{schedule.name}: {_words(before)} comes after that of microbatch {cell.micro}")


def report(schedule: Schedule, costs: Mapping[Unit, float] = COSTS) -> Report:
    """Checks a table and adds it up.

    Args:
      costs: time of a unit over a whole stage; a virtual stage takes its share of that.

    Raises:
      ScheduleError: as `check`.
    """
    check(schedule)
    makespan, work = 0.0, 0.0
    held, most = np.zeros(schedule.stages, int), np.zeros(schedule.stages, int)
    for row in schedule.ticks:
        times = [costs[cell.unit] / schedule.virtual if cell else 0.0 for cell in row]
        makespan += max(times)
        work += sum(times)
        held += [cell is not None and cell.unit is Unit.FORWARD for cell in row]
        most = np.maximum(most, held)
        held -= [cell is not None and cell.unit in (Unit.WEIGHT, Unit.BACKWARD) for cell in row]
    columns = zip(*schedule.ticks, strict=True)
    idle = tuple(column.count(None) for column in columns)
    return Report(makespan, 1 - work / (makespan * schedule.stages), idle, tuple(map(int, most)))


def build(name: str, *, stages: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The table of a schedule: gpipe, 1f1b, interleaved or zero_bubble.

    Raises:
      ScheduleError: the name is unknown, or the numbers do not suit the schedule.
    """
    if name not in _BUILDERS:
        raise ScheduleError(f"the pipeline schedule {name!r} is not known; known: {', '.join(_BUILDERS)}")
    if name == "interleaved" and microbatches % stages:
        raise ScheduleError(
            f"interleaved takes microbatches in groups of {stages} stages, which do not divide {microbatches}"
        )
    if name != "interleaved" and virtual != 1:
        raise ScheduleError(f"{name} has one virtual stage a stage, not {virtual}; take interleaved")
    schedule = Schedule(name, stages, microbatches, virtual, _BUILDERS[name](stages, microbatches, virtual))
    check(schedule)
    return schedule


Ticks = tuple[tuple[Cell | None, ...], ...]


def _gpipe(stages: int, microbatches: int, virtual: int) -> Ticks:
    order = [Cell(unit, m) for unit in (Unit.FORWARD, Unit.BACKWARD) for m in range(microbatches)]
    return _in_order([order] * stages, virtual)


def _one_forward_one_backward(stages: int, microbatches: int, virtual: int) -> Ticks:
    """A stage runs ahead by as many microbatches as there are stages after it, times two and more when interleaved."""
    group = stages * virtual

    def forward(k: int) -> Cell:
        return Cell(Unit.FORWARD, k // group * stages + k % stages, k % group // stages)

    def backward(k: int) -> list[Cell]:
        cell = forward(k)
        return [cell._replace(unit=unit, virtual=virtual - 1 - cell.virtual) for unit in (Unit.INPUT, Unit.WEIGHT)]

    total, orders = microbatches * virtual, []
    for stage in range(stages):
        ahead = (stages - stage - 1) * (1 if virtual == 1 else 2) + (virtual - 1) * stages
        ahead = min(ahead, total)
        order = [forward(k) for k in range(ahead)]
        for k in range(total):
            order += [forward(ahead + k)] if ahead + k < total else []
            order += backward(k)
        orders.append(order)
    return _in_order(orders, virtual)


def _in_order(orders: Sequence[Sequence[Cell]], virtual: int) -> Ticks:
    """Every stage does its units in its order, each as soon as what it needs is there."""
    stages, done, at = len(orders), dict[tuple[Unit, int, int], int](), [0] * len(orders)
    ticks: list[tuple[Cell | None, ...]] = []
    while any(i < len(order) for i, order in zip(at, orders, strict=True)):
        row: list[Cell | None] = []
        for stage, order in enumerate(orders):
            cell = order[at[stage]] if at[stage] < len(order) else None
            row.append(cell if cell and _ready(cell, stage, stages, virtual, done, len(ticks)) else None)
        if not any(row):
            raise ScheduleError(f"the orders wait for each other from tick {len(ticks)} on")
        for stage, cell in enumerate(row):
            at[stage] += cell is not None
        _finish(row, done, len(ticks))
        ticks.append(tuple(row))
    return tuple(ticks)


def _zero_bubble(stages: int, microbatches: int, virtual: int) -> Ticks:
    """Each tick a stage goes forward if it may, else takes an input's gradient, and weights when neither is there.

    It may go ahead of its backward passes by as many microbatches as 1F1B does, and holds no more than `stages` in
    all, 1F1B's first stage: ZB-H1's bounds on memory. From as many microbatches as stages on, that takes
    3 microbatches + stages - 1 ticks: no stage waits but for the first microbatch to arrive.
    """
    del virtual
    done = dict[tuple[Unit, int, int], int]()
    counts = [{unit: 0 for unit in (Unit.FORWARD, Unit.INPUT, Unit.WEIGHT)} for _ in range(stages)]
    ticks: list[tuple[Cell | None, ...]] = []
    while any(count[Unit.WEIGHT] < microbatches for count in counts):
        row: list[Cell | None] = []
        for stage, count in enumerate(counts):
            forward = count[Unit.FORWARD]
            full = forward - count[Unit.INPUT] >= stages - stage or forward - count[Unit.WEIGHT] >= stages
            candidates = [Cell(unit, m) for unit, m in count.items() if m < microbatches]
            ready = [
                cell
                for cell in candidates
                if _ready(cell, stage, stages, 1, done, len(ticks)) and not (full and cell.unit is Unit.FORWARD)
            ]
            row.append(ready[0] if ready else None)
        for cell, count in zip(row, counts, strict=True):
            if cell:
                count[cell.unit] += 1
        _finish(row, done, len(ticks))
        ticks.append(tuple(row))
    return tuple(ticks)


def _ready(cell: Cell, stage: int, stages: int, virtual: int, done: Mapping, tick: int) -> bool:
    chunk = cell.virtual * stages + stage
    return all(done.get(key, tick) < tick for key in needs(cell.unit, cell.micro, chunk, stages * virtual))


def _finish(row: Sequence[Cell | None], done: dict[tuple[Unit, int, int], int], tick: int) -> None:
    for stage, cell in enumerate(row):
        if cell:
            unit = Unit.INPUT if cell.unit is Unit.BACKWARD else cell.unit
            done[unit, cell.micro, cell.virtual * len(row) + stage] = tick


_BUILDERS = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _one_forward_one_backward,
    "zero_bubble": _zero_bubble,
}

NAMES = tuple(_BUILDERS)


def draw(schedule: Schedule) -> str:
    """The table as text, a line a stage: F3 is forward of microbatch 3, I and W the parts of backward, B both.

    With several virtual stages a letter follows the microbatch: F3b is on the second.
    """
    letters = {Unit.FORWARD: "F", Unit.INPUT: "I", Unit.WEIGHT: "W", Unit.BACKWARD: "B"}

    def word(cell: Cell | None) -> str:
        if cell is None:
            return "."
        return f"{letters[cell.unit]}{cell.micro}" + (chr(ord("a") + cell.virtual) if schedule.virtual > 1 else "")

    found = report(schedule)
    width = max(len(word(cell)) for _, _, cell in schedule.cells())
    lines = [
        f"{schedule.name}: {schedule.stages} stages"
        + (f" of {schedule.virtual} virtual stages" if schedule.virtual > 1 else "")
        + f", {schedule.microbatches} microbatches: {len(schedule.ticks)} ticks, makespan {found.makespan:g}, "
        f"bubble {found.bubble:.1%}, held at most {', '.join(map(str, found.held))}"
    ]
    for stage, column in enumerate(zip(*schedule.ticks, strict=True)):
        lines.append(f"{stage:>3} | " + " ".join(f"{word(cell):<{width}}" for cell in column).rstrip())
    return "\n".join(lines)
