"""Where a run lives: a folder on this machine, or one in a bucket with a copy of its small files on this machine.

The run writes its metrics, reports and configs into the folder on this machine. Of a bucket that folder is a copy, and
what has changed goes into the bucket every minute, before every commit of a checkpoint (so that a checkpoint of step n
always finds the records of the steps up to n) and at the end. An object is written whole, so a large file waits until
it has grown by a tenth, or for a commit; what a restart does not need (TensorBoard's events, profiles) makes no commit
wait. Checkpoints and stores go there by themselves.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from maxlm.checkpoint.bucket import BucketReader
from maxlm.errors import UserError
from maxlm.files import locked, write_among_others, write_atomically
from maxlm.storage import UNUSED_DAYS, Folder, cache_folder, is_bucket, local_name, on_this_machine
from maxlm.train.metrics import EVENTS
from maxlm.train.profile import FOLDER as PROFILE
from maxlm.train.rollback import FILE_NAME as ROLLBACKS

CHECKPOINTS, CONFIG = "checkpoints", "config.json"
PREPARED = "data/prepared.json"
RUN = "run.json"
SAVED, WEIGHTS = "saved", "weights"  # of run.json: a step that was saved; digest of what it began with, if given
PUSH_SECONDS = 60.0
LARGE = 4 << 20  # bytes of a file that goes into the bucket now and then only when it has grown by GROWTH of it
GROWTH = 0.1

Log = Callable[[str], None]


class _Seen(NamedTuple):
    """What tells one state of a file from another."""

    written: int  # nanoseconds
    size: int


# Whether a file that has changed is to go into the bucket now: its name, what it was when it last went, what it is.
_Due = Callable[[str, _Seen | None, _Seen], bool]


class Home:
    """Where one run lives.

    Args:
      place: what was given as its workdir: a folder, or a bucket's.
      log: takes one line of text an event.
      writes: whether this process copies into the bucket what changes here; of several one does.
      folder: of a bucket, where its small files are copied to; None: where this machine keeps those of runs.
      run: the run's id, as `first_start` has given it; None: that of the run which is there.

    Raises:
      UserError: the place cannot be one.
    """

    def __init__(
        self, place: str | Path, *, log: Log, writes: bool = True, folder: Path | None = None, run: str | None = None
    ):
        self._remote = Folder(str(place)) if is_bucket(place) else None
        self.place: str | Path = self._remote.url if self._remote else Path(place).expanduser().absolute()
        self._chosen, self._given = folder, run
        self._log, self._writes = log, writes
        self._pushed: dict[str, _Seen] = {}
        self._pushing = threading.Lock()
        self._ended = threading.Event()

    @functools.cached_property
    def run(self) -> str:
        """The run's id; "": it has none. Raises StorageError: the bucket cannot be read."""
        return run_id(self.place) if self._given is None else self._given

    @functools.cached_property
    def folder(self) -> Path:
        """The run's folder on this machine. In a bucket's place each run has its own: an earlier one's are not its."""
        if self._chosen or self._remote is None:
            return self._chosen or Path(self.place)
        name = local_name(self._remote.url)
        folder = cache_folder() / "runs" / (f"{name}-{self.run}" if self.run else name)
        earlier = sorted(folder.parent.glob(f"{name}*"))
        if earlier and not folder.exists():
            self._log(f"left out {', '.join(map(str, earlier))}: copied before this run was begun in {self.place}")
        return folder

    @property
    def checkpoints(self) -> str | Path:
        """Where the checkpoints are."""
        return f"{self.place}/{CHECKPOINTS}" if self._remote else self.folder / CHECKPOINTS

    def __enter__(self) -> Self:
        """Brings here what the bucket has, and begins to bring there what changes."""
        if self._remote:
            self.pull()
            threading.Thread(target=self._push_now_and_then, daemon=True, name="home").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        try:
            self._push(_always)
        except OSError as trouble:
            if error is None:
                raise
            self._log(f"metrics and reports could not be copied: {trouble}")  # what ends the run is the one to tell

    def pull(self) -> None:
        """Copies the run's small files here. One that only goes on where the bucket's ends stays as it is.

        Raises:
          StorageError: the bucket cannot be read.
        """
        if self._remote is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = self._remote.names()
        if ROLLBACKS not in names and (RUN in names or CONFIG in names) and (self.folder / ROLLBACKS).exists():
            # Written before the bucket refused it: whoever went on from the bucket meanwhile did not go back there.
            (self.folder / ROLLBACKS).unlink(missing_ok=True)
            self._log(f"removed {self.folder / ROLLBACKS}: {self.place} has none, and the run goes on as it is there")
        for name in names:
            if not _is_small(name) or name.startswith(f"{PROFILE}/"):  # which nothing here reads
                continue
            content, file = self._remote.read(name), self.folder / name
            with on_this_machine(file):
                here = file.read_bytes() if file.is_file() else None
                if here is None or not here.startswith(content):
                    write_among_others(file, content)
                    here = content
                if here == content:
                    self._pushed[name] = _seen(file)

    def facts(self) -> dict[str, Any]:
        """What is written down of the run as a whole; {}: it was begun before anything was."""
        content = _content(self.folder, RUN)
        return {} if content is None else json.loads(content)

    def note(self, name: str, fact: Any) -> None:
        """Writes something down of the run as a whole, in the process that writes. Raises OSError."""
        known = self.facts()
        if self._writes and known and known.get(name) != fact:
            write_atomically(self.folder / RUN, json.dumps(known | {name: fact}))

    def note_saved(self, step: int) -> None:
        """Writes down that there was a checkpoint, of `step`: then none at all means that they are gone."""
        if SAVED not in self.facts():
            with contextlib.suppress(OSError):  # the next one will be written down
                self.note(SAVED, step)

    def push(self) -> None:
        """Copies into the bucket what has changed here and a restart needs.

        Does nothing for a folder, nor where another process does.

        Raises:
          StorageError: the bucket cannot be written.
        """
        self._push(_needed)

    def _push(self, due: _Due) -> None:
        if self._remote is None or not self._writes:
            return
        with self._pushing:
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder).as_posix()
                if not _is_small(name) or not file.is_file():
                    continue
                with contextlib.suppress(FileNotFoundError):  # it has just been renamed
                    seen, before = _seen(file), self._pushed.get(name)
                    if before != seen and due(name, before, seen):
                        self._remote.upload(file, name)
                        self._pushed[name] = seen

    def _push_now_and_then(self) -> None:
        while not self._ended.wait(PUSH_SECONDS):
            try:
                self._push(_worth_it)
            except OSError as error:
                self._log(f"metrics and reports could not be copied: {error}; the next try is in {PUSH_SECONDS:g} s")


