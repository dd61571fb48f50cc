"""Which conditionals of a compiled pipeline run when: what a stage does in a tick, read off the schedule's table.

A tick of the executor is a chain of conditionals, one for each kind of unit, of which at most one runs; within a unit
the first chunk embeds and the last one has head and loss. A branch is known by the scopes that its code has and the
conditional's own has not. Others of a program, such as those of a layer, are none of these.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from maxlm.config import Config
from maxlm.parallel.pipeline.executor import FIRST, LAST, SCOPES
from maxlm.parallel.pipeline.schedule import Cell, Schedule, Unit, build
from maxlm.plan.hlo import Instruction, Module

_UNITS = {scope: unit for unit, scope in SCOPES.items()}


class Choice(NamedTuple):
    """A conditional of the executor.

    unit: that it chooses, or that it is within.
    chunk: FIRST or LAST of what only that chunk does within a unit; "" where the unit itself is chosen.
    taken, left: the computations that run where it is done, and where not.
    """

    unit: Unit
    chunk: str
    taken: str
    left: str


class Place(NamedTuple):
    """A unit, and whether it is of the model's first or last chunk."""

    unit: Unit
    first: bool
    last: bool

    def does(self, choice: Choice) -> bool:
        """Whether the choice's branch is taken here."""
        chunk = {"": True, FIRST: self.first, LAST: self.last}[choice.chunk]
        return chunk and self.unit is choice.unit


class Part(NamedTuple):
    """In what part of the ticks all stages wait for a place (`slowest`), and an average stage is at it (`average`)."""

    slowest: float
    average: float


def table_of(config: Config) -> Schedule | None:
    """The schedule that a resolved config runs; None for one without a pipeline."""
    parallel = config.parallel
    if parallel.pipeline < 2:
        return None
    return _table(parallel.pipeline_schedule, parallel.pipeline, config.train.accumulation, parallel.virtual_stages)


@functools.lru_cache(maxsize=16)
def _table(name: str, stages: int, microbatches: int, virtual: int) -> Schedule:
    return build(name, stages=stages, microbatches=microbatches, virtual=virtual)


def parts(table: Schedule, seconds: Callable[[Place], float] = lambda place: 0.0) -> dict[Place, Part]:
    """Of every place of the table. A tick lasts as long as its slowest stage.

    Args:
      seconds: that a place takes.
    """
    rows = [[_place(table, stage, cell) for stage, cell in enumerate(row) if cell is not None] for row in table.ticks]
    counts = Counter(place for row in rows for place in row)
    took = {place: seconds(place) for place in counts}
    slowest = Counter(max(row, key=took.__getitem__) for row in rows if row)
    ticks = len(rows)
    return {place: Part(slowest[place] / ticks, count / ticks / table.stages) for place, count in counts.items()}


def _place(table: Schedule, stage: int, cell: Cell) -> Place:
    chunk = table.chunk(stage, cell.virtual)
    return Place(cell.unit, chunk == 0, chunk == table.stages * table.virtual - 1)


def weighted(module: Module, config: Config) -> Module:
    """The module with the shares of the executor's branches for an average stage; itself without a pipeline."""
    table = table_of(config)
    if table is None:
        return module
    done, shares = parts(table), dict[str, float]()
    for choice in choices(module).values():
        taken = sum(part.average for place, part in done.items() if place.does(choice))
        among = sum(part.average for place, part in done.items() if place.unit is choice.unit) if choice.chunk else 1.0
        share = taken / among if among else 0.0
        shares |= {choice.taken: share, choice.left: 1.0 - share}
    return dataclasses.replace(module, shares=shares)


# --- which conditional is which --------------------------------------------------------------------------------------


def choices(module: Module) -> dict[str, Choice]:
    """The executor's conditionals by their names."""
    counts: dict[str, Counter[str]] = {}

    def scopes(computation: str) -> Counter[str]:
        """How many instructions of it, and of those that it calls, are under each scope."""
        if computation not in counts:
            counts[computation] = Counter()
            for instruction in module.computations.get(computation, ()):
                counts[computation].update(_path(instruction))
                for called in instruction.called:
                    counts[computation].update(scopes(called))
        return counts[computation]

    found = {}
    for instruction in itertools.chain.from_iterable(module.computations.values()):
        if instruction.opcode == "conditional" and len(instruction.called) == 2:
            choice = _choice(instruction, *(scopes(branch) for branch in instruction.called))
            if choice is not None:
                found[instruction.name] = choice
    return found


def _choice(conditional: Instruction, one: Counter[str], other: Counter[str]) -> Choice | None:
    own = _path(conditional)
    unit = next((_UNITS[scope] for scope in own if scope in _UNITS), None)
    for scope in (FIRST, LAST) if unit else _UNITS:
        if scope not in own and one[scope] != other[scope]:
            taken, left = conditional.called if one[scope] > other[scope] else reversed(conditional.called)
            return Choice(unit or _UNITS[scope], scope if unit else "", taken, left)
    return None


def _path(instruction: Instruction) -> set[str]:
    return set(instruction.op_name.split("/")).intersection((*_UNITS, FIRST, LAST))
