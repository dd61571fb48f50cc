"""Finding, checking and reading checkpoints on disk; nothing in this file changes a file. (In buckets: bucket.py.)

A checkpoint is the folder `<directory>/<step>` (docs/checkpoints.md):

    commit_success.txt     written by Orbax when all the rest is there
    record/metadata        JSON: step, time, shapes and dtypes of all arrays, the caller's metadata, and the SHA-256 of
                           all that
    state/                 the arrays by path, and `digests`, uint32 (N, 2), in the order of the record's arrays
    score                  held-out bits per byte, once they are known
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from maxlm.checkpoint.digest import array_paths, digest_array
from maxlm.cluster import decided, meet, say_here
from maxlm.errors import UserError
from maxlm.storage import StorageError, is_bucket
from maxlm.tree import from_paths, paths

RECORD_ITEM, STATE_ITEM = "record", "state"
COMMIT_MARKER = "commit_success.txt"
PARAMS = "params"
RECORD_FILE = "metadata"  # the name that Orbax's JSON handler gives
SCORE_FILE = "score"
T = TypeVar("T")
_FORMAT = 1
_STEP_NAME = re.compile(r"0|[1-9]\d*")
_NAMED = 4  # altered arrays that a message names at most
_REASON = 300  # characters of an error that a message repeats at most
_LISTED = 12  # differing arrays that a message lists at most

digest = jax.jit(digest_array)


def digest_each(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The digest of each array, computed on its devices; on several CPU devices one after the other.

    Those share a pool of threads, in which many programs that each wait for all devices can starve one another.
    """
    found = {}
    for path, x in arrays.items():
        found[path] = digest(x)
        devices: list[Any] = list(x.sharding.device_set)
        if len(devices) > 1 and devices[0].platform == "cpu":
            found[path].block_until_ready()
    return found


class CheckpointError(UserError):
    """A checkpoint that cannot be used as asked; the message says what to do."""


class NoneWhole(CheckpointError):
    """All the checkpoints that were asked for are damaged."""


class ArrayInfo(NamedTuple):
    """What a record says of one array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Record(NamedTuple):
    """All of a checkpoint but its arrays."""

    step: int
    saved_at: float  # seconds since the epoch
    arrays: dict[str, ArrayInfo]
    metadata: dict[str, Any]


class Restored(NamedTuple):
    """What a checkpoint held, proven by its digests."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Damage(NamedTuple):
    """A checkpoint that did not stand the test, and why."""

    step: int
    path: Path
    reason: str

    def __str__(self) -> str:
        return f"checkpoint {self.step} is damaged: {self.reason} ({self.path})"


class Search(NamedTuple):
    """The newest whole checkpoint and the damaged ones that are newer than it."""

    restored: Restored
    damaged: list[Damage]


