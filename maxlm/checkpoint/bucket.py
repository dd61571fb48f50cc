"""Checkpoints in a bucket, written and read by each process for itself, without a disk that all of them see.

    checkpoints/
      commits/1500-18c3f2a1b2c-3     written last: this name is what makes a checkpoint
      1500-18c3f2a1b2c-3/            what it consists of, as on a disk (docs/checkpoints.md); each save has a folder
        parts/00002                  of its own. Process 2 has written all that it has to
      begun/1500-18c3f2a1b2c-3       a folder that may hold something: without a commit, the next start removes it

Orbax writes to a folder of another name and renames it, which object stores cannot do. Here each chunk of an array is
an object that one process writes whole, and the commit is one small object (docs/checkpoints.md says more).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from maxlm.checkpoint.blocks import DIGESTS, TREE_FILE, array_key, array_spec, describe_tree
from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.reader import (
    COMMIT_MARKER,
    RECORD_FILE,
    RECORD_ITEM,
    SCORE_FILE,
    STATE_ITEM,
    ArrayInfo,
    CheckpointReader,
    Loaded,
    Record,
    agree,
    all_do,
    array_info,
    checked_record,
    describe,
)
from maxlm.cluster import decided, done_first
from maxlm.config import CheckpointConfig
from maxlm.storage import ANSWER_SECONDS, Folder, StorageError, is_bucket, trouble

_NAME = re.compile(r"(0|[1-9]\d*)-([0-9a-f]+)-(\d+)")
_CHUNK = 256 << 20  # bytes of an object of an array at most
PARTS_SECONDS = 1800.0  # that process 0 waits for the parts of the others …
LEAVING_SECONDS = 30.0  # … and when it has failed meanwhile, which it is to tell
_MARK = b"\n"  # what an object holds that counts by its name; nothing at all is more than some servers can take
_POLL = 0.5  # seconds between looks for them

Log = Callable[[str], None]


def open_reader(directory: str | Path, *, log: Log = print) -> CheckpointReader:
    """A reader of the checkpoints in a folder, on disk or in a bucket."""
    return BucketReader(directory, log=log) if is_bucket(directory) else CheckpointReader(directory, log=log)


def open_checkpointer(directory: str | Path, config: CheckpointConfig, *, log: Log = print) -> Checkpointer:
    """What saves and restores the checkpoints of a run, on disk or in a bucket."""
    return (BucketCheckpointer if is_bucket(directory) else Checkpointer)(directory, config, log=log)


class Block(NamedTuple):
    """A piece of an array and where it lies, for each dim the begin."""

    start: tuple[int, ...]
    values: np.ndarray


class _Job(NamedTuple):
    """A save under way: this process's part, the whole, and whether process 0 need not wait for the others."""

    part: Future[None]
    whole: Future[None]
    abandon: threading.Event


class BucketReader(CheckpointReader):
    """Reads the checkpoints of a run that are in a bucket; as for those on a disk."""

    def _place(self, directory: str | Path) -> Folder:
        return Folder(str(directory))

    def steps(self) -> list[int]:
        """Steps that have a commit, ascending. Raises StorageError if the bucket cannot be listed."""
        return sorted(self._commits())

    def path(self, step: int) -> Folder:
        """The folder of a step."""
        return self.directory / self._commits().get(step, f"commits/{step}")

    def _read_score(self, step: int) -> bytes:
        return self.path(step).read(SCORE_FILE)

    def find(self, step: int | None = None) -> Folder | None:
        """The folder of a step's checkpoint, or of the newest; None: there is none.

        Raises StorageError: the bucket does not answer.
        """
        commits = self._commits()
        name = commits.get(max(commits, default=0) if step is None else step)
        return self.directory / name if name else None

    def record(self, step: int) -> Record:
        """The record of a step. Raises OSError, ValueError: it is missing or altered; StorageError: no answer."""
        name = self._commits().get(step)
        if name is None:
            raise FileNotFoundError(f"its commit in {self.directory}/commits is missing")
        return checked_record((self.directory / name / RECORD_ITEM).read(RECORD_FILE), step)

    def _commits(self) -> dict[int, str]:
        """The folder of each step that is committed; of two the later one."""
        return _by_step(self._committed_folders())

    def _committed_folders(self) -> list[str]:
        return [name for name in (self.directory / "commits").names() if _NAME.fullmatch(name)]

    def _aside(self) -> list[str]:
        return [name for name in (self.directory / "commits").names() if ".damaged-" in name]

    def _load(self, record: Record, wanted: Mapping[str, Any]) -> Loaded:
        return load_arrays(self.path(record.step) / STATE_ITEM, record, wanted)


