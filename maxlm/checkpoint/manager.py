"""Saving checkpoints beside the training, keeping the right ones, and coming back from damaged ones."""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from maxlm.checkpoint.digest import array_paths
from maxlm.checkpoint.pace import Pace
from maxlm.checkpoint.reader import (
    RECORD_ITEM,
    SCORE_FILE,
    STATE_ITEM,
    CheckpointError,
    CheckpointReader,
    Record,
    Restored,
    agree,
    all_do,
    array_info,
    describe,
    digest,
    digest_each,
    record_to_json,
)
from maxlm.cluster import decided
from maxlm.config import CheckpointConfig
from maxlm.errors import UserError
from maxlm.files import write_atomically
from maxlm.storage import StorageError
from maxlm.tree import from_paths

BEST_METRIC = "heldout_bits_per_byte"
LOCAL_FAILURES = 10.0  # of so many failures one takes a machine's disk with it, and needs more than local copies
SAVE_SECONDS = 600  # on a disk, from begin to commit: so long the others wait for a process whose part has failed
_TEMPORARY = ".orbax-checkpoint-tmp"
_RETIRED = ".retired"


class SaveResult(NamedTuple):
    """What a call of `save` did and what it cost."""

    started: bool  # False if the step was on disk already, or if the disk refused at once
    stall_seconds: float  # time that the caller was kept, the wait for a save before this one included


