"""What a run measures, written down: metrics.jsonl and TensorBoard always, Weights & Biases when a project is named.

metrics.jsonl holds one JSON object a line, each with `kind` and `step`. `step` counts the batches consumed, so the
record of the first step has step 1, and a checkpoint of step n comes with the records of steps 1 to n. A line of kind
"step" is written once for every step; other kinds ("evaluation", "norms", "cost", …) come in between. Floats are
written so that they read back exactly; nan and infinities are the strings "nan", "inf" and "-inf", because JSON has
none. `read_metrics` turns them back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from maxlm.config import Config
from maxlm.errors import UserError
from maxlm.files import write_atomically

FILE_NAME = "metrics.jsonl"
EVENTS = "tensorboard"  # folder
FAILED_SAVE = "checkpoint_failed"  # the kind of a record, which stays when the run goes back: the report counts them
FLUSH_SECONDS = 5.0  # between handing buffered lines to the operating system
EVENTS_SECONDS = 30.0  # the same for TensorBoard, whose library waits for the disk each time
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Truncation(NamedTuple):
    """What cutting metrics.jsonl back did."""

    kept: int  # lines
    dropped: int  # lines of later steps
    unreadable: int  # lines that were no record: a last one half written when the process was killed, or damage
    last_step: int  # step of the last step record that was kept; 0: none


class MetricsWriter:
    """Writes records; process 0 alone does, in every other process nothing happens.

    `truncate` comes first: it opens the files at the step that the run continues from (0 for a new run). Lines are
    buffered and handed over every few seconds; `flush` before a checkpoint is committed, so that a restored step
    always finds its records.
    """

    def __init__(
        self, workdir: Path, config: Config, *, process_index: int, log: Callable[[str], None] = print
    ) -> None:
        """Raises UserError when a W&B project is named and the package is missing."""
        self._workdir, self._config, self._log = Path(workdir), config, log
        self._active = process_index == 0
        self._lines: _Lines | None = None
        self._events: _Events | None = None
        self._tracker = _start_wandb(self._workdir, config) if self._active and config.train.wandb_project else None
        self._begun = self._last_step = 0
        self._flush_at = 0.0

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError as lost:
            if error is None:
                raise
            self._log(f"the last records of {FILE_NAME} are lost: {lost}")  # what ends the run is the one to tell

    def truncate(self, step: int) -> Truncation:
        """Drops the records of steps after `step` and goes on from there; tells TensorBoard to drop them too.

        That a save failed stays true, of a step that is made again, too.
        """
        if not self._active:
            return Truncation(kept=0, dropped=0, unreadable=0, last_step=step)
        self._begun = step
        return self._cut(step)

    def drop(self, kind: str, step: int) -> None:
        """Takes back the records of a kind at a step: only where this process goes on can there be an earlier one's."""
        if self._active and step == self._begun:
            self._cut(step, without=kind)

    def _cut(self, step: int, *, without: str = "") -> Truncation:
        """Closes the files, cuts them back, and opens them to go on from `step`, with lines that waited for room.

        Raises:
          UserError: the disk does not take that.
        """
        self.flush()
        waiting = self._lines.waiting() if self._lines else []
        self._shut()
        path, done = self._workdir / FILE_NAME, Truncation(kept=0, dropped=0, unreadable=0, last_step=0)
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            if path.exists():
                done = cut_metrics(path, step, without=without, always=FAILED_SAVE)
            self._lines = _Lines(path)
            self._events = _Events(self._workdir / EVENTS, purge_step=step + 1)
        except OSError as error:
            raise UserError(
                f"{path} cannot be cut back to step {step}, where the run goes on ({error}): see that there is room "
                "and that it may be written; the same command goes on from the newest checkpoint"
            ) from error
        for line in waiting:
            if _stays(_parse(line), step, without, FAILED_SAVE):
                self._lines.write(line)
        self._last_step = step
        return done

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds one record.

        Args:
          kind: "step" for the one record of a step, else what the record is about.
          step: batches consumed so far.
          values: numbers, booleans, strings, NumPy scalars or arrays, and nested mappings of them. Numbers become
            TensorBoard scalars named by their path, `kind/key/…`.

        Raises:
          RuntimeError: before the first `truncate`.
          ValueError: for a second record of one step.
        """
        if not self._active:
            return
        if self._lines is None or self._events is None:
            raise RuntimeError("metrics are written before truncate(step) said which step the run continues from")
        if kind == "step":
            if step <= self._last_step:
                raise ValueError(
                    f"step {step} is already recorded (up to {self._last_step}); truncate before going back"
                )
            self._last_step = step
        record = {"kind": kind, "step": step, **plain(values)}
        self._lines.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        numbers = dict(_numbers(kind, values))
        self._events.write(step, numbers)
        if self._tracker is not None:
            self._tracker.log({**numbers, "step": step})
        if time.monotonic() >= self._flush_at:
            with contextlib.suppress(OSError):  # `flush` tells
                self._lines.flush()
            self._flush_at = time.monotonic() + FLUSH_SECONDS

    def flush(self) -> OSError | None:
        """Puts everything written so far on the disk; what a full one does not take is kept for the next time.

        Returns:
          What went wrong.
        """
        if self._lines is None or self._events is None:
            return None
        try:
            self._lines.flush()
            self._lines.sync()
            self._events.flush()
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Flushes and ends; safe to call twice. Raises OSError if records are lost."""
        self._close_files()
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def _close_files(self) -> None:
        error = self.flush()
        self._shut()
        if error:
            raise error

    def _shut(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()
        self._lines = self._events = None


class _Lines:
    """Appends whole lines to a file. What the disk does not take stays here until it does."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._left = bytearray()

    def write(self, line: bytes) -> None:
        self._left += line

    def waiting(self) -> list[bytes]:
        """The lines that the disk has not taken."""
        return bytes(self._left).splitlines(keepends=True)

    def flush(self) -> None:
        done = 0
        try:
            while done < len(self._left):
                done += self._file.write(self._left[done:])
        finally:
            whole = self._left.rfind(b"\n", 0, done) + 1
            if whole < done:  # of the next line a part
                self._file.truncate(self._file.tell() - (done - whole))
            del self._left[:whole]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(workdir: Path, kind: str = "") -> Iterator[dict[str, Any]]:
    """The records of a run in the order written, those of one kind if `kind` is given; none without a file.

    A last line that is half written is passed over, as the run may be going on.
    """
    path = Path(workdir) / FILE_NAME
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None and kind in ("", record["kind"]):
                yield {key: _revive(value) for key, value in record.items()}


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None when it is not a whole one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # of JSON and of UTF-8
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("kind"), str)
    return record if whole else None


def cut_metrics(path: Path, step: int, *, without: str = "", always: str = "") -> Truncation:
    """Drops the records after `step`.

    Those that end the file are cut off, for which a full disk has room. If others go, a shorter file is written beside
    and takes the place.

    Args:
      without: the kind of which those of `step` itself go, too.
      always: the kind of which none go.
    """
    kept = dropped = unreadable = last_step = 0
    read = end = kept_bytes = 0  # end: where the last line up to `step` that stays ends
    later = b""  # the lines of steps after it that stay and come behind that
    with path.open("rb") as lines:
        for line in lines:
            record, read = _parse(line), read + len(line)
            if _stays(record, step, without, always):
                kept, later = kept + 1, later + line
                if record["step"] <= step:
                    kept_bytes, end, later = kept_bytes + len(later), read, b""
                last_step = record["step"] if record["kind"] == "step" else last_step
            elif record is None:
                unreadable += 1
            else:
                dropped += 1
    if kept_bytes < end:
        beside = path.with_name(path.name + ".partial")
        with path.open("rb") as old, beside.open("wb") as new:
            new.writelines(line for line in old if _stays(_parse(line), step, without, always))
            new.flush()
            os.fsync(new.fileno())
        os.replace(beside, path)
    elif end + len(later) < read:
        with path.open("r+b") as file:  # over what was there, for which a full disk has room, too
            file.seek(end)
            file.write(later)
            file.truncate()
    return Truncation(kept=kept, dropped=dropped, unreadable=unreadable, last_step=last_step)


def _stays(record: dict[str, Any] | None, step: int, without: str, always: str) -> TypeGuard[dict[str, Any]]:
    """Whether a record is there still when those after `step`, and of `step` those of a kind, are gone."""
    if record is None or record["kind"] == always:
        return record is not None
    return record["step"] < step or (record["step"] == step and record["kind"] != without)


def plain(value: Any) -> Any:
    """The value as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays: float32 to the double of the same value
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _revive(value: Any) -> Any:
    """The inverse of `plain` for non-finite numbers."""
    if isinstance(value, dict):
        return {key: _revive(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in nested values by path; arrays of layers get a number a layer."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{path}/{key}", item)
    elif hasattr(value, "tolist"):
        yield from _numbers(path, value.tolist())
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(f"{path}/{index:03d}", item)
    elif isinstance(value, (bool, int, float)):
        yield path, float(value)


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Makes `import torch` fail inside, unless it is loaded already.

    tensorboardX imports torch wherever it is installed, which costs seconds of a start and which we do not use.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


class _Events:
    """A TensorBoard event file, written in the caller's thread: one event for all numbers of a record."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        with _without_torch():
            from tensorboardX import event_file_writer
            from tensorboardX.proto import event_pb2
        folder.mkdir(parents=True, exist_ok=True)
        # The library names files by second and host; the number keeps files of quick restarts apart and in order.
        number = len(list(folder.glob("events.*")))
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), filename_suffix=f".{number:05d}")
        self._event = event_pb2.Event
        # TensorBoard drops what earlier files hold from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))
        self._flush_at = time.monotonic() + EVENTS_SECONDS

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        event = self._event(wall_time=time.time(), step=step)
        for tag, number in numbers.items():
            event.summary.value.add(tag=tag, simple_value=number)
        with contextlib.suppress(OSError):  # metrics.jsonl holds the same, and waits for a disk that is full
            self._writer.write_event(event)
        if time.monotonic() >= self._flush_at:
            self.flush()

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.flush()
        self._flush_at = time.monotonic() + EVENTS_SECONDS

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


def _start_wandb(workdir: Path, config: Config) -> Any:
    """The W&B run of this workdir, continued if there was one."""
    wandb = _import_wandb(config.train.wandb_project)
    workdir.mkdir(parents=True, exist_ok=True)
    name = workdir / "wandb_run_id"
    if not name.exists():
        write_atomically(name, uuid.uuid4().hex)
    run = wandb.init(
        project=config.train.wandb_project,
        name=config.name,
        id=name.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(workdir),
        config=dataclasses.asdict(config),
    )
    # Our own step as the axis: W&B's counter never goes back, and a resumed run may.
    run.define_metric("*", step_metric="step")
    return run


def _import_wandb(project: str) -> types.ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.wandb_project is {project!r}, but the package wandb is not installed; "
            "install it with `pip install -e '.[wandb]'`, or leave train.wandb_project empty"
        ) from error
    return wandb