class BucketCheckpointer(BucketReader, Checkpointer):
    """Writes the checkpoints of one run into a bucket, on a thread, and reads them; as for those on a disk."""

    def _open(self) -> Any:
        """Nothing stands open in a bucket; what interrupted saves left there is removed."""
        all_do(self._sweep if jax.process_index() == 0 else None, error=StorageError)
        now = np.array(divmod(int(time.time() * 1000), 2**31), np.int32)  # JAX has no 64-bit integers
        high, low = multihost_utils.broadcast_one_to_all(now) if jax.process_count() > 1 else now
        self._opened = f"{int(high) * 2**31 + int(low):x}"
        self._count = 0
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._job: _Job | None = None
        self._saved = set(all_do(self.steps, error=StorageError) or ())

    def _exists(self, step: int) -> bool:
        return decided(lambda: step in self._saved)  # of which process 0 retires some

    def _sweep(self) -> None:
        committed = (self.directory / "commits").names()
        for name in (self.directory / "begun").names():
            if not any(commit == name or commit.startswith(f"{name}.") for commit in committed):
                self._log(f"removed {name}: the save of this checkpoint was interrupted")
                self._discard(name)

    def _discard(self, name: str) -> None:
        """Removes a folder that no commit names any more."""
        (self.directory / name).delete()
        (self.directory / "begun").remove(name)

    def set_aside(self, steps: Sequence[int], why: str) -> None:
        """Renames the commits of checkpoints, so that they no longer count. All processes call it, for the same."""
        all_do((lambda: self._rename(steps, why)) if jax.process_index() == 0 else None, error=StorageError)
        self._saved.difference_update(steps)

    def _rename(self, steps: Sequence[int], why: str) -> None:
        commits, names = self.directory / "commits", self._commits()
        for name in (names[step] for step in steps if step in names):
            commits.write(f"{name}.{why}-1", commits.read(name))
            commits.remove(name)
            self._log(f"checkpoint {name.partition('-')[0]} was set aside as {commits}/{name}.{why}-1")

    def _start(self, record: Record, sealed: Mapping[str, Any], leaves: Mapping[str, jax.Array], digests: Any) -> None:
        """Copies this process's part to the host, and begins to write it."""
        self._count += 1
        name = f"{record.step}-{self._opened}-{self._count}"
        chunks = {path: chunk_shape(leaf) for path, leaf in leaves.items()}
        job = _Job(Future(), Future(), threading.Event())
        self._job = job
        self._writer.submit(self._write, job, name, record, sealed, owned_blocks(leaves), chunks, digests)

    def _finish(self) -> None:
        """Waits for the parts of all processes and for the commit. Raises what went wrong."""
        job, self._job = self._job, None
        if job is None:
            return
        problem = agree(_problem(job.part))
        if problem:
            job.abandon.set()  # process 0 waits for a part in vain
        whole = _problem(job.whole)
        if problem or whole:
            raise StorageError(problem or whole)

    def _write_score(self, step: int, content: str) -> None:
        self.path(step).write(SCORE_FILE, content)

    def _committed(self, step: int) -> None:
        self._saved.add(step)

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        self.wait()
        self._writer.shutdown()

    def _leave(self) -> str | None:
        job, self._job = self._job, None
        if job is not None:
            wait([job.part])
            wait([job.whole], LEAVING_SECONDS)  # for which process 0 needs the parts of the others
            job.abandon.set()
        self._writer.shutdown()
        return (_problem(job.part) or _problem(job.whole)) if job else None

    def _saving(self) -> bool:
        return self._job is not None and not self._job.whole.done()

    def _reopen(self) -> None:
        """A failed save leaves nothing open; what others began of it is given up."""
        if self._job:
            self._job.abandon.set()
        self._job = None

    # --- on the thread

    def _write(
        self,
        job: _Job,
        name: str,
        record: Record,
        sealed: Mapping[str, Any],
        blocks: Mapping[str, list[Block]],
        chunks: Mapping[str, tuple[int, ...]],
        digests: np.ndarray,
    ) -> None:
        try:
            self._write_part(name, record, blocks, chunks)
        except BaseException as error:
            job.part.set_exception(error)
            job.whole.set_result(None)
            return
        job.part.set_result(None)
        try:
            if jax.process_index() == 0:
                self._await_parts(self.directory / name / "parts", job.abandon)
                self._commit(name, record, sealed, digests)
            job.whole.set_result(None)
        except BaseException as error:
            job.whole.set_exception(error)

    def _write_part(
        self,
        name: str,
        record: Record,
        blocks: Mapping[str, list[Block]],
        chunks: Mapping[str, tuple[int, ...]],
    ) -> None:
        me = jax.process_index()
        # Before anybody writes anything: what has no mark, nobody would remove after a crash.
        done_first(f"begun {name}", lambda: (self.directory / "begun").write(name, _MARK))
        state = self.directory / name / STATE_ITEM
        write_blocks(state, record.arrays, blocks, chunks=chunks, describes=me == 0)
        (self.directory / name / "parts").write(f"{me:05d}", _MARK)

    def _commit(self, name: str, record: Record, sealed: Mapping[str, Any], digests: np.ndarray) -> None:
        folder, info = self.directory / name, ArrayInfo(digests.shape, "uint32")
        whole = {DIGESTS: [Block((0, 0), digests)]}
        write_blocks(folder / STATE_ITEM, {DIGESTS: info}, whole, chunks={DIGESTS: info.shape}, describes=True)
        (folder / STATE_ITEM).write(TREE_FILE, describe_tree(record.arrays))
        (folder / RECORD_ITEM).write(RECORD_FILE, json.dumps(sealed))
        folder.write(COMMIT_MARKER, _MARK)  # for a copy of the folder on a disk
        self.before_commit()
        (self.directory / "commits").write(name, _MARK)
        self._retire()

    def _await_parts(self, parts: Folder, abandon: threading.Event) -> None:
        """Returns when every process has written its part. Raises StorageError if one does not."""
        deadline = time.monotonic() + PARTS_SECONDS
        while missing := set(range(jax.process_count())) - {int(name) for name in parts.names()}:
            if time.monotonic() > deadline or abandon.wait(_POLL):
                raise StorageError(f"the parts of processes {sorted(missing)[:8]} did not come to {parts}")

    def _retire(self) -> None:
        """Removes what need not be kept now: of a checkpoint its commit first. Failing at that harms nothing."""
        try:
            names = self._committed_folders()
            commits = _by_step(names)
            retired = self._retention.retired(commits, back_to=self.back_to)
            for name in names:
                step = _step(name)
                if step not in retired and name == commits[step]:
                    continue  # else a later one counts: the answer to this commit was lost, and the save tried again
                (self.directory / "commits").remove(name)
                if step in retired:
                    self._saved.discard(step)  # after a rollback it may be saved again
                self._discard(name)
            self._sweep()
        except OSError as error:
            self._log(f"what need not be kept was not removed: {describe(error)}")


