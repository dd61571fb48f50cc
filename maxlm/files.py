"""Files that are whole or absent, never half there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from maxlm.errors import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes beside `path`, makes sure that it is on the disk, and moves it into place."""
    _move_written(path.with_name(f".{path.name}.partial"), path, content)


def write_among_others(path: Path, content: str | bytes) -> None:
    """Like `write_atomically`, where another process may be writing the same file; the folder is made if missing.

    What it writes beside has a number drawn for it: containers that share a disk have processes of the same number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _move_written(path.with_name(f".{path.name}.{secrets.randbits(64)}"), path, content)


def _move_written(beside: Path, path: Path, content: str | bytes) -> None:
    """Writes `beside`, makes sure that it is on the disk, and moves it to `path`: what is there outlives a crash."""
    with open(beside, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


class NoLocks(OSError):
    """The file system has no locks, as Lustre without its option flock."""


@contextlib.contextmanager
def locked(path: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the file `path` for this process alone. The file stays: who waits for it would not see another one.

    Where the file system has no locks it says so, and goes on without.

    Args:
      waiting: called before it waits for another process that holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file: contextlib.AbstractContextManager[Any] | None
    try:
        file = try_lock(path)
    except NoLocks as error:
        said = f"{path.parent} is on a file system without locks ({error}): see that nothing else writes there"
        print(said, file=sys.stderr, flush=True)
        file = contextlib.nullcontext()
    if file is None:
        waiting()
        file = path.open("a", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
    with file:
        yield


def try_lock(path: Path) -> IO[str] | None:
    """The file `path`, locked for as long as it is open here or in a child that inherits it; None: another has it.

    Raises:
      OSError: it cannot be opened.
      NoLocks: the file system has none.
    """
    file = path.open("a", encoding="utf-8")  # what its holder has written stays
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException as error:
        file.close()
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            raise NoLocks(error.errno, error.strerror) from None
        raise
    return file


def write_asked(path: str | None, content: str) -> None:
    """Writes what a command was asked to write besides what it prints; no path: nothing.

    Raises:
      UserError: the file cannot be written.
    """
    if not path:
        return
    with asked_file(path) as place:
        write_atomically(place, content)
    print(f"written: {path}", flush=True)


@contextlib.contextmanager
def asked_file(path: str) -> Iterator[Path]:
    """The place of a file that a command was asked for, to be written inside.

    Raises:
      UserError: what is done inside cannot write it.
    """
    try:
        yield _place(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); give a file in a folder that exists") from error


def check_asked(*paths: str | None) -> None:
    """Sees before long work whether its results can be written; None is one that was not asked for.

    Raises:
      UserError: the place is a folder, or lies in none that can be written.
    """
    for path in filter(None, paths):
        place = _place(path)
        if place.is_dir():
            raise UserError(f"{path} is a folder; give a file in it")
        if not (place.parent.is_dir() and os.access(place.parent, os.W_OK)):
            raise UserError(f"{path} cannot be written; give a file in a folder that exists and that you may write")


def _place(path: str) -> Path:
    return Path(path).expanduser().absolute()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