class CheckpointReader:
    """Reads the checkpoints of a run that another process may still be training.

    Args:
        directory: folder of the run's checkpoints on a local or mounted disk; it need not exist. For one in a bucket
            `bucket.open_reader` gives the right class.
        log: takes one line of text for each damaged checkpoint passed over.
    """

    def __init__(self, directory: str | Path, *, log: Callable[[str], None] = print):
        quiet_orbax()
        self.directory: Any = self._place(directory)
        self._log = log

    def _place(self, directory: str | Path) -> Any:
        if is_bucket(directory):
            raise ValueError(f"{directory} is no folder on a disk: use maxlm.checkpoint.bucket")
        return Path(directory).expanduser().absolute()

    def steps(self) -> list[int]:
        """Steps that have a committed folder, ascending. Whether it is whole shows only when it is read."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if _STEP_NAME.fullmatch(p.name) and p.is_dir())

    def restore_params(
        self, abstract_params: Any, *, step: int | None = None, part: str = PARAMS, leaving: str | None = None
    ) -> Restored | None:
        """The parameters alone, for generation and evaluation.

        Args:
            abstract_params: pytree of `jax.ShapeDtypeStruct` with shardings on any mesh.
            step: the checkpoint wanted; None: the newest whole one.
            part: the part of the saved state that holds them; another one for a moving average.
            leaving: what the paths of those begin with that may be saved, and are not asked for; None: there are none.

        Returns:
            None if there is no checkpoint at all.

        Raises:
            CheckpointError: if the parameters saved are others, or no checkpoint that was asked for is whole.
        """
        left = None if leaving is None else f"{part}/{leaving}"
        search = self._search(abstract_params, step=step, prefix=f"{part}/", left=left)
        if search is None:
            return None
        return search.restored

    def restore_state(self, abstract_state: Any, *, step: int) -> Restored:
        """The whole state of one checkpoint, for a look at it beside the run.

        Raises:
            CheckpointError: it is not there or has other arrays.
            NoneWhole: it is damaged.
        """
        search = self._search(abstract_state, step=step, prefix="")
        assert search is not None  # an absent step has raised
        return search.restored

    def path(self, step: int) -> Any:
        """The folder of a step."""
        return self.directory / str(step)

    def record(self, step: int) -> Record:
        """The record of a step.

        Raises:
            OSError, ValueError: if it is missing, unreadable or altered.
        """
        if not (self.path(step) / COMMIT_MARKER).is_file():
            raise FileNotFoundError(f"its commit marker {COMMIT_MARKER} is missing")
        file = self.path(step) / RECORD_ITEM / RECORD_FILE
        if not file.is_file():
            raise FileNotFoundError(f"its record {RECORD_ITEM}/{RECORD_FILE} is missing")
        return checked_record(file.read_bytes(), step)

    def score_of(self, step: int) -> float | None:
        """The held-out bits per byte that were noted for a checkpoint; None: none were.

        Raises:
            OSError, ValueError: if they cannot be read.
        """
        try:
            return float(self._read_score(step))
        except FileNotFoundError:
            return None

    def _read_score(self, step: int) -> bytes:
        return (self.path(step) / SCORE_FILE).read_bytes()

    def _load(self, record: Record, wanted: Mapping[str, Any]) -> Loaded:
        """The wanted arrays of a checkpoint, not yet proven."""
        return _load(self.path(record.step) / STATE_ITEM, record, wanted)

    def _aside(self) -> list[str]:
        """Names of the checkpoints that were set aside as damaged."""
        return sorted(p.name for p in self.directory.glob("*.damaged-*")) if self.directory.is_dir() else []

    def _search(self, abstract: Any, *, step: int | None, prefix: str, left: str | None = None) -> Search | None:
        """The newest whole checkpoint among those asked for; None if there is no checkpoint at all."""
        damaged: list[Damage] = []
        candidates = decided(lambda: self._candidates(step), error=CheckpointError)
        while candidates:
            candidate = candidates.pop()
            with jax.transfer_guard("allow"):  # meant, whatever the caller guards against
                result = self._read(candidate, abstract, prefix, left)
            if isinstance(result, Restored):
                return Search(result, damaged)
            listed = decided(lambda: self._candidates(step), error=CheckpointError)
            if candidate in listed:
                damaged.append(result)
                self._log(str(result))
            else:  # a run that goes on has retired it meanwhile, and may have saved newer ones
                candidates = [other for other in listed if all(other != damage.step for damage in damaged)]
        if damaged:
            raise self._none_whole(damaged)
        return None

    def _candidates(self, step: int | None) -> list[int]:
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise CheckpointError(f"there is no checkpoint of step {step} in {self.directory}; there are {steps}")
            return [step]
        if not steps and (aside := self._aside()):
            raise CheckpointError(
                f"{self.directory} holds nothing but damaged checkpoints ({', '.join(aside)}); put a copy of one in "
                "its place, or delete them or choose another workdir to start anew"
            )
        return steps

    def _none_whole(self, damaged: Sequence[Damage]) -> NoneWhole:
        listed = "".join(f"\n  {d.step}: {d.reason}" for d in damaged)
        return NoneWhole(
            f"no whole checkpoint was found in {self.directory}:{listed}\nIf the disk is at fault, mend it and run "
            "again; else put a copy of one in its place, or delete them or choose another workdir to start anew. "
            "Nothing was deleted or renamed."
        )

    def _read(self, step: int, abstract: Any, prefix: str, left: str | None) -> Restored | Damage:
        """Reads and proves one checkpoint. All processes return the same kind of answer."""
        wanted = {prefix + path: leaf for path, leaf in array_paths(abstract).items()}
        loaded: Loaded | None = None
        problem: str | None = None
        try:
            record = self.record(step)
            self._check_structure(record, wanted, prefix, left)
            loaded = self._load(record, wanted)
        except (CheckpointError, StorageError, jax.errors.JaxRuntimeError):
            raise  # another model, or trouble with a bucket or a device: no fault of the checkpoint's
        except Exception as error:  # torn files surface as whatever the storage library happens to trip over
            problem = describe(error)
        problem = agree(problem)
        if loaded is not None and problem is None:
            problem = agree(altered(loaded))
        if loaded is None or problem is not None:
            return Damage(step, self.path(step), problem or "it cannot be read")
        state = jax.tree.unflatten(jax.tree.structure(abstract), [loaded.arrays[path] for path in wanted])
        return Restored(step, state, loaded.record.metadata)

    def _check_structure(self, record: Record, wanted: Mapping[str, Any], prefix: str, left: str | None) -> None:
        """Refuses a state of another shape: that is another config, not damage."""
        saved = {path: info for path, info in record.arrays.items() if path.startswith(prefix)}
        if left is not None:
            saved = {path: info for path, info in saved.items() if not path.startswith(left)}
        asked = {path: array_info(leaf) for path, leaf in wanted.items()}
        differences = [f"{path}: saved, but not asked for" for path in saved if path not in asked]
        differences += [f"{path}: asked for, but not saved" for path in asked if path not in saved]
        differences += [
            f"{path}: saved as {saved[path]}, asked for as {info}"
            for path, info in asked.items()
            if path in saved and saved[path] != info
        ]
        if differences:
            more = f"\n  and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
            listed = "".join(f"\n  {line}" for line in differences[:_LISTED])
            raise CheckpointError(
                f"checkpoint {record.step} ({self.path(record.step)}) was saved with another model or optimizer:"
                f"{listed}{more}\nTrain on with the config that is saved in it, or start anew in another workdir."
            )


def record_to_json(record: Record) -> dict[str, Any]:
    """A record as JSON, sealed with the SHA-256 of its content.

    Raises:
        TypeError: if the metadata cannot be written as JSON.
    """
    arrays = {path: [list(info.shape), info.dtype] for path, info in record.arrays.items()}
    # The way through text turns tuples and integer keys into what reading will give.
    content = json.loads(json.dumps({**record._asdict(), "arrays": arrays, "format": _FORMAT}))
    return {"content": content, "sha256": _seal(content)}


def record_from_json(sealed: Any) -> Record:
    """The record that `record_to_json` sealed.

    Raises:
        ValueError: if the seal is broken or the format is another.
    """
    if not isinstance(sealed, dict) or not isinstance(content := sealed.get("content"), dict):
        raise ValueError("its record is no record")
    if _seal(content) != sealed.get("sha256"):
        raise ValueError("its record was altered: the SHA-256 differs")
    if content["format"] != _FORMAT:
        raise ValueError(
            f"its record has format {content['format']}, expected {_FORMAT}: use the version that wrote it"
        )
    arrays = {path: ArrayInfo(tuple(shape), dtype) for path, (shape, dtype) in content["arrays"].items()}
    return Record(content["step"], content["saved_at"], arrays, content["metadata"])


def checked_record(content: bytes, step: int) -> Record:
    """The record of a step from the bytes of its file. Raises ValueError if it is damaged or another step's."""
    record = record_from_json(json.loads(content.decode()))
    if record.step != step:
        raise ValueError(f"its record is that of step {record.step}")
    return record