def _problem(done: Future[None]) -> str | None:
    """Waits; what went wrong, in words."""
    error = done.exception()
    return describe(error) if error else None


def owned_blocks(leaves: Mapping[str, jax.Array]) -> dict[str, list[Block]]:
    """The parts of arrays that this process writes: each shard is written once, by whoever has its first replica."""
    shards = {path: [s for s in leaf.addressable_shards if s.replica_id == 0] for path, leaf in leaves.items()}
    for shard in (shard for found in shards.values() for shard in found):
        shard.data.copy_to_host_async()
    return {
        path: [Block(tuple(part.start or 0 for part in shard.index), np.asarray(shard.data)) for shard in found]
        for path, found in shards.items()
    }


def chunk_shape(leaf: jax.Array) -> tuple[int, ...]:
    """The grid in which an array is stored: its shards, cut further where they are large."""
    shape = list(leaf.sharding.shard_shape(leaf.shape))
    for axis, size in enumerate(shape):
        held = int(np.prod(shape)) * leaf.dtype.itemsize
        if held <= _CHUNK:
            break
        shape[axis] = size // next(n for n in range(1, size + 1) if size % n == 0 and held // n <= _CHUNK or n == size)
    return tuple(max(size, 1) for size in shape)


def write_blocks(
    state: Folder,
    arrays: Mapping[str, ArrayInfo],
    blocks: Mapping[str, list[Block]],
    *,
    chunks: Mapping[str, tuple[int, ...]],
    describes: bool,
) -> None:
    """Writes blocks of arrays below `state`, many at once; one of the processes describes the arrays, too.

    Raises:
      StorageError: the bucket refused, or did not answer.
    """
    pending = []
    for path, found in blocks.items():
        spec = array_spec(_below(state, path), arrays[path], chunks[path])
        with _asking(f"{state}/{path}"):
            opening = ts.open(spec, create=True) if describes else ts.open(spec, open=True, assume_metadata=True)
            store = opening.result(timeout=ANSWER_SECONDS)
        for block in found:
            region = tuple(slice(a, a + n) for a, n in zip(block.start, block.values.shape, strict=True))
            pending.append((path, store[region].write(block.values)))
    for path, write in pending:
        with _asking(f"{state}/{path}"):
            write.result(timeout=ANSWER_SECONDS)


