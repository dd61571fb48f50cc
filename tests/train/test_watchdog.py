"""The watchdog: what is late, what is written down, and when the run is ended."""

import contextlib
import threading
import time
import types

import pytest

from maxlm.train import loop
from maxlm.train.goodput import Ledger
from maxlm.train.watchdog import FOLDER, LONGEST, Watchdog


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def watched(tmp_path, *, process=0, steps=10, seconds=1.0, times=10.0, least=4.0):
    """A watchdog after some steps of one length, with the reasons that it gave for an end."""
    clock, reasons = Time(), []
    watchdog = Watchdog(times, least, folder=tmp_path, process=process, stuck=reasons.append, clock=clock)
    for step in range(steps + 1):
        watchdog.completed(step)
        clock.now += seconds
    watchdog.completed(steps)
    return watchdog, clock, reasons


def stacks(tmp_path):
    return sorted(path.name for path in (tmp_path / FOLDER).glob("*"))


def test_a_late_step_has_its_stacks_written_once_and_a_hanging_one_ends_the_run(tmp_path, capfd):
    watchdog, clock, reasons = watched(tmp_path)
    clock.now += 9.9
    watchdog.check()
    assert not stacks(tmp_path)
    clock.now += 0.2
    watchdog.check()
    assert stacks(tmp_path) == ["step-11-process-0.txt"] and not reasons
    assert "step 11 has not ended after 10 s (usual are 1 s)" in capfd.readouterr().err
    clock.now += 9.0
    watchdog.check()
    assert capfd.readouterr().err == "" and not reasons
    clock.now += 1.0
    watchdog.check()
    assert len(reasons) == 1 and "step 11 has not ended after 20 s" in reasons[0]
    watchdog.completed(11)
    watchdog.check()
    assert len(reasons) == 1
    clock.now += 11
    watchdog.check()
    assert stacks(tmp_path) == ["step-11-process-0.txt", "step-12-process-0.txt"]


def test_short_steps_have_a_floor_and_a_few_steps_say_nothing(tmp_path):
    watchdog, clock, reasons = watched(tmp_path, seconds=0.1)
    assert watchdog.limit == 4.0
    watchdog, clock, reasons = watched(tmp_path, steps=1)
    clock.now += 1000
    watchdog.check()
    assert watchdog.limit == LONGEST and not reasons and not stacks(tmp_path)


def test_what_is_no_step_has_a_limit_too(tmp_path, capfd):
    """A restore, an evaluation or a save that hangs, and a first step; what makes progress is not late."""
    for begin in ("start", "first step", "off", "after the steps"):
        folder = tmp_path / begin
        watchdog, clock, reasons = watched(folder, steps=10 if begin in ("off", "after the steps") else 0)
        with contextlib.ExitStack() as inside:
            if begin == "start":
                watchdog = Watchdog(10.0, 4.0, folder=folder, process=0, stuck=reasons.append, clock=clock)
                inside.enter_context(watchdog)
            elif begin == "off":
                inside.enter_context(watchdog.between())
            elif begin == "after the steps":
                with watchdog.steps():
                    watchdog.completed(10)
            for _ in range(3):
                if begin != "first step":
                    watchdog.alive()
                    clock.now += LONGEST - 1
                    watchdog.check()
            assert not stacks(folder) and not reasons, begin
            watchdog.alive() if begin != "first step" else watchdog.completed(0)
            clock.now += LONGEST + 1
            watchdog.check()
            assert len(stacks(folder)) == 1 and not reasons, begin
            clock.now += LONGEST
            watchdog.check()
            expected = (
                "step 1 has not ended" if begin == "first step" else f"what follows step {watchdog._step} has not"
            )
            assert len(reasons) == 1 and expected in reasons[0] and expected in capfd.readouterr().err, reasons
        watchdog.completed(watchdog._step)
        clock.now += 3.9
        watchdog.check()
        assert len(reasons) == 1


def test_who_waits_for_a_bucket_that_gives_is_not_late_and_who_does_not_wait_may_be(tmp_path):
    watchdog, clock, reasons = watched(tmp_path, steps=0)
    goodput = Ledger(None, age=0.0)
    goodput.settle("step")
    run = types.SimpleNamespace(goodput=goodput, sentries=types.SimpleNamespace(watchdog=watchdog))
    with goodput.bucket("data_wait"):
        for _ in range(4):
            clock.now += LONGEST - 1
            loop.Run.data_came_on(run)
            watchdog.check()
    assert not stacks(tmp_path) and not reasons
    for _ in range(4):  # shards come in the background, for the proof, say, while a step hangs
        clock.now += LONGEST - 1
        loop.Run.data_came_on(run)
        watchdog.check()
    assert stacks(tmp_path) and reasons


def test_nothing_is_watched_that_need_not_be(tmp_path):
    watchdog, clock, reasons = watched(tmp_path, times=0.0, least=0.0)
    with watchdog:
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_one_long_step_does_not_move_the_limit_and_pauses_do_not_count(tmp_path):
    watchdog, clock, reasons = watched(tmp_path)
    clock.now += 9
    watchdog.completed(11)
    assert watchdog.limit == 10
    with watchdog.between():
        clock.now += 1000
        watchdog.check()
    assert watchdog.limit == 10
    clock.now += 5
    watchdog.check()
    assert not stacks(tmp_path) and not reasons


def test_process_0_speaks_before_the_others(tmp_path):
    watchdog, clock, reasons = watched(tmp_path, process=3)
    clock.now += 25
    watchdog.check()
    assert not reasons
    clock.now += 6
    watchdog.check()
    assert len(reasons) == 1 and stacks(tmp_path) == ["step-11-process-3.txt"]


@pytest.mark.parametrize(("times", "least"), [(0.0, 0.0), (2.0, 0.2), (2.0, 0.01)])
def test_the_thread_finds_where_the_loop_hangs(tmp_path, times, least):
    reasons = []

    def here_it_hangs():
        deadline = time.monotonic() + (10 if times else 0.5)
        while not reasons and time.monotonic() < deadline:
            time.sleep(0.02)

    with Watchdog(times, least, folder=tmp_path, process=1, stuck=reasons.append) as watchdog, watchdog.steps():
        for step in range(5):
            watchdog.completed(step)
            time.sleep(0.01)
        here_it_hangs()
    assert bool(reasons) == bool(times)
    written = [path.read_text() for path in (tmp_path / FOLDER).glob("step-5-process-1.txt")]
    assert [("here_it_hangs" in text, "step 5 has not ended" in text) for text in written] == [(True, True)] * bool(
        times
    )
