"""Keeps one job running on machines that fail: looks at what there is, does what is missing, and watches.

Nothing is remembered between rounds or between starts of this program: a round asks the machines, so that the same
command carries on after any failure, its own included. Failures climb a ladder: the process is started again, then
the machines, then they are replaced; a run that went well for a while comes down from it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Protocol

from launch.job import EXIT_PREEMPTED, Job, LaunchError
from launch.remote import Status

HEALTHY_SECONDS = 1800.0  # a run of this length was no failure at the start


class Fleet(Protocol):
    """Machines that run one process each."""

    workers: int

    def ensure(self) -> bool:
        """Sees that the machines are there, waiting if need be; whether lost ones had to be replaced."""

    def prepare(self) -> None:
        """Sees that code and packages are on all of them."""

    def start(self) -> list[Status]:
        """Starts the process on all of them."""

    def status(self) -> list[Status]:
        """What they say; those that cannot be reached are missing."""

    def stop(self) -> None:
        """Ends what runs there, giving it time to save."""

    def allow(self) -> None:
        """Takes back that somebody has stopped the job, so that it may start."""

    def restart(self) -> None:
        """Restarts the machines."""

    def replace(self) -> None:
        """Gives the machines back, so that `ensure` gets others."""

    def follow(self) -> subprocess.Popen:
        """Prints the first worker's log from now on, in a process group of its own."""


class _Stopped(Exception):
    """Somebody has asked for the end of the job, in another terminal."""


def supervise(
    fleet: Fleet,
    job: Job,
    *,
    log: Callable[[str], None],
    poll: float = 20.0,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Runs the job to its end on the fleet and returns 0; or until it is stopped, and returns EXIT_PREEMPTED.

    Raises:
      LaunchError: it failed more often than `job.retries`; what went wrong last.
    """
    failures, allowed = 0, False
    while True:
        began = time.monotonic()
        try:
            if fleet.ensure():
                failures = 0
            if not allowed:  # by this very command; what is stopped from now on stays so
                fleet.allow()
                allowed = True
            code = _attempt(fleet, job, log=log, poll=poll, sleep=sleep)
            problem = f"the run ended with exit code {code}"
        except _Stopped:
            log("the run was asked to stop, and has ended; `run` starts it again")
            return EXIT_PREEMPTED
        except LaunchError as error:
            code, problem = None, str(error)
        if code == 0:
            log("the run is complete")
            return 0
        if code == EXIT_PREEMPTED:
            log("the run was asked to leave and has saved; starting it again")
            continue
        failures = 1 if time.monotonic() - began > HEALTHY_SECONDS else failures + 1
        if failures > job.retries:
            raise LaunchError(f"{problem}; given up after {failures} failures, the same command tries again")
        log(f"{problem}; failure {failures}, {job.retries} are allowed")
        sleep(min(poll * 2 ** (failures - 1), 600.0))
        with contextlib.suppress(LaunchError):  # a step of the ladder that fails is seen by the next round
            if failures == 2:
                log("restarting the machines")
                fleet.restart()
            elif failures > 2:
                log("replacing the machines")
                fleet.replace()


def _attempt(fleet: Fleet, job: Job, *, log: Callable[[str], None], poll: float, sleep: Callable[[float], None]) -> int:
    """From whatever state the machines are in to the end of one run; its exit code.

    Raises:
      _Stopped: somebody has stopped it.
    """
    statuses = _all(fleet)
    if all(status.state == "exited" and status.code == 0 for status in statuses):
        return 0
    states = {status.state for status in statuses}
    # Those that ended already are followed by the rest, or judged.
    if "running" in states and states <= {"running", "exited", "stopped"}:
        log("the run is there already; watching it")
    elif "stopped" in states:
        raise _Stopped
    else:
        if states & {"running", "other"}:
            log("ending what runs on a part of the machines")
            fleet.stop()
        fleet.prepare()
        log(f"starting {fleet.workers} processes")
        fleet.start()
    follower = fleet.follow()
    try:
        return _watch(fleet, job, log=log, poll=poll, sleep=sleep)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(follower.pid, signal.SIGKILL)  # with what it has started
        follower.wait()


def _watch(fleet: Fleet, job: Job, *, log: Callable[[str], None], poll: float, sleep: Callable[[float], None]) -> int:
    deadline = None
    while True:
        statuses = _all(fleet)
        running = [status for status in statuses if status.state == "running"]
        if not running:
            return _outcome(statuses)
        if len(running) < len(statuses):
            # The others are saving, or wait in a collective for one that is gone.
            now = time.monotonic()
            deadline = deadline or now + job.grace_seconds
            if now > deadline:
                log(f"{len(running)} processes did not follow the others within {job.grace_seconds} s; ending them")
                fleet.stop()
        sleep(poll)


def _outcome(statuses: list[Status]) -> int:
    if any(status.state == "stopped" for status in statuses):
        raise _Stopped
    codes = {status.code if status.state == "exited" and status.code is not None else 1 for status in statuses}
    failed = sorted(codes - {0, EXIT_PREEMPTED})
    return failed[0] if failed else max(codes)


def _all(fleet: Fleet) -> list[Status]:
    statuses = fleet.status()
    if len(statuses) != fleet.workers:
        raise LaunchError(f"{len(statuses)} of {fleet.workers} workers answer")
    return statuses
