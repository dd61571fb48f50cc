"""Schedules as tables: their makespans, what they hold, and that a broken table is refused."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maxlm.parallel.pipeline.order import rounds
from maxlm.parallel.pipeline.schedule import Cell, Schedule, ScheduleError, Unit, build, check, draw, report
from maxlm.parallel.pipeline.slots import assign

NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
SIZES = [(2, 2), (2, 4), (4, 4), (4, 8), (3, 9), (8, 16)]


def table(name: str, stages: int, microbatches: int) -> Schedule:
    return build(name, stages=stages, microbatches=microbatches, virtual=2 if name == "interleaved" else 1)


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_lockstep_makespans_are_in_the_order_of_the_literature(stages, microbatches):
    found = {name: report(table(name, stages, microbatches)) for name in NAMES}
    makespan = {name: one.makespan for name, one in found.items()}
    assert makespan["zero_bubble"] < makespan["1f1b"] < makespan["gpipe"]
    assert makespan["interleaved"] < makespan["1f1b"]
    # Narayanan et al. 2021: GPipe's and whole 1F1B's time is (A + p - 1)(F + B); nothing beats the work itself.
    assert makespan["gpipe"] == 3 * (microbatches + stages - 1)
    assert makespan["1f1b"] == 3 * microbatches + 2 * (stages - 1)
    assert makespan["zero_bubble"] == 3 * microbatches + stages - 1  # the last stage starts so late, and never waits
    for name, one in found.items():
        assert one.bubble == pytest.approx(1 - 3 * microbatches / makespan[name])


def test_figures_of_eight_stages():
    found = {name: report(table(name, 8, 16)) for name in NAMES}
    assert [found[name].makespan for name in NAMES] == [69, 62, 55, 55]
    assert found["gpipe"].held == (16,) * 8
    assert found["1f1b"].held == (8, 7, 6, 5, 4, 3, 2, 1)  # as many as there are stages from here on
    assert max(found["zero_bubble"].held) == 8  # ZB-H1: no more than 1F1B's first stage
    assert found["1f1b"].idle == (14,) * 8


@pytest.mark.parametrize(("stages", "microbatches"), [*SIZES, (8, 8), (8, 32), (6, 24), (16, 32)])
@pytest.mark.parametrize("name", NAMES)
def test_slots_are_as_many_as_held_and_no_value_is_overwritten_while_it_lives(name, stages, microbatches):
    """Plays the table with numbered values in the slots: every unit has to find the value of its own microbatch.

    Interleaved on 8 stages, 16 microbatches: the last chunk ends in ticks in which another chunk's gradient comes.
    """
    schedule = table(name, stages, microbatches)
    slots = assign(schedule)
    assert slots.kept == max(report(schedule).held)
    if name == "1f1b":
        assert slots.pairs == 1 and assign(build(name, stages=4, microbatches=64)).kept == 4
    chunks = schedule.stages * schedule.virtual
    for stage in range(schedule.stages):
        held: dict = {}
        for tick, row in enumerate(schedule.ticks):
            at = type(slots.rows)(*(field[tick, stage] for field in slots.rows))
            cell = row[stage]
            if cell is not None:
                chunk = schedule.chunk(stage, cell.virtual)
                key = (cell.micro, cell.virtual)
                if cell.unit is Unit.FORWARD:
                    assert chunk == 0 or held["input", at.input] == (cell.micro, chunk - 1)
                    held["kept", at.kept] = key
                else:
                    assert held["kept", at.kept] == key
                if cell.unit in (Unit.INPUT, Unit.BACKWARD):
                    assert held["seed", at.seed] == (cell.micro, min(chunk + 1, chunks - 1))
                if cell.unit is Unit.INPUT:
                    held["pair", at.pair] = key
                if cell.unit is Unit.WEIGHT:
                    assert held["pair", at.pair] == key
            before, after = row[(stage - 1) % stages], row[(stage + 1) % stages]
            if at.store_input < slots.inputs:
                assert before is not None and before.unit is Unit.FORWARD
                held["input", at.store_input] = (before.micro, schedule.chunk((stage - 1) % stages, before.virtual))
            if at.store_seed < slots.seeds:
                assert after is not None and after.unit in (Unit.INPUT, Unit.BACKWARD)
                held["seed", at.store_seed] = (after.micro, schedule.chunk((stage + 1) % stages, after.virtual))
            if at.store_own < slots.seeds:
                assert cell is not None and cell.unit is Unit.FORWARD and chunk == chunks - 1
                held["seed", at.store_own] = (cell.micro, chunk)


def without(schedule: Schedule, unwanted: Cell, stage: int) -> Schedule:
    ticks = [list(row) for row in schedule.ticks]
    for row in ticks:
        row[stage] = None if row[stage] == unwanted else row[stage]
    return dataclasses.replace(schedule, ticks=tuple(map(tuple, ticks)))


def test_a_broken_table_is_refused():
    schedule = table("zero_bubble", 4, 8)
    with pytest.raises(ScheduleError, match="weight of microbatch 3 on chunk 1 is missing"):
        check(without(schedule, Cell(Unit.WEIGHT, 3), 1))
    with pytest.raises(ScheduleError, match="weight of microbatch 7 on chunk 0 is in tick 0, but input of"):
        check(dataclasses.replace(schedule, ticks=schedule.ticks[::-1]))
    with pytest.raises(ScheduleError, match="stands in the ticks"):
        check(dataclasses.replace(schedule, ticks=schedule.ticks * 2))
    late = without(table("1f1b", 1, 2), Cell(Unit.WEIGHT, 0), 0)
    with pytest.raises(ScheduleError, match="weight of microbatch 0 on chunk 0 comes after that of microbatch 1"):
        check(dataclasses.replace(late, ticks=(*late.ticks, (Cell(Unit.WEIGHT, 0),))))


def test_numbers_that_do_not_suit_a_schedule():
    with pytest.raises(ScheduleError, match="known: gpipe, 1f1b"):
        build("2f2b", stages=2, microbatches=2)
    with pytest.raises(ScheduleError, match="groups of 4 stages, which do not divide 6"):
        build("interleaved", stages=4, microbatches=6, virtual=2)
    with pytest.raises(ScheduleError, match="take interleaved"):
        build("gpipe", stages=4, microbatches=6, virtual=2)


@pytest.mark.parametrize(("stages", "virtual"), [(2, 2), (4, 2), (4, 3), (3, 2), (2, 5), (8, 4)])
def test_exchange_brings_every_chunk_to_its_stage(stages, virtual):
    found = np.full((stages, virtual), -1)
    for turn in rounds(stages, virtual):
        assert sorted(turn.goes) == list(range(stages))  # a permutation: every stage sends and gets one
        for source in range(stages):
            found[turn.goes[source], turn.put[turn.goes[source]]] = source * virtual + turn.take[source]
    assert (found == np.arange(virtual) * stages + np.arange(stages)[:, None]).all()


def test_the_drawing_and_its_tool():
    drawn = draw(table("1f1b", 2, 2))
    assert drawn.splitlines() == [
        "1f1b: 2 stages, 2 microbatches: 8 ticks, makespan 8, bubble 25.0%, held at most 2, 1",
        "  0 | F0 F1 .  I0 W0 .  I1 W1",
        "  1 | .  F0 I0 W0 F1 I1 W1 .",
    ]
    assert "F1b" in draw(table("interleaved", 2, 2))
    tool = Path(__file__).parents[2] / "tools" / "pipeline_schedule.py"
    out = subprocess.run(
        [sys.executable, tool, "--schedule=1f1b", "--stages=2", "--microbatches=2"], capture_output=True, text=True
    )
    assert out.stdout.strip() == drawn


def test_a_schedule_that_does_not_suit_hides_no_other():
    tool = Path(__file__).parents[2] / "tools" / "pipeline_schedule.py"
    command = [sys.executable, tool, "--stages=4", "--microbatches=6"]
    everything = subprocess.run(command, capture_output=True, text=True)
    assert everything.returncode == 0
    for name in NAMES:
        assert re.search(rf"^{'error: interleaved' if name == 'interleaved' else name + ':'}", everything.stdout, re.M)
    one = subprocess.run([*command, "--schedule=interleaved"], capture_output=True, text=True)
    assert one.returncode == 1 and one.stderr.startswith("error: interleaved")
