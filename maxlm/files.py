"""Files that are whole or absent, never half there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from maxlm.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes beside `path`, makes sure that it is on the disk, and moves it into place."""
    staged = path.with_name(f".{path.name}.partial")
    with open(staged, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def write_asked(path: str | None, content: str) -> None:
    """Writes what a command was asked to write besides what it prints; no path: nothing.

    Raises:
      UserError: the file cannot be written.
    """
    if not path:
        return
    try:
        write_atomically(Path(path).expanduser().absolute(), content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); give a file in a folder that exists") from error
    print(f"written: {path}", flush=True)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
