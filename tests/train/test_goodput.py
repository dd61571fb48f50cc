"""Every second belongs to one bucket, in one process and over many that were killed."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.train.goodput import BUCKETS, FILE_NAME, Ledger, process_age

ENTERABLE = [name for name in BUCKETS if name != "lost"]


class Clock:
    """Time that moves only when told to; serves as both clocks."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


def ledger(workdir, clock, *, age=0.0):
    return Ledger(workdir, age=age, clock=clock, now=clock, heartbeat_seconds=0)


def test_inner_buckets_stop_outer_ones(tmp_path):
    clock = Clock()
    with ledger(tmp_path, clock, age=2.0) as account:
        clock.tick(1)
        with account.bucket("compile"):
            clock.tick(10)
        account.settle("step")
        clock.tick(100)
        with account.bucket("evaluation"):
            clock.tick(5)
            with account.bucket("data_wait"):
                clock.tick(0.5)
            clock.tick(5)
        clock.tick(100)
        summary = account.summary()
    expected = {"start": 3.0, "compile": 10.0, "step": 200.0, "evaluation": 10.0, "data_wait": 0.5}
    assert summary.seconds == {name: expected.get(name, 0.0) for name in BUCKETS}
    assert summary.wall == 223.5
    assert summary.fractions["step"] == pytest.approx(200 / 223.5)
    assert (summary.down, summary.processes) == (0.0, 1)


def test_an_exception_closes_its_bucket(tmp_path):
    clock = Clock()
    account = ledger(tmp_path, clock)
    with pytest.raises(KeyError), account.bucket("restore"):
        clock.tick(1)
        raise KeyError
    clock.tick(2)
    assert account.summary().seconds["restore"] == 1
    assert account.summary().seconds["start"] == 2


@pytest.mark.parametrize("name", ["lost", "Step", ""])
def test_unknown_buckets_are_refused(tmp_path, name):
    account = ledger(tmp_path, Clock())
    for enter in (account.settle, lambda bucket: account.bucket(bucket).__enter__()):
        with pytest.raises(ValueError, match="is no bucket; time goes to one of start, compile"):
            enter(name)


actions = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "settle", "tick", "checkpoint", "die", "leave"]),
        st.sampled_from(ENTERABLE),
        st.floats(0.0, 1e4),
    ),
    max_size=60,
)


@settings(deadline=None, database=None, max_examples=60)
@given(actions, st.integers(0, 3))
def test_the_sum_is_the_wall_clock_whatever_happens(tmp_path_factory, script, back):
    """Any sequence of blocks, kills and restarts: buckets and down time together are the time since the beginning."""
    workdir, clock = tmp_path_factory.mktemp("run"), Clock()
    account, blocks, step, saved, begun = ledger(workdir, clock), [], 0, [0], clock.now
    for action, name, seconds in script:
        clock.tick(seconds)
        if action == "open":
            blocks.append(account.bucket(name))
            blocks[-1].__enter__()
        elif action == "close" and blocks:
            blocks.pop().__exit__(None, None, None)
        elif action == "settle":
            account.settle(name)
        elif action == "checkpoint":
            step += 1
            account.checkpoint(step)
            saved.append(step)
        elif action in ("die", "leave"):
            if action == "leave":
                account.close()
            clock.tick(seconds)
            account, blocks = ledger(workdir, clock), []
            step = saved[max(len(saved) - 1 - back, 0)]
            saved = [s for s in saved if s <= step]
            account.restored(step)
    summary = account.summary()
    assert sum(summary.seconds.values()) == pytest.approx(summary.wall, rel=1e-12)
    assert summary.wall + summary.down == pytest.approx(clock.now - begun, rel=1e-9, abs=1e-6)
    assert all(seconds >= 0 for seconds in summary.seconds.values())


def test_steps_after_the_restored_checkpoint_are_lost(tmp_path):
    clock = Clock()
    first = ledger(tmp_path, clock)
    first.restored(0)
    first.settle("step")
    clock.tick(30)
    with first.bucket("checkpoint_stall"):
        clock.tick(1)
    first.checkpoint(10)
    clock.tick(20)
    with first.bucket("evaluation"):
        clock.tick(4)
    first.checkpoint(20)  # never committed, say
    clock.tick(7)
    with first.bucket("compile"):  # of a new phase; not work on steps
        clock.tick(2)
    clock.tick(1)
    first.checkpoint(25)
    # Killed here. The clock goes on.
    clock.tick(50)
    second = ledger(tmp_path, clock)
    clock.tick(3)
    before = second.summary()
    assert before.seconds["lost"] == 0  # not known yet
    second.restored(10)
    summary = second.summary()
    assert summary.seconds["lost"] == 20 + 4 + 7 + 1
    assert summary.seconds["step"] == 30
    assert summary.seconds["checkpoint_stall"] == 1
    assert summary.seconds["evaluation"] == 0
    assert summary.seconds["compile"] == 2
    assert summary.down == 50
    assert summary.wall == before.wall == 30 + 1 + 20 + 4 + 7 + 2 + 1 + 3
    assert summary.processes == 2