def run_id(place: str | Path) -> str:
    """The id of the run that is there; "": there is none, or it was begun before runs had one.

    Raises:
      StorageError: the bucket cannot be read.
    """
    content = _content(place, RUN)
    return "" if content is None else json.loads(content)["id"]


def began(place: str | Path) -> datetime.datetime | None:
    """When the run that is there was first started; None: there is none, or it was begun before runs wrote that down.

    Raises:
      StorageError: the bucket cannot be read.
    """
    content = _content(place, RUN)
    said = "" if content is None else json.loads(content).get("began", "")
    return datetime.datetime.fromisoformat(said) if said else None


def weights_given(place: str | Path) -> str:
    """The digest of the weights that the run there began with; "": it drew them, or has not written down which.

    Raises:
      StorageError: the bucket cannot be read.
    """
    content = _content(place, RUN)
    return "" if content is None else json.loads(content).get(WEIGHTS, "")


def first_start(place: str | Path) -> str:
    """The id of the run there, made at its first start, with the date and time; for one process of them.

    What lies outside the run's folder (copies of its state, the cache of a bucket) outlives the folder. By the id it
    is known that it belongs to an earlier run, if another was begun in its place.

    Raises:
      StorageError: the bucket cannot be read or written.
    """
    if (known := run_id(place)) or _content(place, CONFIG) is not None:
        return known  # the second: it was begun before runs had an id, and goes on as it was
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = json.dumps({"id": secrets.token_hex(8), "began": now})
    if is_bucket(place):
        Folder(str(place)).write(RUN, content)
    else:
        folder = Path(place).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RUN, content)
    return run_id(place)


