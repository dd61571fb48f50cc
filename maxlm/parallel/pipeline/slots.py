"""Which buffer slot every unit of a schedule reads and writes, so that buffers are as large as the schedule's need.

A stage has four kinds of buffers, each with a slot for as many microbatches as it holds at once at most:

- `inputs`: activations that came from the chunk before, until their forward pass;
- `seeds`: what a backward pass starts from: the gradient that came from the chunk after, or on the last chunk its own
  output, out of which head and loss make it;
- `kept`: what the forward pass leaves for the backward pass, until the weights' part is done;
- `pairs`: what the input's part leaves for the weights' part.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from maxlm.parallel.pipeline.schedule import Schedule, Unit


class Row(NamedTuple):
    """What a stage does in a tick; arrays (ticks, stages) int32, or scalars inside the program.

    A slot that is not used is 0, a store that is not wanted goes to the slot after the last.

    unit, micro, virtual: as of `schedule.Cell`.
    input, seed, kept, pair: slots that the unit reads or writes.
    store_input, store_seed: slots for what the neighbours hand over at the end of the tick.
    store_own: slot for the last chunk's own output, which its backward pass starts from. It needs a word of its own: in
      the tick that makes it, the gradient of another of the stage's chunks may arrive.
    """

    unit: Any
    micro: Any
    virtual: Any
    input: Any
    seed: Any
    kept: Any
    pair: Any
    store_input: Any
    store_seed: Any
    store_own: Any


class Slots(NamedTuple):
    """The rows, and how many slots each buffer has."""

    rows: Row
    inputs: int
    seeds: int
    kept: int
    pairs: int


def assign(schedule: Schedule) -> Slots:
    """Gives every value the lowest slot that is free from the tick that makes it to the last that reads it."""
    done = schedule.finish()
    chunks = schedule.stages * schedule.virtual
    shape = (len(schedule.ticks), schedule.stages)
    fields = {name: np.zeros(shape, np.int32) for name in Row._fields}
    spans: dict[str, list[_Span]] = {"input": [], "seed": [], "kept": [], "pair": []}
    arriving = {"input": ("input", "input"), "seed": ("seed", "own")}  # from a neighbour, or from the stage itself
    for tick, stage, cell in schedule.cells():
        chunk, micro = schedule.chunk(stage, cell.virtual), cell.micro
        for name, value in zip(Row._fields, cell, strict=False):
            fields[name][tick, stage] = value
        if cell.unit is Unit.FORWARD:
            last = done[Unit.WEIGHT, micro, chunk]
            spans["kept"].append(_Span(stage, tick, last, (done[Unit.INPUT, micro, chunk],)))
            if chunk:
                spans["input"].append(_Span(stage, done[Unit.FORWARD, micro, chunk - 1], tick, ()))
        elif cell.unit in (Unit.INPUT, Unit.BACKWARD):
            own = chunk + 1 == chunks
            before = (Unit.FORWARD, micro, chunk) if own else (Unit.INPUT, micro, chunk + 1)
            spans["seed"].append(_Span(stage, done[before], tick, (), own))
            if cell.unit is Unit.INPUT:
                spans["pair"].append(_Span(stage, tick, done[Unit.WEIGHT, micro, chunk], ()))
    counts = {}
    for name, found in spans.items():
        # A value that arrives at the end of a tick may take the slot that the same tick has read.
        arrives = name in arriving
        counts[name] = 0
        stores = {word: np.full(shape, -1, np.int32) for word in arriving.get(name, ())}
        for span, slot in _colour(found, shared=arrives):
            counts[name] = max(counts[name], slot + 1)
            for tick in (span.end, *span.between, *(() if arrives else (span.start,))):
                fields[name][tick, span.stage] = slot
            if arrives:
                store = stores[arriving[name][span.own]]
                assert store[span.start, span.stage] < 0, "two values of one kind reach a stage in one tick"
                store[span.start, span.stage] = slot
        for word, store in stores.items():
            fields[f"store_{word}"] = np.where(store < 0, counts[name], store)
    return Slots(Row(**fields), counts["input"], counts["seed"], counts["kept"], counts["pair"])


class _Span(NamedTuple):
    """A value lives on a stage from the tick `start` to the tick `end`, and is read in `between` as well.

    own: the stage itself made it, where else a neighbour hands it over.
    """

    stage: int
    start: int
    end: int
    between: tuple[int, ...]
    own: bool = False


def _colour(spans: Iterable[_Span], *, shared: bool) -> Iterable[tuple[_Span, int]]:
    """Each span with the lowest slot of its stage that is free; `shared`: one may start where another ends."""
    free: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    busy: dict[int, list[tuple[int, int]]] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        ends, slots = busy.setdefault(span.stage, []), free.setdefault(span.stage, [])
        while ends and ends[0][0] < span.start + shared:
            heapq.heappush(slots, heapq.heappop(ends)[1])
        if slots:
            slot = heapq.heappop(slots)
        else:
            slot = used[span.stage] = used.get(span.stage, -1) + 1
        heapq.heappush(ends, (span.end, slot))
        yield span, slot
