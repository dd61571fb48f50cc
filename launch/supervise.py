"""Keeps one job running on machines that fail: looks at what there is, does what is missing, and watches.

Nothing is remembered between rounds or between starts of this program: a round asks the machines, so that the same
command carries on after any failure, its own included. Failures climb a ladder: the process is started again, then
the machines, then they are replaced; a run that went well for a while comes down from it. That the machines do not
answer is no failure of the run, which may well go on: they are waited for, and left as they are.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple, Protocol

from launch.job import EXIT_PREEMPTED, Job, LaunchError
from launch.remote import Status

HEALTHY_SECONDS = 1800.0  # a run of this length was no failure at the start
PATIENCE_SECONDS = 3600.0  # that machines which do not answer are waited for
FOLLOW_SECONDS = 60.0  # at least between two beginnings of following a log


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
        """Restarts the machines, and says so; nothing where that is not this program's."""

    def replace(self) -> None:
        """Gives the machines back, so that `ensure` gets others, and says so; nothing where they cannot be."""

    def follow(self) -> subprocess.Popen:
        """Prints the first worker's log from now on, in a process group of its own."""


class Hopeless(LaunchError):
    """The machines will not come, or are not those that were asked for: waiting does not help."""


class _Stopped(Exception):
    """Somebody has asked for the end of the job, in another terminal."""


class _Begun(NamedTuple):
    """A run that is there; complete: has come to its end already, started: only now, by this program."""

    complete: bool = False
    started: bool = False


class _Silence:
    """Machines that do not answer, or cannot be made ready, are waited for; the run may well go on there.

    Args:
      patience: seconds after which the wait is over.
    """

    def __init__(self, patience: float, *, poll: float, log: Callable[[str], None], clock: Callable[[], float]):
        self._patience, self._poll, self._log, self._clock = patience, poll, log, clock
        self._since: float | None = None
        self._times = 0

    def broken(self) -> None:
        """The run is seen."""
        self._since, self._times = None, 0

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The time inside does not count: whoever waits for machines to be there, in a queue, say, is answered."""
        began = self._clock()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += self._clock() - began

    def lasts(self, error: LaunchError) -> float:
        """Seconds until the next look. Raises LaunchError: it has lasted too long."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        lasted = now - self._since
        if lasted >= self._patience:
            raise LaunchError(
                f"{error}; given up after {lasted:.0f} s. The machines, the run and the costs may still be there: the "
                "same command looks again"
            ) from error
        self._times += 1
        self._log(f"{error}; the run may go on there. Looking again, for {self._patience - lasted:.0f} s at most")
        return min(self._poll * 2 ** (self._times - 1), 600.0)


