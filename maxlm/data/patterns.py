"""Patterns of file names, as `glob` reads them, but with nothing left out in silence.

`glob` passes over a folder that it cannot read, so that its text would be missing without a word, and follows links in
circles until the system refuses the name: a file would come under about forty names, and with two such links under
more than can be listed.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
from collections.abc import Iterator

# What the system says of a name behind which there is nothing; whatever else it says, there may be text.
_NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def expand(pattern: str) -> list[str]:
    """What `glob.glob(pattern, recursive=True)` matches, in any order.

    Raises:
      OSError: a folder that may hold matches cannot be read; the error names it.
    """
    return [match for match in _expand(pattern) if match]


def identity(status: os.stat_result) -> tuple[int, int]:
    """The same under all names that a folder has."""
    return status.st_dev, status.st_ino


def _expand(pattern: str, *, folders_only: bool = False) -> Iterator[str]:
    folder, name = os.path.split(pattern)
    if not glob.has_magic(pattern):
        if _is_there(pattern):
            yield pattern
        return
    for parent in _expand(folder, folders_only=True) if glob.has_magic(folder) else [folder]:
        if name == "**":
            names = ["", *_below(parent, folders_only=folders_only)]
        elif glob.has_magic(name):
            entries = _entries(parent, hidden=name.startswith("."))
            names = fnmatch.filter([each.name for each in entries if not folders_only or _is_folder(each)], name)
        else:
            names = [name] if _is_there(os.path.join(parent, name)) else []
        yield from (os.path.join(parent, each) for each in names)


class _Circle(Exception):
    """A link leads to a folder that it lies in."""


def _below(folder: str, *, folders_only: bool) -> list[str]:
    """What is below a folder and not hidden, by the way from there; links to folders are followed.

    A folder that is there under several names is taken under each, as `glob` does. Where links lead in a circle, and
    there are names without end, each folder is taken once.
    """
    try:
        above = frozenset({identity(os.stat(folder or os.curdir))})
    except OSError as error:
        _pass_over(error)
        return []
    try:
        return list(_descend(folder, above, None, folders_only=folders_only))
    except _Circle:
        return list(_descend(folder, above, set(above), folders_only=folders_only))


def _descend(
    folder: str, above: frozenset[tuple[int, int]], taken: set[tuple[int, int]] | None, *, folders_only: bool
) -> Iterator[str]:
    """`_below`.

    Args:
      above: the folders that this one lies in, and itself.
      taken: those that are not taken again; None: a circle is to be found.
    """
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        if not _is_folder(entry):
            if not folders_only:
                yield entry.name
            continue
        path = os.path.join(folder, entry.name)
        this = identity(os.stat(path))
        if taken is None and this in above:
            raise _Circle
        if taken is not None:
            if this in taken:
                continue
            taken.add(this)
        yield entry.name
        further = _descend(path, above | {this}, taken, folders_only=folders_only)
        yield from (os.path.join(entry.name, each) for each in further)


def _entries(folder: str, *, hidden: bool = False) -> list[os.DirEntry[str]]:
    """What lies in a folder; [] where there is none."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            return [entry for entry in entries if hidden or not entry.name.startswith(".")]
    except OSError as error:
        _pass_over(error)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one."""
    try:
        return entry.is_dir()
    except OSError as error:
        _pass_over(error)
        return False


def _is_there(path: str) -> bool:
    """Whether there is such a name, be it of a link that leads nowhere."""
    try:
        os.lstat(path)
    except OSError as error:
        _pass_over(error)
        return False
    return True


def _pass_over(error: OSError) -> None:
    if error.errno not in _NOTHING_THERE:
        raise error