def _content(place: str | Path, name: str) -> bytes | None:
    """A file of a run; None: it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return Folder(str(place)).read(name) if is_bucket(place) else (Path(place).expanduser() / name).read_bytes()
    return None


@contextlib.contextmanager
def beside(place: str | Path, *, log: Log, writes: bool = False) -> Iterator[Home]:
    """The run in `place` for who looks at it, or prepares its data, beside a training that may be going on there.

    A bucket's small files are copied into a folder of their own, which goes at the end: into the run's own folder on
    this machine the training writes, and a file that were replaced there would lose what it writes next.

    Args:
      writes: whether what is changed in that folder goes into the bucket.

    Raises:
      UserError: the place cannot be one.
      StorageError: the bucket cannot be read or written.
    """
    with contextlib.ExitStack() as held:
        own = None
        if is_bucket(place):
            copies = _copies()
            copies.mkdir(parents=True, exist_ok=True)  # what a kill leaves there goes with what nobody uses
            prefix = f"{local_name(str(place))}-beside-"
            own = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=copies)))
        yield held.enter_context(Home(place, log=log, writes=writes, folder=own))


def copied(place: str | Path, *, log: Log, step: int | None = None) -> Path:
    """The folder of a run or model on this machine; one of a bucket is copied, with one checkpoint.

    A copy is named after the checkpoint's own folder in the bucket, which no other save ever has, and the name appears
    when it is whole. Of several processes that ask for it at once one copies, the others wait.

    Args:
      step: of a bucket, the checkpoint that is copied; None: the newest.

    Raises:
      UserError: there is none, or none of that step, or the place cannot be one.
      StorageError: the bucket cannot be read.
    """
    if not is_bucket(place):
        return Home(place, log=log).folder
    copies, name = _copies(), local_name(str(place))
    home = Home(place, log=log, folder=copies / name)  # without a checkpoint
    with locked(copies / f".{name}.lock"):
        _forget_unused(copies, log=log)
        for left in copies.glob(f"{name}-*.partial-*"):  # by whoever held the lock before, and was killed
            log(f"removed {left}: it was not copied to its end")
            shutil.rmtree(left)
        reader = BucketReader(str(home.checkpoints), log=log)
        while source := reader.find(step):
            folder = copies / f"{name}-{source.name}"
            if folder.is_dir() or _copy_checkpoint(source, folder, log=log):
                os.utime(folder)  # in use
                home = Home(place, log=log, folder=folder)
                break
        if step is not None and source is None:
            raise UserError(f"{place} has no checkpoint of step {step}, only {reader.steps()}")
        home.pull()
        if not any(home.folder.iterdir()):
            raise UserError(f"{place} holds nothing: give the place of a run or of a converted model")
    return home.folder


def _copies() -> Path:
    """Where this machine keeps copies of runs and models for those who read them."""
    return cache_folder() / "copies"


def _forget_unused(copies: Path, *, log: Log) -> None:
    """Removes the copies that nobody has asked for in UNUSED_DAYS days, and those that were begun before and not ended.

    What is being copied for another run, which its own lock guards, is younger.
    """
    for folder in sorted(each for each in copies.iterdir() if each.is_dir()):
        with contextlib.suppress(FileNotFoundError):  # somebody else has just removed it
            if time.time() - folder.stat().st_mtime < UNUSED_DAYS * 86400:
                continue
            whole = ".partial-" not in folder.name
            aside = folder.rename(f"{folder}.partial-unused") if whole else folder  # whole or not there at all
            shutil.rmtree(aside, ignore_errors=True)
            why = f"nobody has asked for it in {UNUSED_DAYS} days" if whole else "it was not copied to its end"
            log(f"removed {folder}: {why}")


def _copy_checkpoint(source: Folder, folder: Path, *, log: Log) -> bool:
    """Copies a checkpoint into `folder`, which is not there yet; False: the bucket has given it up meanwhile."""
    commits, name = source.parent / "commits", source.name
    log(f"copying checkpoint {name} of {source.parent}")
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        inside = beside / CHECKPOINTS / name.partition("-")[0]
        for part in source.names():
            source.download(part, inside / part)
        if name not in commits.names():  # a run that goes on may have retired it in between
            return False
        beside.chmod(0o755)
        beside.rename(folder)
    except FileNotFoundError:
        if name in commits.names():
            raise
        return False
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def _seen(file: Path) -> _Seen:
    status = file.stat()
    return _Seen(status.st_mtime_ns, status.st_size)


def _always(name: str, before: _Seen | None, now: _Seen) -> bool:
    return True


def _needed(name: str, before: _Seen | None, now: _Seen) -> bool:
    """Whether a restart needs the file."""
    return name.split("/")[0] not in (EVENTS, PROFILE)


def _worth_it(name: str, before: _Seen | None, now: _Seen) -> bool:
    """Whether a file is small enough, or has changed enough, to go into the bucket between two commits."""
    changed = before is None or abs(now.size - before.size) > GROWTH * before.size
    return name.split("/")[0] != PROFILE and (now.size < LARGE or changed)


def _is_small(name: str) -> bool:
    """Whether a file travels with the run; checkpoints, stores and what is half written do not."""
    parts = name.split("/")
    if parts[0] == CHECKPOINTS or (parts[0] == "data" and name != PREPARED):
        return False
    return not any(part.startswith(".") or part.endswith((".partial", ".lock")) for part in parts)