def test_a_heartbeat_is_no_checkpoint(tmp_path):
    clock = Clock()
    first = Ledger(tmp_path, age=0.0, clock=clock, now=clock, heartbeat_seconds=0.01)
    first.restored(0)
    first.settle("step")
    clock.tick(5)
    first.checkpoint(10)
    clock.tick(4)  # on step 11, which is never completed
    deadline = time.monotonic() + 20
    while '"step": 9.0' not in (tmp_path / FILE_NAME).read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = ledger(tmp_path, clock)
    second.restored(10)
    assert (second.summary().seconds["step"], second.summary().seconds["lost"]) == (5, 4)
    first.close()


def test_a_fall_back_past_a_process_loses_all_its_work(tmp_path):
    clock = Clock()
    for restored, checkpoints in ((0, (10, 20)), (20, (30,))):
        account = ledger(tmp_path, clock)
        account.restored(restored)
        for step in checkpoints:
            with account.bucket("step"):
                clock.tick(5)
            account.checkpoint(step)
    third = ledger(tmp_path, clock)
    third.restored(10)  # 20 and 30 are damaged
    assert third.summary().seconds["step"] == 5
    assert third.summary().seconds["lost"] == 10


def test_a_run_that_ended_well_loses_nothing_when_the_command_is_repeated(tmp_path):
    clock = Clock()
    with ledger(tmp_path, clock) as first:
        first.restored(0)
        with first.bucket("step"):
            clock.tick(5)
        first.checkpoint(10)
        with first.bucket("evaluation"):  # the final one, after the last checkpoint
            clock.tick(3)
    second = ledger(tmp_path, clock)
    second.restored(10)
    assert second.summary().seconds["lost"] == 0
    assert second.summary().seconds["evaluation"] == 3


@pytest.mark.parametrize("end", ["exception", "last words"])
def test_a_process_that_fails_right_after_its_restore_has_done_nothing_of_use(tmp_path, end):
    clock = Clock()
    with ledger(tmp_path, clock) as first:
        first.restored(0)
        with first.bucket("step"):
            clock.tick(5)
        first.checkpoint(10)
    second = ledger(tmp_path, clock)
    with contextlib.suppress(KeyError), second:
        second.restored(10)
        with second.bucket("step"):
            clock.tick(7)  # on a step that hangs or fails
        if end == "last words":
            second.break_off()
        raise KeyError
    third = ledger(tmp_path, clock)
    third.restored(10)
    account = third.summary()
    assert (account.seconds["step"], account.seconds["lost"], account.processes) == (5, 7, 3)


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path):
    clock = Clock()
    first = ledger(tmp_path, clock)
    clock.tick(5)
    first.checkpoint(1)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"process": 1, "sec')
    ledger(tmp_path, clock)  # killed right after its first line, which must not be joined to the broken one
    third = ledger(tmp_path, clock)
    clock.tick(2)
    assert (third.summary().wall, third.summary().processes) == (7, 3)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = Clock()
    with ledger(None, clock) as account:
        clock.tick(4)
        account.restored(3)
        account.checkpoint(4)
        assert account.summary().wall == 4
    assert list(tmp_path.iterdir()) == []


def test_heartbeats_account_for_a_process_killed_in_a_long_block(tmp_path):
    code = (
        "import sys, pathlib, time\nfrom maxlm.train.goodput import Ledger\n"
        "account = Ledger(pathlib.Path(sys.argv[1]), age=0.0, heartbeat_seconds=0.05)\n"
        "with account.bucket('compile'):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        records = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines(keepends=True)[:-1]]
        if records and records[-1]["seconds"].get("compile", 0) > 0.2:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Ledger(tmp_path, age=0.0, heartbeat_seconds=0) as account:
        assert account.summary().seconds["compile"] > 0.2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_the_age_of_a_process_covers_its_imports():
    code = "import time; time.sleep(0.5); from maxlm.train.goodput import process_age; print(process_age())"
    begun = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    # /proc/uptime and start times are in hundredths of a second.
    assert 0.48 < age < time.monotonic() - begun + 0.03
    assert process_age() > age
