"""Token stores in buckets: each file is copied to this machine when it is first read, and proved before it is used.

Memory cannot map what is in a bucket. The copies are kept by the store's fingerprint, so that runs share them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maxlm.data.workers import Lines, note
from maxlm.files import file_digest, locked
from maxlm.storage import Folder, StorageError, cache_folder, on_this_machine

MANIFEST = "manifest.json"
ABANDONED_SECONDS = 3600.0  # after which a file that was not written any more is left over; a piece takes minutes


class Staged:
    """The files of a store in a bucket, as copies on this machine, which threads and processes may ask for at once.

    Attributes:
      came_on: called when a part of a file has come, by the thread that waits for the file.

    Args:
      remote: the store.
      manifest: what it says of itself.
    """

    def __init__(self, remote: Folder, manifest: Mapping[str, Any]):
        self.remote = remote
        self.folder = copies_of(manifest["fingerprint"])
        _remove_abandoned(self.folder)
        self.came_on: Callable[[], None] = lambda: None
        self._proven: set[str] = set()

    def file(self, name: str, *, sha256: str = "", size: int = 0) -> Path:
        """The copy of a file: made now where there is none, and compared with its SHA-256 once in each process.

        Of all who ask for it on this machine one copies, and the others wait.

        Args:
          size: bytes of the file, where that is known: then it is told how far a long copy is.

        Raises:
          FileNotFoundError: the store has no such file.
          StorageError: the bucket cannot be read, or holds other bytes; or there is no room for the copy.
        """
        copy = self.folder / name
        if name in self._proven:
            return copy
        with on_this_machine(copy):
            if not _is_whole(copy, sha256):
                with locked(self.folder / f".{name}.lock"):
                    if not _is_whole(copy, sha256):
                        self._copy(name, copy, sha256=sha256, size=size)
            self._proven.add(name)
        self.came_on()
        return copy

    def again(self, name: str) -> None:
        """Copies a file anew whose copy has proved damaged, where no SHA-256 is known that tells.

        Raises: as `file`.
        """
        copy = self.folder / name
        with on_this_machine(copy), locked(self.folder / f".{name}.lock"):
            self._copy(name, copy, sha256="", size=0)

    def _copy(self, name: str, copy: Path, *, sha256: str, size: int) -> None:
        lines = Lines(f"copying {name} of {self.remote}", size)

        def came_on(piece: int) -> None:
            self.came_on()
            if size:
                lines.advance(piece)

        self.remote.download(name, copy, sha256=sha256, came_on=came_on)


def _is_whole(copy: Path, sha256: str) -> bool:
    """Whether a copy is there, and is the one that is wanted where that is known."""
    return copy.is_file() and (not sha256 or file_digest(copy) == sha256)


def _remove_abandoned(folder: Path) -> None:
    """Removes what a process was copying when it was killed; one that lives, here or on another host, writes on."""
    for left in folder.glob(".*.*"):
        with contextlib.suppress(FileNotFoundError):  # it has just been moved into its place
            if left.name.rpartition(".")[2].isdigit() and time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()
                note(f"removed {left}: it was not copied to its end")


def copies_of(fingerprint: str) -> Path:
    """Where the copies of a store's files are kept."""
    return cache_folder() / "stores" / fingerprint


def read_manifest(remote: Folder) -> bytes:
    """The manifest of a store in a bucket. Raises FileNotFoundError where there is no store, whole."""
    return remote.read(MANIFEST)


def has_store(remote: Folder) -> bool:
    """Whether there is a store, whole."""
    try:
        read_manifest(remote)
    except StorageError:
        raise
    except FileNotFoundError:
        return False
    return True


def publish(store: Path, remote: Folder) -> None:
    """Copies a finished store into a bucket, its manifest last.

    What was interrupted is no store, and the next call writes the same again.

    Raises:
      StorageError: the bucket does not take it: a store of too many documents before any of it was copied.
    """
    files = sorted(path for path in store.iterdir() if path.is_file() and path.name != MANIFEST)
    try:
        for file in files:
            remote.check_size(file)
    except StorageError as error:
        raise StorageError(
            f"{error}: make several stores of parts of the source, or one in a folder; this one is whole in {store}"
        ) from None
    for file in files:
        remote.upload(file, file.name)
    remote.upload(store / MANIFEST, MANIFEST)


def keep_as_copies(store: Path) -> None:
    """Moves the files of a store that is in a bucket now to where its copies are kept; a kill may cut it off."""
    if (store / MANIFEST).is_file():  # which goes last
        copies = copies_of(json.loads((store / MANIFEST).read_text(encoding="utf-8"))["fingerprint"])
        copies.mkdir(parents=True, exist_ok=True)
        for file in sorted(store.iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(copies / file.name)
    shutil.rmtree(store)


def fetch_or_none(remote: Folder, name: str, file: Path) -> Path | None:
    """A small file of a bucket, copied here; None where there is none."""
    try:
        remote.download(name, file)
    except StorageError:
        raise
    except FileNotFoundError:
        return None
    return file
