"""Copies of the newest states on the machines' own disks: quick to write, quick to read, and lost with the machine.

    LOCAL/<run>/process-00003/
      1500/              the copy of process 3; the name appears when it is whole
        data             its shards, one after the other
        index.json       the record, where each shard stands and its SHA-256, the digests of the whole arrays; sealed
      2000.partial       is being written, or was

They go when the run has ended with its last checkpoint; those of a run that did not come so far, where no copy has been
written for UNUSED_DAYS days, when any run opens LOCAL.

Each process keeps the shards of its own devices, so nothing crosses the network to save. To restore, every process says
which copies it has, whole, and the newest step is taken of which each shard is in somebody's. A process that lost its
disk gets its shards from those whose devices hold the same ones (along `data`, and wherever else the mesh replicates
them) over the devices' own network; the digests of the arrays prove the outcome. Copies serve the mesh and the order of
processes that wrote them. On another one the run goes back to a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.checkpoint.digest import array_paths
from maxlm.checkpoint.reader import (
    Loaded,
    Record,
    Restored,
    agree,
    altered,
    array_info,
    describe,
    digest_each,
    record_from_json,
    record_to_json,
)
from maxlm.cluster import say_here, told
from maxlm.errors import UserError
from maxlm.storage import UNUSED_DAYS, is_bucket, local_name

KEPT = 2  # copies: the newest may be damaged, or missing on a machine that died while it was written
_OFFERED = 4  # newest steps that a process tells the others of
_INDEX, _DATA = "index.json", "data"
_RUN, _PROCESS = re.compile(r".+-[0-9a-f]{12}"), re.compile(r"process-\d{5}")

Shards = dict[tuple[str, tuple[int, ...]], np.ndarray]  # by the path of the array and where in it they begin


class _Saved(NamedTuple):
    """A copy that was read and is whole."""

    record: Record
    digests: np.ndarray
    shards: Shards


class LocalCopies:
    """The copies of one run. With several processes all of them make the same calls.

    Args:
      folder: on a disk of this machine.
      run: the place of the run, which keeps runs apart.
      log: takes one line of text an event.

    Raises:
      UserError: the folder is in a bucket.
    """

    def __init__(self, folder: str | Path, run: str | Path, *, log: Callable[[str], None]):
        if is_bucket(folder):
            raise UserError(f"checkpoint.local_dir={folder} is no folder on a disk of this machine; type one")
        self.folder = Path(folder).expanduser() / local_name(str(run)) / f"process-{jax.process_index():05d}"
        self._log = log
        self._own_log = say_here if jax.process_index() else log
        _forget_unused(self.folder.parent, log=self._own_log)
        for left in sorted(self.folder.glob("*.partial")):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._writer = ThreadPoolExecutor(1, "local copy")
        self._job: Future[None] | None = None

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any]) -> None:
        """Begins to write a copy; the state may be donated at once. A failure is logged when the next one begins."""
        leaves = array_paths(state)
        arrays = {path: array_info(leaf) for path, leaf in leaves.items()}
        record = Record(step, 0.0, arrays, dict(metadata))
        pending = digest_each(leaves)
        self.wait()
        with jax.transfer_guard("allow"):  # meant, whatever the training loop guards against
            shards = _held(leaves)
            digests = np.stack([np.asarray(value) for value in pending.values()])
        layout = layout_of(leaves)
        self._job = self._writer.submit(self._write, record, shards, digests, layout)

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        job, self._job = self._job, None
        error = job.exception() if job else None
        if error:  # copies are for speed: without them the checkpoints are still there
            self._own_log(f"a local copy was not written: {describe(error)}; see that {self.folder} has room")

    def restore(
        self, abstract_state: Any, *, after: int, usable: Callable[[Mapping[str, Any]], bool]
    ) -> Restored | None:
        """The newest state that the processes' copies make up; None: there is none after step `after`.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with the shardings that it was saved with.
          after: the step of the newest checkpoint.
          usable: whether a copy of this metadata belongs to the run as it is now.
        """
        self.wait()
        with jax.transfer_guard("allow"):
            for step in self._offered(after):
                found = self._restore(step, abstract_state, usable)
                if found is not None:
                    return found
        return None

    def forget_after(self, step: int) -> None:
        """Removes the copies of steps after `step`, where the run goes on from: they are of a way that was given up."""
        self.wait()
        self._remove_after(step)

    def remove(self) -> None:
        """Removes all copies of this process: there is a checkpoint of the step that the run ends with."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process of this machine has copies there
            self.folder.parent.rmdir()

    def close(self) -> None:
        """Waits for the last copy."""
        self.wait()
        self._writer.shutdown()

    def _offered(self, after: int) -> list[int]:
        """The steps that any process has a copy of, the newest first."""
        mine = [step for step in self._steps() if step > after][-_OFFERED:]
        steps = np.array(mine + [-1] * (_OFFERED - len(mine)), np.int32)
        everyone = multihost_utils.process_allgather(steps) if jax.process_count() > 1 else steps
        return sorted({int(step) for step in np.ravel(everyone)} - {-1}, reverse=True)

    def _steps(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit()) if self.folder.is_dir() else []

    def _restore(self, step: int, abstract: Any, usable: Callable[[Mapping[str, Any]], bool]) -> Restored | None:
        wanted = array_paths(abstract)
        saved, problem = None, "it has none"
        if (self.folder / str(step)).is_dir():
            try:
                saved = _read(self.folder / str(step), layout_of(wanted))
                if not usable(saved.record.metadata):
                    saved, problem = None, "it belongs to another run, or to other data"
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = describe(error)
        flags = np.asarray([saved is not None])
        everyone = np.ravel(multihost_utils.process_allgather(flags)) if jax.process_count() > 1 else flags
        if saved is None:
            self._own_log(f"the local copy of step {step} in {self.folder} is of no use: {problem}")
        holders = {int(process) for process in np.flatnonzero(everyone)}
        if not covered(wanted, lambda device: device.process_index in holders):
            return None
        first = min(holders)
        record, digests = self._description(saved, first, step)
        arrays = {}
        for path, leaf in wanted.items():
            own = {start: values for (p, start), values in (saved.shards if saved else {}).items() if p == path}
            arrays[path] = assemble(leaf, own, lambda device: device.process_index in holders)
        if differ := agree(altered(Loaded(record, arrays, digests))):
            self._log(f"the local copies of step {step} are of no use: {differ}")
            return None
        lost = sorted(set(range(jax.process_count())) - holders)
        peers = f"; process {', '.join(map(str, lost))} got its part from the others" if lost else ""
        self._log(f"using the local copies of step {step}{peers}")
        state = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in wanted])
        return Restored(step, state, record.metadata)

    def _description(self, saved: _Saved | None, first: int, step: int) -> tuple[Record, np.ndarray]:
        """The record and digests of process `first`, on all processes."""
        if jax.process_count() == 1:
            assert saved is not None
            return saved.record, saved.digests
        mine = b""
        if saved is not None:
            mine = json.dumps([record_to_json(saved.record), saved.digests.tolist()]).encode()
        record, digests = json.loads(told(mine, source=jax.process_index() == first))
        return record_from_json(record), np.array(digests, np.uint32)

    def _write(self, record: Record, shards: Shards, digests: np.ndarray, layout: str) -> None:
        beside = self.folder / f"{record.step}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            _write_files(beside, record, shards, digests=digests, layout=layout)
        except BaseException:  # for want of room, say, which it must not keep taking
            shutil.rmtree(beside, ignore_errors=True)
            raise
        shutil.rmtree(self.folder / str(record.step), ignore_errors=True)
        beside.rename(self.folder / str(record.step))
        self._remove_after(record.step)
        for step in self._steps()[:-KEPT]:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def _remove_after(self, step: int) -> None:
        for later in (found for found in self._steps() if found > step):
            shutil.rmtree(self.folder / str(later), ignore_errors=True)