class Checkpointer(CheckpointReader):
    """Writes the checkpoints of one run in the background, and reads them.

    Opening it removes what an interrupted save left behind, so one process group at a time may hold it; use
    `CheckpointReader` beside a run. With several processes all of them make the same calls.

    Args:
        directory: folder of the run's checkpoints, made if missing. (`bucket.open_checkpointer` takes buckets, too.)
        config: when to save and what to keep.
        log: takes one line of text an event.

    Raises:
        CheckpointError: for a directory that is no local path, or `every_seconds` with several processes.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig, *, log: Callable[[str], None] = print):
        super().__init__(directory, log=log)
        if config.every_seconds and jax.process_count() > 1:
            raise CheckpointError(
                f"checkpoint.every_seconds={config.every_seconds:g} needs one process, and there are "
                f"{jax.process_count()}, whose clocks differ; set checkpoint.every_seconds=0 and choose every_steps"
            )
        self._config = config
        self._failure: CheckpointError | None = None
        self.failures = 0  # saves in a row that have failed
        self.before_commit: Callable[[], None] = lambda: None  # in process 0, into a bucket: what has to be there first
        self.back_to: int | None = None  # updates are being refused: a rollback would need those up to this step
        self._writing: int | None = None
        self._highest = -1  # step that Orbax was given to write since it last looked at the directory
        self._clock_start: float | None = None
        mtbf = config.mtbf_hours * 3600 * (LOCAL_FAILURES if config.local_dir else 1.0)
        self.pace = Pace(config.every_steps, mtbf=mtbf)
        self.write_seconds = 0.0  # from begin to commit, of the last save that was waited for
        self._began = 0.0
        self._retention = _Retention(config, self)
        self._remover = ThreadPoolExecutor(1, "retired checkpoints")
        self._manager = self._open()

    def due(self, step: int, now: float) -> bool:
        """Whether a checkpoint is due after `step` batches.

        Args:
            step: batches consumed.
            now: seconds of a monotonic clock. Counts only with `every_seconds`, which starts anew with every True.
        """
        if self._clock_start is None:
            self._clock_start = now
        every_seconds = self._config.every_seconds
        due = self.pace.due(step)
        due = due or bool(every_seconds) and now - self._clock_start >= every_seconds
        if due:
            self._clock_start = now
        return due

    def prepare(self, abstract_state: Any) -> None:
        """Compiles the digests of a state, so that the first save need not."""
        for leaf in array_paths(abstract_state).values():
            digest.lower(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)).compile()

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any]) -> SaveResult:
        """Starts to save a state; the caller may donate it as soon as this returns.

        A save still under way is waited for. Failures to write are logged and given by `pending_error`. A checkpoint
        of this step that is there stays, and nothing is saved.

        Args:
            step: batches consumed.
            state: pytree of arrays.
            metadata: what the checkpoint says of itself: anything that JSON can hold.

        Raises:
            TypeError: if the state holds something else than arrays, or the metadata is no JSON.
        """
        start = time.perf_counter()
        leaves = array_paths(state)
        others = [path for path, leaf in leaves.items() if not isinstance(leaf, jax.Array)]
        if others:
            raise TypeError(f"a checkpoint holds jax arrays only, found something else at {', '.join(others)}")
        record = Record(
            step,
            time.time(),
            {path: array_info(leaf) for path, leaf in leaves.items()},
            dict(metadata),
        )
        sealed = record_to_json(record)
        pending = list(digest_each(leaves).values())  # runs on the devices while the next line waits
        self.wait()
        self._writing, self._began = step, time.perf_counter()
        try:
            exists = self._exists(step)
        except (OSError, UserError) as error:  # the folder cannot be listed: a save that fails like any other
            self._fail(describe(error))
            return SaveResult(False, time.perf_counter() - start)
        if exists:
            self._writing, self.failures = None, 0  # whatever failed, failed after its commit
            self._log(f"checkpoint {step} is there already and stays: nothing was saved")
            return SaveResult(False, time.perf_counter() - start)
        self._retention.add(record)
        problem = None
        try:
            with jax.transfer_guard("allow"):  # these transfers are meant, whatever the training loop guards against
                self._start(record, sealed, leaves, np.stack([np.asarray(value) for value in pending]))
        except OSError as error:
            problem = describe(error)
        if problem := agree(problem):
            self._fail(problem)
        return SaveResult(problem is None, time.perf_counter() - start)

    def score(self, step: int, bits_per_byte: float) -> None:
        """Notes how good a checkpoint is on held-out documents, by which `keep_best` goes.

        A save under way is waited for. All processes call it, with the same figure. Where there is no checkpoint of
        that step nothing is noted; a failure to write is logged.
        """
        self.wait()

        def note() -> None:
            self._retention.note(step, bits_per_byte)
            self._write_score(step, repr(bits_per_byte))

        try:
            if self._exists(step):
                all_do(note if jax.process_index() == 0 else None)  # which alone says what need not be kept
        except (OSError, UserError) as error:
            self._log(f"how good checkpoint {step} is was not noted: {describe(error)}")

    def restore(self, abstract_state: Any, *, step: int | None = None) -> Restored | None:
        """The newest whole checkpoint, on the mesh that is asked for.

        Damaged checkpoints are logged. Once an older one has proved whole, the newer damaged ones are renamed to
        `<step>.damaged-<n>`, so that their steps can be saved again; nothing is deleted.

        Args:
            abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings on any mesh.
            step: the one checkpoint wanted; None: the newest whole one.

        Returns:
            None if there is no checkpoint at all.

        Raises:
            CheckpointError: if the state saved has other arrays, or no checkpoint that was asked for is whole.
        """
        self.wait()
        search = self._search(abstract_state, step=step, prefix="")
        if search is None:
            return None
        if search.damaged:
            self.set_aside([damage.step for damage in search.damaged], "damaged")
            self._log(f"using checkpoint {search.restored.step} instead")
        return search.restored

    def wait(self) -> None:
        """Returns when nothing is being written any more; what went wrong is given by `pending_error`.

        All processes call it, and all learn of what went wrong in one of them.
        """
        if self._writing is None:
            return
        problem, waits = None, self._saving()
        try:
            self._finish()
            if waits or jax.process_count() == 1:  # which looks after every step, so that this is about when it ended
                self.write_seconds = time.perf_counter() - self._began
        except Exception as error:  # whatever the storage raised on its thread: the run goes on, the loop decides
            problem = describe(error)
        if problem := agree(problem):
            self._fail(problem)
            return
        self._committed(self._writing)
        self._writing, self.failures = None, 0

    def pending_error(self) -> CheckpointError | None:
        """The failure of a save that has ended, once; None while one is being written.

        With several processes it tells what their last `wait` has found, since they have to agree on it.
        """
        if jax.process_count() == 1 and not self._saving():
            self.wait()
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> None:
        """Waits for the last save and releases the threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
        self._remover.shutdown()

    def leave(self) -> None:
        """Like `close`, where this process alone may have failed: it waits for nothing that the others have to come to.

        What they still write on their threads may make the last save whole; what went wrong with it is logged.
        """
        if problem := self._leave():
            self._log(f"checkpoint {self._writing} was not saved: {problem}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and jax.process_count() > 1:
            self.leave()
        else:
            self.close()

    # --- what depends on where the checkpoints are

    def _start(self, record: Record, sealed: Mapping[str, Any], leaves: Mapping[str, jax.Array], digests: Any) -> None:
        """Begins to write. Raises OSError."""
        if record.step <= self._highest:  # the run has gone back, and Orbax still counts what was retired since
            self._reopen()
        if self._manager is None:
            self._manager = self._open()
        self._highest = record.step
        items = {
            STATE_ITEM: ocp.args.PyTreeSave({"arrays": from_paths(leaves), "digests": digests}),
            RECORD_ITEM: ocp.args.JsonSave(sealed),
        }
        self._manager.save(record.step, args=ocp.args.Composite(**items), force=True)

    def _finish(self) -> None:
        """Waits for the end of what `_start` began. Raises what went wrong."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def _leave(self) -> str | None:
        """Waits for what this process writes, and releases the threads; gives what went wrong, in words."""
        try:
            if self._manager is not None:
                self._manager.close()
        except Exception as error:  # whatever the storage raised on its thread
            return describe(error)
        finally:
            self._remover.shutdown()
        return None

    def _write_score(self, step: int, content: str) -> None:
        """Puts the score into the checkpoint. Raises OSError."""
        write_atomically(self.path(step) / SCORE_FILE, content)

    def _committed(self, step: int) -> None:
        """All processes know that `step` is whole."""
        if jax.process_index() == 0:
            self._retire()

    def _retire(self) -> None:
        """Takes away what need not be kept now, and deletes it on a thread. Failing at that harms nothing."""
        try:
            retired = self._retention.retired(self.steps(), back_to=self.back_to)
        except OSError as error:
            self._log(f"what need not be kept was not looked for: {describe(error)}")
            return
        for step in retired:
            try:
                self.path(step).rename(self.directory / f"{step}{_RETIRED}")  # no half of it ever counts
            except OSError as error:
                self._log(f"checkpoint {step} need not be kept and was not removed: {describe(error)}")
        self._remover.submit(self._remove_all, f"*{_RETIRED}", "")

    def _saving(self) -> bool:
        """Whether something is being written."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def _exists(self, step: int) -> bool:
        """Whether there is a checkpoint of `step`; the same on all processes, whose views of a disk may differ.

        Raises OSError, or on the processes that did not look UserError: the folder cannot be listed.
        """
        return decided(lambda: step in self.steps())

    def _open(self) -> Any:
        """Orbax's view of the directory. Raises OSError, on all processes: one of them cannot open it."""
        all_do(self._make if jax.process_index() == 0 else None)  # before anybody looks at what is there
        return all_do(self._view)

    def _make(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remover.submit(self._sweep).result()  # when it has removed what it is removing

    def _view(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            # Weights are noise to a compressor: zstd saved 8% and took three times the CPU time.
            item_handlers={
                STATE_ITEM: ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False),
                RECORD_ITEM: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                # What Orbax retires it deletes in place, and when it cannot, the save that was done by then has failed.
                preservation_policy=policies.LatestN(None),
                async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
                # Orbax's own metadata has no seal; a damaged one must not keep a run from starting.
                lightweight_initialize=True,
                # With these two it would wait for the other processes, of which one may fail at it.
                create=False,
                save_root_metadata=False,
            ),
        )

    def _sweep(self) -> None:
        """Removes what an interrupted save or removal left behind, by name."""
        self._remove_all(f"*{_TEMPORARY}*", "the save of this checkpoint was interrupted")
        self._remove_all(f"*{_RETIRED}", "its removal was interrupted")

    def _remove_all(self, pattern: str, why: str) -> None:
        """Deletes folders. It says so where it is told why, and always where it cannot."""
        left = []
        for folder in sorted(self.directory.glob(pattern)):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                left.append(folder.name)
            elif why:
                self._log(f"removed {folder.name}: {why}")
        if left:
            self._log(f"could not remove all of {', '.join(left)} in {self.directory}; the next start tries again")

    def set_aside(self, steps: Sequence[int], why: str) -> None:
        """Renames checkpoints to `<step>.<why>-<n>`, so that they no longer count as such.

        All processes call it, with the same steps; process 0 renames them, and then all go on, or all raise OSError.
        """
        all_do((lambda: self._rename(steps, why)) if jax.process_index() == 0 else None)
        self._reopen()

    def _rename(self, steps: Sequence[int], why: str) -> None:
        for step in steps:
            number = 1
            while (aside := self.directory / f"{step}.{why}-{number}").exists():
                number += 1
            self.path(step).rename(aside)
            self._log(f"checkpoint {step} was set aside as {aside}")

    def _reopen(self) -> None:
        """Lets Orbax see the directory as it is now. (Its `reload` would read metadata that may be damaged.)"""
        manager, self._manager, self._highest = self._manager, None, -1
        try:
            if manager is not None:
                manager.close()
        except Exception as error:  # whatever the storage raises; what has failed was told before
            self._log(f"what was open in {self.directory} could not be closed: {describe(error)}")
        try:
            self._manager = self._open()
        except OSError as error:  # the next save tries again
            self._log(f"{self.directory} cannot be opened: {describe(error)}")

    def _fail(self, problem: str) -> None:
        self.failures += 1
        self._failure = CheckpointError(
            f"checkpoint {self._writing} was not saved: {problem}; see that {self.directory} can be written and "
            "has room"
        )
        self._writing = None
        self._log(str(self._failure))
        self._reopen()


@dataclasses.dataclass
class _Info:
    """What Orbax's policies ask of a checkpoint (their PolicyCheckpointInfo)."""

    step: int
    time: datetime.datetime
    metrics: dict[str, float] | None


class _Retention:
    """Which checkpoints stay, by what our records say of time and score (Orbax's own notes of them are not sealed)."""

    def __init__(self, config: CheckpointConfig, reader: CheckpointReader):
        chosen: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_latest)]
        if config.keep_best:
            chosen.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[BEST_METRIC],
                    reverse=True,  # the lowest last, where BestN takes them from
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if config.keep_every_hours:
            chosen.append(policies.EveryNSeconds(config.keep_every_hours * 3600))
        self._policy = policies.AnyPreservationPolicy(chosen)
        self._config, self._reader = config, reader
        self._known: dict[int, _Info] = {}

    def add(self, record: Record) -> None:
        """Notes a checkpoint that is about to be written."""
        saved_at = datetime.datetime.fromtimestamp(record.saved_at, tz=datetime.UTC)
        self._known[record.step] = _Info(step=record.step, time=saved_at, metrics=None)

    def note(self, step: int, score: float) -> None:
        """Notes how good a checkpoint is."""
        if (info := self._info(step)) and not math.isnan(score):
            info.metrics = {BEST_METRIC: score}

    def retired(self, steps: Iterable[int], *, back_to: int | None) -> list[int]:
        """Those of the steps that need not stay; the newest is the one with the highest step.

        Args:
            back_to: a rollback would need the newest up to this step, and those before it if that does not help.

        Raises:
            StorageError: a bucket did not answer.
        """
        ordered = [info for info in map(self._info, sorted(steps)) if info is not None]
        keep = self._policy.should_preserve(ordered, context=policies.PreservationContext())
        kept = {info.step for info, stays in zip(ordered, keep, strict=True) if stays}
        found = [info.step for info in ordered]
        if every := self._config.keep_every_steps:
            firsts = {step // every: step for step in reversed(found)}
            kept.update(step for multiple, step in firsts.items() if multiple)
        if back_to is not None:
            kept.update([step for step in found if step <= back_to][-self._config.keep_latest :])
        return [step for step in found if step not in kept]

    def _info(self, step: int) -> _Info | None:
        """None: its record cannot be read, perhaps for a moment only. It stays, and is asked for the next time."""
        if step not in self._known:
            try:
                record, score = self._reader.record(step), self._reader.score_of(step)
            except StorageError:
                raise
            except (OSError, ValueError):
                return None
            self.add(record)
            if score is not None:
                self.note(step, score)
        return self._known[step]
