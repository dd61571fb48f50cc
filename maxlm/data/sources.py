"""Where text comes from: a source is listed once, cut into units of work, and read a unit at a time.

A source is written `stdlib`, `text:GLOB`, `jsonl:GLOB`, `parquet:GLOB` or `tfds:NAME/SPLIT`. Listing looks at names,
sizes and times only; a unit says all that a process needs in order to read its part of the source by itself.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from maxlm.checks.data import source_problem
from maxlm.data.patterns import expand, identity
from maxlm.errors import UserError

# Files that a folder stands for; text takes all that are not hidden.
ENDINGS = {"jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "parquet": (".parquet",), "text": ("",)}
# A source is cut into about this many units, so that progress moves and a kill loses little …
UNITS = 256
# … unless they get too small to be worth a file each, or too large to be read in one go.
SMALLEST_UNIT, LARGEST_UNIT = 2**20, 2**28


class SourceError(UserError):
    """A source that is not known, is not there, or lacks the text that was asked for."""


class Unit(NamedTuple):
    """A part of a source. `start` and `stop` count bytes (jsonl), row groups (parquet) or records (tfds)."""

    word: str
    files: tuple[str, ...]
    start: int
    stop: int
    size: int  # bytes on disk, for progress
    field: str


class Listing(NamedTuple):
    """A source as it is now: its units, and a hash of its names, sizes and times."""

    spec: str
    units: list[Unit]
    files: int
    size: int
    fingerprint: str


class Skip(NamedTuple):
    """A record that holds no text, and why."""

    reason: str


def list_source(spec: str, field: str) -> Listing:
    """Finds what a source consists of, without reading its text.

    Args:
      spec: The source, as in `StoreConfig.source`.
      field: Field that holds the text (jsonl, parquet, tfds).

    Raises:
      SourceError: The word is not known, nothing matches, or a package is missing.
    """
    if problem := source_problem(spec):
        raise SourceError(problem)
    word, _, rest = spec.partition(":")
    if word == "tfds":
        return _list_tfds(spec, rest, field)
    paths = _stdlib_files() if word == "stdlib" else _matches(word, rest)
    if not paths:
        raise SourceError(f"the source {spec!r} matches no files (looked from {os.getcwd()})")
    stats = [(path, _stat(path)) for path in paths]
    sized = [(path, stat.st_size) for path, stat in stats]
    unit_bytes = _unit_bytes(sum(size for _, size in sized))
    if word == "parquet":
        units = [unit for path, size in sized for unit in _parquet_units(path, size, unit_bytes, field)]
    elif word == "jsonl":
        units = [unit for path, size in sized for unit in _jsonl_units(path, size, unit_bytes, field)]
    else:
        units = _file_units(sized, unit_bytes)
    return _listing(spec, field, units, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def read_unit(unit: Unit) -> Iterator[bytes | Skip]:
    """The documents of a unit in the order of its files: bytes that are valid UTF-8 and not empty, else why not.

    Raises:
      SourceError: A file has vanished or cannot be unpacked, or the field is not there.
    """
    readers = {"stdlib": _read_files, "text": _read_files, "jsonl": _read_jsonl, "parquet": _read_parquet}
    try:
        for item in readers.get(unit.word, _read_tfds)(unit):
            if not isinstance(item, bytes):
                yield item
            elif not item:
                yield Skip("empty")
            elif not _is_utf8(item):
                yield Skip("not_utf8")
            else:
                yield item
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{', '.join(unit.files[:3])} cannot be read: {error}") from None


def _listing(spec: str, field: str, units: list[Unit], files: list[tuple[str, int, int]]) -> Listing:
    content = json.dumps([spec.partition(":")[0], field, files]).encode()
    return Listing(spec, units, len(files), sum(size for _, size, _ in files), hashlib.sha256(content).hexdigest())


def _unit_bytes(total: int) -> int:
    return min(max(total // UNITS, SMALLEST_UNIT), LARGEST_UNIT)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _need(module: str, extra: str, what: str) -> Any:
    """Imports an optional package, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise SourceError(f"{what} needs the package {name}: pip install -e '.[{extra}]'") from None


# Files found by name.


