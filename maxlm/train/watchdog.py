"""A thread that sees when a step does not end: it writes down where all threads are, and later ends the run.

What is unusual is told by the run itself: a step is late after so many times the median of the last ones. What is no
step (restoring, compiling, evaluating, saving, the report), and the first steps, have a limit of their own that suits
all of them. The thread needs nothing of the loop but the moment at which each step was done, so it works while the loop
hangs in a collective, in the storage or in the data.
"""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

WINDOW = 64  # steps of which the median is taken
HISTORY = 3  # steps before a step is compared with others
LONGEST = 1800.0  # seconds that anything else may take without a sign of progress
STOP = 2.0  # limits after which the run is ended
LATE_LOOKS = 10  # intervals between two looks of the thread that only a process has which was itself stopped
OTHERS = 1.5  # how much later than process 0, which knows who is behind, the others do so by themselves
FOLDER = "stacks"


class Watchdog:
    """Watches between `__enter__` and `__exit__`: inside `steps`, but not in `off`, steps; else whatever happens.

    Args:
      times: the median of the steps; a step is late after that, and after
      least: seconds; 0 for both: nothing is watched. All else, and a step without others before it, is after LONGEST.
      folder: of the run; the stacks go into `stacks/` there and to the standard error.
      process: number of this one.
      stuck: ends the run, with a reason.
    """

    def __init__(
        self,
        times: float,
        least: float,
        *,
        folder: Path,
        process: int,
        stuck: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._times, self._least = times, least
        self._folder, self._process, self._stuck, self._clock = folder / FOLDER, process, stuck, clock
        self._durations: deque[float] = deque(maxlen=WINDOW)
        self._step = 0
        self._since: float | None = None  # None: not watching
        self._is_step = self._timed = False  # whether it is one since then; whether it is to count in the median
        self._dumped = False
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        self.alive()
        if self._times:
            self._closed = threading.Event()
            threading.Thread(target=self._watch, args=(self._closed,), daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._since = None
        self._closed.set()

    def completed(self, step: int) -> None:
        """`step` steps are done; the next one is watched from now on."""
        now = self._clock()
        if self._timed and self._since is not None:
            self._durations.append(now - self._since)
        self._step, self._since, self._dumped = step, now, False
        self._is_step = self._timed = True

    def alive(self) -> None:
        """What happens from now on, until a step is done, is no step; or it is the same as before, and has come on."""
        self._since, self._is_step, self._timed, self._dumped = self._clock(), False, False, False

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Steps are done inside; what comes before the first of them, and afterwards, is none."""
        self.alive()
        try:
            yield
        finally:
            self.alive()

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """What happens inside is between two steps; the next one begins afterwards."""
        self.alive()
        try:
            yield
        finally:
            self._since, self._dumped = self._clock(), False
            self._is_step = self._timed = True

    @property
    def limit(self) -> float:
        """Seconds after which what is done now is late."""
        if not self._is_step or len(self._durations) < HISTORY:
            return max(LONGEST, self._least)
        return max(self._least, self._times * statistics.median(self._durations))

    def check(self) -> None:
        """Does what is due: the stacks once a step, and the end of the run."""
        since, limit = self._since, self.limit
        if since is None:
            return
        late = self._clock() - since
        if late > limit and not self._dumped:
            self._dumped = True
            self._dump(late)
        if late > limit * STOP * (OTHERS if self._process else 1.0):
            self._stuck(f"{self._what(late)}; {self._folder} says where every thread was")

    def _what(self, late: float) -> str:
        if not self._is_step:
            return f"what follows step {self._step} has not come on for {late:.0f} s ({self.limit:.0f} s are allowed)"
        usual = f"usual are {statistics.median(self._durations):.3g} s" if self._durations else "it is the first one"
        return f"step {self._step + 1} has not ended after {late:.0f} s ({usual})"

    def _dump(self, late: float) -> None:
        path = self._folder / f"step-{self._step + 1}-process-{self._process}.txt"
        text = self._what(late)
        print(f"maxlm: {text}; where every thread is, also in {path}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)  # the descriptor: the stream may be another's by now
        with contextlib.suppress(OSError):  # the storage may be what hangs or fails
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                faulthandler.dump_traceback(file)

    def _watch(self, closed: threading.Event) -> None:
        looked, interval = self._clock(), min(max(self._least / 20, 0.05), 1.0)
        while not closed.wait(interval):
            now = self._clock()
            # A process that was itself stopped for a while says nothing about its step.
            if self._since is not None and now - looked > max(self._least / 2, LATE_LOOKS * interval):
                self._since += now - looked
            looked = now
            self.check()