def array_info(leaf: Any) -> ArrayInfo:
    """Shape and dtype of an array, concrete or abstract."""
    return ArrayInfo(tuple(leaf.shape), str(np.dtype(leaf.dtype)))


def describe(error: BaseException) -> str:
    """An exception as a short reason: its first cause, without the storage library's specs."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0][:_REASON]
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"


def quiet_orbax() -> None:
    """Keeps Orbax's notes, and the tasks that it abandons after a failed read, out of the log; its errors stay."""
    for logger, keep in ((logging.getLogger("absl"), _is_no_note), (logging.getLogger("asyncio"), _is_not_abandoned)):
        if keep not in logger.filters:
            logger.addFilter(keep)


def _is_no_note(line: logging.LogRecord) -> bool:
    return line.levelno >= logging.ERROR or "orbax" not in line.pathname


def _is_not_abandoned(line: logging.LogRecord) -> bool:
    text = line.getMessage()
    return not ("exception was never retrieved" in text and "tensorstore" in text)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Loaded(NamedTuple):
    """What came from the disk, not yet proven: digests uint32 (N, 2) of all N arrays of the record."""

    record: Record
    arrays: dict[str, jax.Array]
    digests: np.ndarray[Any, np.dtype[np.uint32]]


def _load(folder: Path, record: Record, wanted: Mapping[str, Any]) -> Loaded:
    """The wanted arrays on their devices, and the digests of all arrays of the record.

    Orbax's handler is called without its manager: that one ends with a barrier, at which the other processes would
    wait for one whose read failed.
    """
    digests = ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.uint32)
    arguments = {
        path: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            global_shape=tuple(leaf.shape),
            dtype=leaf.dtype,
        )
        for path, leaf in wanted.items()
    }
    restored = ocp.PyTreeCheckpointHandler().restore(
        folder,
        args=ocp.args.PyTreeRestore(
            item={"arrays": from_paths(wanted), "digests": np.zeros((len(record.arrays), 2), np.uint32)},
            restore_args={"arrays": from_paths(arguments), "digests": digests},
            partial_restore=True,
        ),
    )
    arrays = paths(restored["arrays"])
    for path, leaf in wanted.items():
        if not isinstance(arrays.get(path), jax.Array) or array_info(arrays[path]) != array_info(leaf):
            raise ValueError(f"the array {path} is missing or has another shape than its record says")
    if np.shape(restored["digests"]) != (len(record.arrays), 2):
        raise ValueError("its digests are missing or of another number than its arrays")
    return Loaded(record, arrays, restored["digests"])