def supervise(
    fleet: Fleet,
    job: Job,
    *,
    log: Callable[[str], None],
    poll: float = 20.0,
    patience: float = PATIENCE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs the job to its end on the fleet and returns 0; or until it is stopped, and returns EXIT_PREEMPTED.

    Only a run that was seen to end badly counts as a failure, and only that leads to machines being restarted.

    Args:
      patience: seconds for which machines that do not answer are waited for.

    Raises:
      LaunchError: it failed more often than `job.retries`, or the machines did not answer; what went wrong last.
      Hopeless: another job of this name runs there, which is left as it is.
    """
    failures, allowed = 0, False
    began: float | None = None  # the run that is there; while it goes on, looks that fail do not change that
    silence = _Silence(patience, poll=poll, log=log, clock=clock)
    while True:
        try:
            with silence.suspended():
                replaced = fleet.ensure()
            failures = 0 if replaced else failures
            statuses = _all(fleet)
            _check_own(statuses, job)
            if not allowed:  # by this very command; what is stopped from now on stays so
                fleet.allow()
                allowed = True
                statuses = _all(fleet) if any(status.state == "stopped" for status in statuses) else statuses
            begun = _begun(fleet, statuses, log=log)
            if begun.started or began is None:
                began = clock()  # only now: the wait for machines is no healthy run
            code = 0
            if not begun.complete:
                code = _followed(fleet, job, silence, log=log, poll=poll, sleep=sleep, clock=clock)
            lasted, began = clock() - began, None
        except _Stopped:
            log("the run was asked to stop, and has ended; `run` starts it again")
            return EXIT_PREEMPTED
        except Hopeless:
            raise
        except LaunchError as error:
            sleep(silence.lasts(error))
            continue
        if code == 0:
            log("the run is complete")
            return 0
        if code == EXIT_PREEMPTED:
            log("the run was asked to leave and has saved; starting it again")
            continue
        problem = f"the run ended with exit code {code}"
        failures = 1 if lasted > HEALTHY_SECONDS else failures + 1
        if failures > job.retries:
            raise LaunchError(f"{problem}; given up after {failures} failures, the same command tries again")
        log(f"{problem}; failure {failures}, {job.retries} are allowed")
        sleep(min(poll * 2 ** (failures - 1), 600.0))
        with contextlib.suppress(LaunchError):  # a step of the ladder that fails is seen by the next round
            if failures == 2:
                fleet.restart()
            elif failures > 2:
                fleet.replace()


def _begun(fleet: Fleet, statuses: list[Status], *, log: Callable[[str], None]) -> _Begun:
    """From whatever state the machines are in, none of them another job's, to a run.

    Raises:
      _Stopped: somebody has stopped it.
    """
    if all(status.state == "exited" and status.code == 0 for status in statuses):
        return _Begun(complete=True)
    states = {status.state for status in statuses}
    # Those that ended already are followed by the rest, or judged.
    if "running" in states and states <= {"running", "exited", "stopped"}:
        log("the run is there already; watching it")
        return _Begun()
    if "stopped" in states:
        raise _Stopped
    if "running" in states:
        log("ending what runs on a part of the machines")
        fleet.stop()
    fleet.prepare()
    log(f"starting {fleet.workers} processes")
    fleet.start()
    return _Begun(started=True)


def _check_own(statuses: list[Status], job: Job) -> None:
    """Raises Hopeless where something else runs under the job's name; what has ended there does not count.

    It may be a healthy run of a commit before, or one with another workdir: to end that, somebody has to say so.
    """
    if others := [status.host for status in statuses if status.state == "other"]:
        raise Hopeless(
            f"{job.name} runs already on {', '.join(others)}, with other settings or of another commit than "
            f"{job.commit[:12]}; type `stop` to end it, the settings and the --commit that it was started with to "
            "watch it, or another --name to run beside it"
        )


def _followed(
    fleet: Fleet,
    job: Job,
    silence: _Silence,
    *,
    log: Callable[[str], None],
    poll: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> int:
    """Watches the run to its end, with its log on the screen; its exit code."""
    follower, followed, deadline = fleet.follow(), clock(), None
    try:
        while True:
            statuses = _all(fleet)
            silence.broken()
            _check_own(statuses, job)  # somebody has stopped the run and started another, between two looks
            running = [status for status in statuses if status.state == "running"]
            if not running:
                return _outcome(statuses)
            if len(running) < len(statuses):
                # The others are saving, or wait in a collective for one that is gone.
                deadline = deadline or clock() + job.grace_seconds
                if clock() > deadline:
                    log(f"{len(running)} processes did not follow the others within {job.grace_seconds} s; ending them")
                    fleet.stop()
            if follower.poll() is not None and clock() - followed >= FOLLOW_SECONDS:
                log("the connection that brought the log has ended; following it again")
                _end(follower)
                follower, followed = fleet.follow(), clock()
            sleep(poll)
    finally:
        _end(follower)


def print_log(fleet: Fleet) -> int:
    """Prints the first worker's log until that ends; the exit code."""
    follower = fleet.follow()
    try:
        return follower.wait()
    finally:
        _end(follower)


def until_interrupted(act: Callable[[], int], *, left: str, log: Callable[[str], None]) -> int:
    """What `act` returns; or, after Ctrl-C or SIGTERM, 128 and the signal's number, once `act` has tidied up.

    By itself SIGTERM, with which a scaling study ends its launchers, would leave behind what follows a log: that
    has a session of its own, and lives on.

    Args:
      left: what is said then of what goes on.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    ours = threading.current_thread() is threading.main_thread()  # no other may set a handler, or is interrupted
    previous = signal.signal(signal.SIGTERM, interrupt) if ours else None
    try:
        return act()
    except KeyboardInterrupt as error:
        log(left)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    finally:
        if ours:
            signal.signal(signal.SIGTERM, previous)


def _end(follower: subprocess.Popen) -> None:
    """Ends it with what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(follower.pid, signal.SIGKILL)
    follower.wait()


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
