"""Processes that run functions of this package on plain data, a job at a time, and what is shown while they do.

Not `multiprocessing`: its spawned children import the caller's main module (and JAX with it), and wait for ever when
the caller is killed. A child here talks over its standard pipes, so it imports nothing but the job's module, and
ends when the caller does, however that ends.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from maxlm.errors import UserError

SECONDS_BETWEEN_LINES = 5.0
_DONE = object()


class WorkerError(UserError):
    """A worker process ended before its job did."""


class WorkerPool:
    """`workers` processes; use it as a context manager, which ends them."""

    def __init__(self, workers: int):
        self._children = [_Child() for _ in range(workers)]

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        for child in self._children:
            child.close()

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple]) -> Iterator[Any]:
        """Results of `function(*job)` as they come; a job is taken from `jobs` when a process is free for it.

        Args:
          function: A function of an importable module; arguments and results are pickled.
          jobs: Arguments, one tuple a job.

        Raises:
          WorkerError: A process was killed or ran out of memory.
          Exception: What the function raised.
        """
        results: queue.Queue[Any] = queue.Queue()
        pending, lock = iter(jobs), threading.Lock()

        def serve(child: _Child) -> None:
            try:
                while True:
                    with lock:
                        job = next(pending, None)
                    if job is None:
                        break
                    results.put((child.call(function, job), None))
            except BaseException as error:  # carried over to the caller's thread, whatever it is
                results.put((None, error))
            results.put((_DONE, None))

        for child in self._children:
            threading.Thread(target=serve, args=(child,), daemon=True).start()
        serving = len(self._children)
        while serving:
            value, error = results.get()
            if error is not None:
                raise error
            if value is _DONE:
                serving -= 1
            else:
                yield value


class _Child:
    """One process and the pipes to it."""

    def __init__(self) -> None:
        code = (
            "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from maxlm.data import workers; workers.serve()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def call(self, function: Callable[..., Any], job: tuple) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump((function, job), self._process.stdin)
            self._process.stdin.flush()
            result, error = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            raise WorkerError(
                f"a worker process ended with code {code} in the middle of its work (-9: killed, often for want of "
                "memory: try fewer with data.workers); the same command goes on with what is done"
            ) from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A job that was cut off may have left bytes to flush into a pipe that nobody reads.
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


def serve() -> None:
    """The life of a worker process: answers jobs until the caller closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what an interrupt ends
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    while True:
        try:
            function, job = pickle.load(jobs)
        except EOFError:
            return
        try:
            result, problem = function(*job), None
        except Exception as error:  # sent back to the caller, whatever it is
            result, problem = None, error
        pickle.dump((result, problem), answers)
        answers.flush()


def worker_count(setting: int, jobs: int) -> int:
    """Processes to start: `setting`, or one a core where that is 0, and never more than there are jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(setting or cores, jobs))


class Lines:
    """Says on standard error how far a job of a known number of bytes is, in lines; of a short one nothing."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, max(total, 1), 0
        self._begin = self._shown = time.monotonic()

    def advance(self, size: int) -> None:
        """Counts `size` more bytes as done."""
        self._done += size
        now = time.monotonic()
        told = self._shown > self._begin
        if now - self._shown >= SECONDS_BETWEEN_LINES or (told and self._done >= self._total):
            self._shown = now
            rate = self._done / max(now - self._begin, 1e-9)
            left = (self._total - self._done) / max(rate, 1.0)
            note(
                f"{self._what}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB, "
                f"{self._done / self._total:.0%}, {rate / 1e6:.1f} MB/s, {left:.0f} s left"
            )


class Progress(Lines):
    """The same as a bar where there is a terminal."""

    def __init__(self, what: str, total: int):
        super().__init__(what, total)
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import console, progress

            columns = (progress.BarColumn(), progress.TaskProgressColumn(), progress.TransferSpeedColumn())
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                *columns,
                progress.TimeRemainingColumn(),
                console=console.Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, size: int) -> None:
        """Counts `size` more bytes as done."""
        if self._bar is None:
            super().advance(size)
        else:
            self._bar.advance(self._task, size)


def note(text: str) -> None:
    """One line for a person, on standard error."""
    print(text, file=sys.stderr, flush=True)
