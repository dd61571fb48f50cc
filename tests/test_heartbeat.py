"""Real processes that watch over each other: one is killed, stopped or fails, the rest leaves and names it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from maxlm.heartbeat import EXIT_FAILED, EXIT_LOST
from tests.runs import ROOT, Runs

LIMIT = 1.5  # seconds of silence
HOST = socket.gethostname()

WORKER = f"""
import sys, time
from maxlm.errors import UserError
from maxlm.heartbeat import Heartbeat, Standing
from maxlm.rollcall import Place, roll_call

where, processes, number, behaviour = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
lines = roll_call(Place(where, processes, number), {{}}, timeout=60)
heartbeat = Heartbeat(lines, process=number, limit={LIMIT})
heartbeat.last_words = lambda: print("last words", flush=True)
heartbeat.standing = lambda: Standing(3 if behaviour == "behind" else 4, "data_wait")

def work():
    print("at work", flush=True)
    if behaviour == "refuse":
        raise UserError("no such file")
    if behaviour == "crash":
        raise RuntimeError("a bug")
    if behaviour == "collective":  # as one of gloo does when a process at its other end has died
        time.sleep(1.2)
        raise RuntimeError("connection reset by peer")
    if behaviour == "stuck":
        time.sleep(1)
        heartbeat.stuck("step 5 does not end")
    time.sleep({{"finish": 0.5}}.get(behaviour, 60))
    return 0

sys.exit(heartbeat.run(work))
"""


class Company:
    """Processes that have called the roll and are at work."""

    def __init__(self, behaviours):
        where = Runs.place(len(behaviours))[0].partition("=")[2]
        command = [sys.executable, "-c", WORKER, where, str(len(behaviours))]
        self.processes = [
            subprocess.Popen(
                [*command, str(number), behaviour],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for number, behaviour in enumerate(behaviours)
        ]

    def __enter__(self):
        for process in self.processes:
            assert process.stdout.readline() == "at work\n"
        self.began = time.monotonic()
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.communicate()

    def ended(self, number):
        """Exit code, output and error output of a process."""
        out, error = self.processes[number].communicate(timeout=30)
        return self.processes[number].returncode, out, error


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize(
    ("how", "limit", "message"),
    [
        (signal.SIGKILL, 1.0, "process {victim} on {host} is gone: it was killed"),
        (signal.SIGSTOP, LIMIT + 2.0, "process {victim} on {host} has been silent for"),
    ],
)
def test_a_killed_or_stopped_process_is_named_in_time_and_the_rest_leaves(victim, how, limit, message):
    with Company(["wait"] * 3) as company:
        company.processes[victim].send_signal(how)
        began = time.monotonic()
        for number in {0, 1, 2} - {victim}:
            code, out, error = company.ended(number)
            assert code == EXIT_LOST, error
            assert message.format(victim=victim, host=HOST) in error
            assert f"process {number} on {HOST} leaves with exit code {EXIT_LOST}" in error
            assert out == "last words\n"
        assert time.monotonic() - began < limit + 2.0  # the machine may be busy
        if how == signal.SIGSTOP:  # a process that wakes after the others have gone leaves too
            company.processes[victim].send_signal(signal.SIGCONT)
            assert company.ended(victim)[0] == EXIT_LOST


@pytest.mark.parametrize(
    ("victim", "behaviour", "told"),
    [
        (0, "refuse", "failed: no such file"),
        (1, "refuse", "failed: no such file"),
        (1, "crash", "failed: RuntimeError: a bug"),
    ],
)
def test_the_failure_of_one_is_told_to_all(victim, behaviour, told):
    behaviours = ["wait"] * 3
    behaviours[victim] = behaviour
    with Company(behaviours) as company:
        for number in range(3):
            code, _, error = company.ended(number)
            assert code == EXIT_FAILED  # on all: it counts, whichever is seen first
            if number == victim:
                assert ("Traceback" in error) == (behaviour == "crash")
            else:
                assert f"process {victim} on {HOST} {told}" in error and "leaves with exit code 1;" in error


def test_what_all_meet_with_is_the_failure_of_each():
    with Company(["refuse"] * 3) as company:
        for number in range(3):
            code, _, error = company.ended(number)
            assert (code, error) == (1, "maxlm: no such file\n")


def test_a_collective_that_fails_for_a_dead_process_is_put_down_to_it():
    with Company(["collective", "wait", "collective"]) as company:
        company.processes[1].kill()
        for number in (0, 2):
            code, _, error = company.ended(number)
            assert code == EXIT_LOST and f"process 1 on {HOST} is gone" in error and "Traceback" not in error


def test_all_finish_in_their_own_time():
    with Company(["finish", "finish", "finish"]) as company:
        assert [company.ended(number)[0] for number in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("behaviours", "said"),
    [
        (
            ["stuck", "wait", "behind"],
            f"step 5 does not end; the farthest is at step 4, process 2 on {HOST} is at step 3 (data_wait)",
        ),
        (["wait", "stuck", "wait"], f"process 1 on {HOST}: step 5 does not end"),
    ],
)
def test_a_step_that_hangs_ends_all_and_is_no_failure_that_counts(behaviours, said):
    with Company(behaviours) as company:
        for number in range(3):
            code, _, error = company.ended(number)
            assert code == EXIT_LOST and said.removeprefix(f"process {number} on {HOST}: ") in error
