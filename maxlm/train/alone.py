"""One training at a time in a run's folder: two would remove unfinished saves, and cut metrics, of each other."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from maxlm.cluster import decided
from maxlm.errors import UserError
from maxlm.files import NoLocks, try_lock

LOCK = ".train.lock"
WAIT_SECONDS = 100.0  # for one that is being killed; a file server forgets the locks of a machine that died in 90
_POLL_SECONDS = 0.5

Log = Callable[[str], None]


@contextlib.contextmanager
def alone(folder: Path, *, log: Log) -> Iterator[None]:
    """Keeps every other training out of a run for as long as it lasts. All processes call it; process 0 has the lock.

    Whoever holds it is waited for, since a restart may come while the process before it is still being killed.

    Args:
      folder: of the run, on this machine; made if missing. Of a run in a bucket others on this machine are kept out.

    Raises:
      UserError: on every process: another training does not leave; its process and host are named.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            file = _lock(folder, log=log)
            if file is not None:
                held.enter_context(file)

        decided(take)
        yield


def _lock(folder: Path, *, log: Log) -> IO[str] | None:
    """The lock with this process's name in it; None: the file system has no locks, which is told."""
    folder.mkdir(parents=True, exist_ok=True)
    path, until, told = folder / LOCK, time.monotonic() + WAIT_SECONDS, False
    while True:
        try:
            file = try_lock(path)
        except NoLocks as error:
            log(f"{folder} is on a file system without locks ({error}): see that nothing else trains there")
            return None
        if file is not None:
            with contextlib.suppress(OSError):  # a full disk: then nobody is named
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            return file
        holder = path.read_text(errors="replace").strip() or "another process"
        if time.monotonic() >= until:
            raise UserError(
                f"{holder} trains in {folder}, and two would destroy each other's files; end that one, wait for it, or "
                "give another --workdir"
            )
        if not told:
            log(f"{holder} trains in {folder}: waiting up to {WAIT_SECONDS:g} s for it to leave")
            told = True
        time.sleep(_POLL_SECONDS)