def load_arrays(state: Folder, record: Record, wanted: Mapping[str, Any]) -> Loaded:
    """The wanted arrays on their devices, each process reading what it needs, and the digests of all of the record.

    Raises:
      ValueError: something is missing or damaged.
      StorageError: the bucket did not answer, or refused.
    """
    where = str(state)
    with _asking(where):
        names = [*wanted, DIGESTS]
        opening = {path: ts.open({"driver": "zarr3", "kvstore": _below(state, path)}, open=True) for path in names}
        stores = {path: future.result(timeout=ANSWER_SECONDS) for path, future in opening.items()}
    for path, leaf in wanted.items():
        if ArrayInfo(tuple(stores[path].shape), stores[path].dtype.name) != array_info(leaf):
            raise ValueError(f"the array {path} has another shape than its record says")
    with _asking(where):
        digests = stores[DIGESTS].read().result(timeout=ANSWER_SECONDS)
        reading: dict[str, dict[Any, Any]] = {}
        for path, leaf in wanted.items():
            indices = _sharding(leaf).addressable_devices_indices_map(tuple(leaf.shape)).values()
            needed = {_key(index): index for index in indices if index is not None}
            reading[path] = {key: stores[path][index].read() for key, index in needed.items()}
        read = {
            path: {key: future.result(timeout=ANSWER_SECONDS) for key, future in found.items()}
            for path, found in reading.items()
        }
    if digests.shape != (len(record.arrays), 2) or digests.dtype != np.uint32:
        raise ValueError("its digests are missing or of another number than its arrays")
    arrays: dict[str, jax.Array] = {
        path: jax.make_array_from_callback(tuple(leaf.shape), _sharding(leaf), functools.partial(_pick, read[path]))
        for path, leaf in wanted.items()
    }
    return Loaded(record, arrays, digests)


@contextlib.contextmanager
def _asking(where: str) -> Iterator[None]:
    """TensorStore's errors in our words: inside, nothing else may raise a ValueError."""
    try:
        yield
    except (ValueError, TimeoutError) as error:
        raise trouble(error, where) from None


def _pick(read: Mapping[Any, np.ndarray], index: tuple[slice, ...] | None) -> np.ndarray:
    return read[_key(index or ())]


def _below(state: Folder, path: str) -> dict[str, Any]:
    """Where the objects of an array are."""
    spec = state.spec()
    key = (DIGESTS,) if path == DIGESTS else array_key(path)
    return {**spec, "path": f"{spec['path']}{'.'.join(key)}/"}


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _key(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)


def _by_step(names: Iterable[str]) -> dict[int, str]:
    """The folder of each step, of several the last."""
    return {_step(name): name for name in sorted(names, key=_order)}


def _step(name: str) -> int:
    return int(name.partition("-")[0])


def _order(name: str) -> tuple[int, int]:
    """Later saves come later."""
    _, opened, count = name.split("-")
    return int(opened, 16), int(count)