def _forget_unused(run: Path, *, log: Callable[[str], None]) -> None:
    """Removes what other runs than `run` have left beside it long ago, and nothing that no run has written."""
    for folder in sorted(run.parent.glob("*")):
        if folder == run or not _RUN.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError):  # somebody else removes it
            processes = list(folder.iterdir())
            if not processes or not all(_PROCESS.fullmatch(process.name) for process in processes):
                continue
            if time.time() - max(process.stat().st_mtime for process in processes) > UNUSED_DAYS * 86400:
                shutil.rmtree(folder)
                log(f"removed {folder}: its run has copied nothing there in {UNUSED_DAYS} days")


def _write_files(folder: Path, record: Record, shards: Shards, *, digests: np.ndarray, layout: str) -> None:
    """The files of a copy, on the disk when it returns."""
    entries, offset = [], 0
    with (folder / _DATA).open("wb") as data:
        for (path, start), values in shards.items():
            raw = values.tobytes()
            data.write(raw)
            entries.append([path, start, values.shape, offset, hashlib.sha256(raw).hexdigest()])
            offset += len(raw)
        data.flush()
        os.fsync(data.fileno())
    content = {
        "record": record_to_json(record),
        "digests": digests.tolist(),
        "layout": layout,
        "shards": entries,
    }
    text = json.dumps(content)
    with (folder / _INDEX).open("w", encoding="utf-8") as index:
        index.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        index.flush()
        os.fsync(index.fileno())


