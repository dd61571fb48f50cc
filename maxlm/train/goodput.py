"""Where the time of a run went: every second of its wall clock belongs to one bucket, across restarts.

A process of the run is in exactly one bucket at any moment. Its account is appended to goodput.jsonl by a thread every
few seconds, at every checkpoint and at the end, so that a process killed with SIGKILL is accounted for up to its last
heartbeat. The wall clock of the run is the sum over its processes; the time between them (a dead process's seconds
after its last heartbeat among it) is no time of the run and is given apart, as `down`.

What a process did after the checkpoint that a later process was restored from has to be done again: those seconds move
from the buckets of work to `lost`. They are found when the file is read, from the accounts at checkpoints and the
step that each process started from, so a line once written is never changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE_NAME = "goodput.jsonl"
WORK = ("data_wait", "step", "evaluation", "checkpoint_stall")  # what is lost when it has to be done again
BUCKETS = ("start", "compile", "restore", *WORK, "lost")
HEARTBEAT_SECONDS = 5.0
# Heartbeats thin out as a process grows old: a kill loses sight of at most a thousandth of its time, and a month's
# file stays under a few megabytes.
HEARTBEAT_FRACTION = 1e-3


class Summary(NamedTuple):
    """The account of a run."""

    seconds: dict[str, float]  # by bucket; the sum is `wall`
    fractions: dict[str, float]  # of `wall`
    wall: float  # seconds of all processes
    down: float  # seconds between them
    processes: int


class Ledger:
    """The account of this process, and of those before it in the same workdir.

    `settle` changes the bucket that holds whenever no `bucket` block is open; blocks
    nest, and the inner one stops the outer. Not for use from several threads.
    """

    def __init__(
        self,
        workdir: Path | None,
        *,
        age: float,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        """Opens the account, in the bucket "start".

        Args:
          workdir: of the run; None keeps no file (every process but the first).
          age: seconds that this process has lived already (`process_age()`), counted as start.
          clock: seconds, monotonic.
          now: seconds since 1970, which places processes beside each other.
          heartbeat_seconds: between heartbeats of the thread, at first; 0: no thread.
        """
        self._clock, self._now = clock, now
        self._begun = now() - age
        self._since = clock()
        self._seconds = dict.fromkeys(BUCKETS, 0.0)
        self._seconds["start"] = age
        self._base = "start"
        self._open: list[str] = []
        self._start_step: int | None = None  # not known until `restored`
        self._step = 0
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._goes_on = False  # this account is a later one of the same process
        self._torn = False  # the last line may be cut short
        self._path = None if workdir is None else Path(workdir) / FILE_NAME
        self._earlier = [] if self._path is None else _read(self._path)
        self._process = 1 + max((record["process"] for record in self._earlier), default=0)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _end_last_line(self._path)
            self._append()
            if heartbeat_seconds:
                threading.Thread(target=self._beat, args=(heartbeat_seconds,), daemon=True, name="goodput").start()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:
            self.break_off()

    @property
    def standing(self) -> tuple[int, str]:
        """Steps done, and the bucket that holds now."""
        return self._step, [self._base, *self._open][-1]  # a copy: other threads ask, too

    def settle(self, bucket: str) -> None:
        """The bucket from now on, outside of `bucket` blocks."""
        _check(bucket)
        with self._lock:
            self._account()
            self._base = bucket

    @contextlib.contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        """Time inside belongs to `name`, unless an inner block takes it."""
        _check(name)
        with self._lock:
            self._account()
            self._open.append(name)
        try:
            yield
        finally:
            with self._lock:
                self._account()
                self._open.pop()

    def restored(self, step: int) -> None:
        """This process goes on from the checkpoint of `step`; 0: from the beginning.

        Called in every process before its first step. What earlier processes did after that step is lost.
        """
        with self._lock:
            self._start_step = self._step = step
            self._append()

    def begin_anew(self, step: int) -> None:
        """This process goes back to the checkpoint of `step` by itself: a new account begins, as in a new process."""
        with self._lock:
            self._append()
            self._earlier = [] if self._path is None else _read(self._path)
            self._process, self._goes_on = self._process + 1, True
            self._begun = self._now()
            self._seconds = dict.fromkeys(BUCKETS, 0.0)
            self.restored(step)

    def completed(self, step: int) -> None:
        """`step` steps are done. Costs next to nothing."""
        self._step = step

    def checkpoint(self, step: int) -> None:
        """All that was done so far need not be done again once the checkpoint of `step` is restored.

        Called when the loop goes on after starting a save; it does no harm if that save is never committed.
        """
        with self._lock:
            self._step = step
            self._append(mark=True)

    def summary(self) -> Summary:
        """The account of the run up to this moment."""
        with self._lock:
            return summarise([*self._earlier, self._record(mark=True)])

    def close(self) -> None:
        """Writes the last line of a process that has done its work: nothing of it need be done again."""
        self._end(mark=True)

    def break_off(self) -> None:
        """Writes the last line of a process that fails or leaves: what came after its last checkpoint is not kept."""
        self._end(mark=False)

    def _end(self, *, mark: bool) -> None:
        """Writes the last line; whoever comes second has nothing to add."""
        if not self._closed.is_set():
            self._closed.set()
            with self._lock:
                self._append(mark=mark)

    def _account(self) -> None:
        """Gives the time since the last call to the bucket that holds."""
        now = self._clock()
        self._seconds[self._open[-1] if self._open else self._base] += now - self._since
        self._since = now

    def _record(self, *, mark: bool) -> dict[str, Any]:
        self._account()
        return {
            "process": self._process,
            "goes_on": self._goes_on,
            "begun": self._begun,
            "time": self._now(),
            "start_step": self._start_step,
            "step": self._step,
            "seconds": {name: seconds for name, seconds in self._seconds.items() if seconds},
            "mark": mark,
        }

    def _append(self, *, mark: bool = False) -> None:
        if self._path is None:
            return
        # One write of a whole line: nothing is buffered that a kill could take. A full disk takes part of it or
        # nothing; the next line says all of it again.
        begin = "\n" if self._torn else ""
        try:
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(f"{begin}{json.dumps(self._record(mark=mark))}\n")
            self._torn = False
        except OSError:
            self._torn = True

    def _beat(self, interval: float) -> None:
        while not self._closed.wait(max(interval, HEARTBEAT_FRACTION * sum(self._seconds.values()))):
            with self._lock:
                if not self._closed.is_set():
                    self._append()


def process_age() -> float:
    """Seconds since this process was started, as Linux knows it; 0 elsewhere."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        # Field 22 of proc(5), ticks from boot to start; the parenthesis ends field 2.
        return max(uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return 0.0


def summarise(records: list[dict[str, Any]]) -> Summary:
    """The account of a run from the records of its processes, in the order written.

    A process that goes back to a checkpoint by itself begins another account, which is told by `goes_on`.
    """
    processes: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        processes.setdefault(record["process"], []).append(record)
    seconds = dict.fromkeys(BUCKETS, 0.0)
    down, ended = 0.0, None
    order = sorted(processes)
    for number in order:
        account, last = processes[number], processes[number][-1]
        starts = [processes[n][-1]["start_step"] for n in order if n > number]
        later = [step for step in starts if step is not None]
        spent = _with(last["seconds"])
        if later:
            useful = _useful(account, min(later))
            for name in WORK:
                seconds["lost"] += spent[name] - useful[name]
                spent[name] = useful[name]
        for name in BUCKETS:
            seconds[name] += spent[name]
        if ended is not None:
            down += max(last["begun"] - ended, 0.0)
        ended = last["time"]
    wall = sum(seconds.values())
    fractions = {name: value / wall if wall else 0.0 for name, value in seconds.items()}
    begun = sum(not account[-1].get("goes_on") for account in processes.values())
    return Summary(seconds=seconds, fractions=fractions, wall=wall, down=down, processes=begun)


def _useful(account: list[dict[str, Any]], step: int) -> dict[str, float]:
    """What a process had spent when it had the checkpoint of `step`, of which a later one took up the run.

    That is its last record that was marked at that step or before it; without any, nothing that it did was kept.
    """
    kept = [record for record in account if record["mark"] and record["step"] <= step]
    return _with(kept[-1]["seconds"] if kept else {})


def _with(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds.get(name, 0.0) for name in BUCKETS}


def _check(bucket: str) -> None:
    if bucket not in BUCKETS or bucket == "lost":
        raise ValueError(f"{bucket!r} is no bucket; time goes to one of {', '.join(BUCKETS[:-1])}")


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line cut short by a kill is passed over."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "mark" in record:
                records.append(record)
    return records


def _end_last_line(path: Path) -> None:
    """Keeps the next record apart from a last line that was cut short."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