def altered(loaded: Loaded) -> str | None:
    """Which arrays differ from their digests, in words; None if none does."""
    saved = dict(zip(loaded.record.arrays, loaded.digests, strict=True))
    found = digest_each(loaded.arrays)
    altered = [path for path, value in found.items() if not np.array_equal(np.asarray(value), saved[path])]
    if not altered:
        return None
    more = ", ..." if len(altered) > _NAMED else ""
    return f"{len(altered)} of {len(found)} arrays differ from their digests: {', '.join(altered[:_NAMED])}{more}"


def agree(problem: str | None) -> str | None:
    """One answer for all processes: a problem of one is a problem of all. What it is, that one says by itself."""
    if jax.process_count() == 1:
        return problem
    meet("agree")  # one whose read or write fails comes long before those that wait for it
    with jax.transfer_guard("allow"):  # meant, whatever the training loop guards against
        flags = np.ravel(multihost_utils.process_allgather(np.asarray(problem is not None)))
    if problem is not None and jax.process_index() and not flags.all():
        say_here(problem)
    if problem is None and flags.any():
        return f"process {int(np.argmax(flags))} has trouble with it"
    return problem


def all_do(work: Callable[[], T] | None, *, error: type[OSError] = OSError) -> T | None:
    """Does some work on each process, and lets none go on, into a collective above all, that others do not come to.

    Args:
      work: this process's, in which no collective takes part, and its outcome; None: it has nothing to do.
      error: raised where the work has failed, or that of another process.
    """
    found, trouble = None, None
    try:
        found = work() if work else None
    except Exception as problem:  # torn files surface as whatever the storage library happens to trip over
        trouble = problem
    text = agree(None if trouble is None else describe(trouble))
    if isinstance(trouble, error):
        raise trouble
    if text is not None:
        raise error(text) from trouble
    return found