def layout_of(leaves: Mapping[str, Any]) -> str:
    """A digest of which process holds which shards of which arrays: copies serve only the layout that wrote them."""
    parts = []
    for path, leaf in leaves.items():
        where = leaf.sharding.devices_indices_map(tuple(leaf.shape)).items()
        held = sorted({(device.process_index, _start(index)) for device, index in where})
        parts.append([path, list(leaf.shape), str(np.dtype(leaf.dtype)), held])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def covered(leaves: Mapping[str, Any], holds: Callable[[Any], bool]) -> bool:
    """Whether each shard of each array is on some device whose copy there is."""
    for leaf in leaves.values():
        where = leaf.sharding.devices_indices_map(tuple(leaf.shape))
        starts = {_start(index) for index in where.values()}
        if starts - {_start(index) for device, index in where.items() if holds(device)}:
            return False
    return True


def assemble(leaf: Any, own: Mapping[tuple[int, ...], np.ndarray], holds: Callable[[Any], bool]) -> jax.Array:
    """An array from the shards that the processes have; what one of them lacks comes from the others' devices.

    Args:
      leaf: `jax.ShapeDtypeStruct` with a sharding.
      own: this process's shards by where they begin; read only for devices that `holds` says yes to.
      holds: whether there is a copy of what a device had; the same on all processes.
    """
    shape, dtype, sharding = tuple(leaf.shape), np.dtype(leaf.dtype), leaf.sharding
    where = sharding.devices_indices_map(shape)
    if all(holds(device) for device in where):
        return jax.make_array_from_callback(shape, sharding, lambda index: own[_start(index)])
    senders: dict[tuple[int, ...], Any] = {}  # of each shard the first device that can
    for device in where:
        if holds(device):
            senders.setdefault(_start(where[device]), device)
    words = np.dtype(f"uint{8 * dtype.itemsize}")
    part = sharding.shard_shape(shape)
    used = {name for axes in sharding.spec for name in ((axes,) if isinstance(axes, str) else axes or ())}
    spare = tuple(name for name, size in sharding.mesh.shape.items() if name not in used and size > 1)
    replicas = int(np.prod([sharding.mesh.shape[name] for name in spare]))
    stacked = NamedSharding(sharding.mesh, PartitionSpec(spare, *sharding.spec))
    pieces = []
    for device in stacked.addressable_devices:
        start = _start(where[device])
        sends = senders[start] == device
        piece = own[start].view(words) if sends else np.zeros(part, words)
        pieces.append(jax.device_put(piece.reshape(1, *part), device))
    all_pieces = jax.make_array_from_single_device_arrays((replicas, *shape), stacked, pieces)
    return _joined(all_pieces, dtype, sharding)


def _joined(pieces: jax.Array, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    """The one piece of each shard that is not zero, on all devices that hold the shard: a sum of words moves bits."""

    def join(x: jax.Array) -> jax.Array:
        bits = x.sum(0, dtype=x.dtype)
        return bits.astype(bool) if dtype == np.bool_ else jax.lax.bitcast_convert_type(bits, jnp.dtype(dtype))

    return jax.jit(join, out_shardings=sharding)(pieces)


def _held(leaves: Mapping[str, jax.Array]) -> Shards:
    """The shards of this process's devices, each once."""
    shards = {
        (path, _start(shard.index)): shard.data for path, leaf in leaves.items() for shard in leaf.addressable_shards
    }
    for data in shards.values():
        data.copy_to_host_async()
    return {key: np.asarray(data) for key, data in shards.items()}


def _read(folder: Path, layout: str) -> _Saved:
    """A copy, each shard compared with its hash. Raises OSError, ValueError, KeyError or TypeError: it is damaged."""
    seal, _, text = (folder / _INDEX).read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != seal:
        raise ValueError("its index was altered")
    content = json.loads(text)
    if content["layout"] != layout:
        raise ValueError("another mesh, or other processes, wrote it")
    record, shards = record_from_json(content["record"]), {}
    with (folder / _DATA).open("rb") as data:
        for path, start, shape, offset, sha256 in content["shards"]:
            dtype = jnp.dtype(record.arrays[path].dtype)
            data.seek(offset)
            raw = data.read(int(np.prod(shape)) * dtype.itemsize)
            if hashlib.sha256(raw).hexdigest() != sha256:
                raise ValueError(f"a shard of {path} was altered")
            shards[path, tuple(start)] = np.frombuffer(raw, dtype).reshape(shape)
    return _Saved(record, np.array(content["digests"], np.uint32), shards)


def _start(index: Collection[slice] | None) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index or ())