def _stdlib_files() -> list[str]:
    return [
        path
        for path in _walk(sysconfig.get_path("stdlib"), leave_out=("site-packages", "dist-packages"))
        if path.endswith(".py") and os.path.isfile(path)  # distributions link to files that other packages bring
    ]


def _matches(word: str, pattern: str) -> list[str]:
    try:
        matches = [os.path.abspath(match) for match in expand(os.path.expanduser(pattern))]
    except OSError as error:
        _unreadable(error)
    found: set[str] = set()
    for path in matches:
        if os.path.isdir(path):
            found.update(file for file in _walk(path) if file.endswith(ENDINGS[word]))
        elif _is_text(path):
            found.add(path)
    return sorted(found)


def _walk(folder: str, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Every file below a folder, sorted, without hidden files and folders; links to folders are followed.

    Links that lead nowhere are among them.

    A folder that is there under several names is taken once, so that links may lead in a circle.

    Raises:
      SourceError: A folder cannot be read: text would be missing without a word.
    """
    found, seen = [], {_identity(folder)}
    for parent, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        wanted = sorted(name for name in folders if name not in leave_out and not name.startswith("."))
        folders[:] = []
        for name in wanted:
            if (identity := _identity(os.path.join(parent, name))) not in seen:
                seen.add(identity)
                folders.append(name)
        paths = (os.path.join(parent, name) for name in files if not name.startswith("."))
        found += [path for path in paths if _is_text(path)]
    return sorted(found)


def _is_text(path: str) -> bool:
    """Whether a file, or what was one, is there: sockets and devices are none, of a broken link reading will tell."""
    return os.path.isfile(path) or not os.path.exists(path)


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        _unreadable(error)


def _identity(folder: str) -> tuple[int, int]:
    """The same under all names that a folder has."""
    return identity(_stat(folder))


def _unreadable(error: OSError) -> NoReturn:
    link = f" (a link to {os.readlink(error.filename)})" if os.path.islink(error.filename) else ""
    raise SourceError(f"{error.filename}{link} cannot be read: {error.strerror}") from None


# Whole files: each is one document.


def _file_units(sized: list[tuple[str, int]], unit_bytes: int) -> list[Unit]:
    units: list[Unit] = []
    group: list[str] = []
    total = 0
    for number, (path, size) in enumerate(sized, start=1):
        group.append(path)
        total += size
        if total >= unit_bytes or number == len(sized):
            units.append(Unit("text", tuple(group), 0, 0, total, ""))
            group, total = [], 0
    return units


def _read_files(unit: Unit) -> Iterator[bytes]:
    for path in unit.files:
        yield Path(path).read_bytes()


# JSON lines: each holds a document in one field.


def _jsonl_units(path: str, size: int, unit_bytes: int, field: str) -> list[Unit]:
    if path.endswith((".gz", ".zst")):  # packed files can only be read from their beginning
        return [Unit("jsonl", (path,), 0, 0, size, field)]
    starts = range(0, size, unit_bytes)
    return [
        Unit("jsonl", (path,), start, min(start + unit_bytes, size), min(unit_bytes, size - start), field)
        for start in starts
    ]


def _read_jsonl(unit: Unit) -> Iterator[bytes | Skip]:
    for line in _jsonl_lines(unit):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            yield Skip("not_json")
            continue
        text = record.get(unit.field) if isinstance(record, dict) else None
        yield _as_bytes(text)


def _jsonl_lines(unit: Unit) -> Iterator[bytes]:
    path = unit.files[0]
    if path.endswith(".gz"):
        with gzip.open(path) as file:
            yield from file
    elif path.endswith(".zst"):
        yield from _lines_of(_unpacked(path))
    else:
        with open(path, "rb") as file:
            position = unit.start
            if position:  # a line belongs to the unit that its first byte lies in
                file.seek(position - 1)
                position += len(file.readline()) - 1
            while position < unit.stop and (line := file.readline()):
                position += len(line)
                yield line


def _unpacked(path: str, block: int = 2**18) -> Iterator[bytes]:
    """What a .zst file holds, in all of its frames. The package's own reader ends without a word where a file does."""
    zstandard = _need("zstandard", "data", "a .zst file")
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    with open(path, "rb") as file:
        while data := file.read(block):
            while data:
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise SourceError(f"{path} cannot be unpacked: {error}") from None
                data, begun = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if begun:
        raise SourceError(f"{path} cannot be unpacked: it ends in the middle of a frame; copy it anew")


def _lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a text that comes in blocks."""
    rest = b""
    for data in blocks:
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    yield rest


def _as_bytes(text: Any) -> bytes | Skip:
    """A field's value as a document."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        return Skip("no_text")
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return Skip("not_utf8")


# Parquet: each row holds a document in one column.


def _parquet_units(path: str, size: int, unit_bytes: int, field: str) -> list[Unit]:
    parquet = _need("pyarrow.parquet", "data", "a parquet source")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own exceptions, which cannot be named before it is there
        raise SourceError(f"{path} is no parquet file: {error}") from None
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise SourceError(f"{path} has no column {field!r} but {', '.join(names)}: set the store's text_field")
        groups = file.metadata.num_row_groups
    step = max(1, groups * unit_bytes // max(size, 1))
    starts = range(0, groups, step)
    return [
        Unit("parquet", (path,), start, min(start + step, groups), size * min(step, groups - start) // groups, field)
        for start in starts
    ]


def _read_parquet(unit: Unit) -> Iterator[bytes | Skip]:
    pyarrow, parquet = (_need(name, "data", "a parquet source") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(unit.files[0]) as file:
            groups = list(range(unit.start, unit.stop))
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[unit.field], use_threads=False):
                for value in batch.column(0):
                    try:
                        yield _as_bytes(value.as_py())
                    except UnicodeDecodeError:
                        yield Skip("not_utf8")
    except pyarrow.ArrowException as error:
        raise SourceError(f"{unit.files[0]} cannot be read: {error}") from None


# TensorFlow Datasets, read as array records without TensorFlow.


def _list_tfds(spec: str, name: str, field: str) -> Listing:
    tfds = _need("tensorflow_datasets", "tfds", "a tfds source")
    dataset, _, split = name.rpartition("/")
    if not dataset:
        raise SourceError(f"the source {spec!r} should read tfds:NAME/SPLIT (NAME may also be a prepared folder)")
    try:
        if os.path.isdir(dataset) or os.path.isabs(dataset):
            builder = tfds.builder_from_directory(dataset)
        else:
            builder = tfds.builder(dataset, file_format="array_record")
            if isinstance(builder, tfds.core.BeamBasedBuilder) and not builder.is_prepared():
                raise _to_prepare(spec, dataset, split, why="TFDS makes it with Apache Beam, often on many machines")
            builder.download_and_prepare()
        info = builder.info.splits[split]
        features = list(builder.info.features or ())
    except SourceError:
        raise
    except tfds.core.DatasetNotFoundError:  # whose message lists all names that there are
        why = "TFDS knows no such name, or needs TensorFlow to make it"
        raise _to_prepare(spec, dataset, split, why=why) from None
    except Exception as error:  # tfds raises its own and many others for what a name can lack
        raise SourceError(f"the source {spec!r} cannot be opened: {error}") from None
    if field not in features:
        raise SourceError(f"{spec} has no field {field!r} but {', '.join(features)}: set the store's text_field")
    records, size, folder = info.num_examples, info.num_bytes, str(builder.data_path)
    step = max(1, records * _unit_bytes(size) // max(size, 1))
    units = [
        Unit(
            "tfds",
            (folder, split),
            start,
            min(start + step, records),
            size * min(step, records - start) // records,
            field,
        )
        for start in range(0, records, step)
    ]
    stats = [(path, _stat(path)) for path in _walk(folder)]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return _listing(spec, f"{field} of {split}", units, files)


def _to_prepare(spec: str, dataset: str, split: str, *, why: str) -> SourceError:
    """A data set that this program does not make, such as C4, and how to come by it."""
    return SourceError(
        f"the source {spec!r} is not there, and {why}: prepare it elsewhere (tfds build {dataset} "
        f"--file_format=array_record) and name its folder, as in tfds:/data/{dataset}/VERSION/{split}"
    )


def _read_tfds(unit: Unit) -> Iterator[bytes | Skip]:
    tfds = _need("tensorflow_datasets", "tfds", "a tfds source")
    folder, split = unit.files
    records = tfds.builder_from_directory(folder).as_data_source(split=split)
    for index in range(unit.start, unit.stop):
        yield _as_bytes(records[index][unit.field])
