"""Saving checkpoints beside the training, keeping the right ones, and coming back from damaged ones."""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from maxlm.checkpoint.digest import array_paths
from maxlm.checkpoint.reader import (
    RECORD_ITEM,
    STATE_ITEM,
    CheckpointError,
    CheckpointReader,
    Record,
    Restored,
    array_info,
    describe,
    digest,
    digest_each,
    record_to_json,
)
from maxlm.config import CheckpointConfig
from maxlm.tree import from_paths

BEST_METRIC = "heldout_bits_per_byte"
_TEMPORARY = ".orbax-checkpoint-tmp"


class SaveResult(NamedTuple):
    """What a call of `save` did and what it cost."""

    started: bool  # False if the step was on disk already, or if the disk refused at once
    stall_seconds: float  # time that the caller was kept, the wait for a save before this one included


class Checkpointer(CheckpointReader):
    """Writes the checkpoints of one run in the background, and reads them.

    Opening it removes what an interrupted save left behind, so one process group at a time may hold it; use
    `CheckpointReader` beside a run. With several processes all of them make the same calls.

    Args:
        directory: folder of the run's checkpoints, made if missing.
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
        self._writing: int | None = None
        self._clock_start: float | None = None
        self._retention = _Retention(config, self)
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
        due = step > 0 and step % self._config.every_steps == 0
        due = due or bool(every_seconds) and now - self._clock_start >= every_seconds
        if due:
            self._clock_start = now
        return due

    def prepare(self, abstract_state: Any) -> None:
        """Compiles the digests of a state, so that the first save need not."""
        for leaf in array_paths(abstract_state).values():
            digest.lower(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)).compile()

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> SaveResult:
        """Starts to save a state; the caller may donate it as soon as this returns.

        A save still under way is waited for. Failures to write are logged and given by `pending_error`.

        Args:
            step: batches consumed.
            state: pytree of arrays.
            metadata: what the checkpoint says of itself: anything that JSON can hold.
            metrics: figures of this state; `heldout_bits_per_byte` decides what `keep_best` keeps.
            force: a checkpoint of this step that exists is set aside as `<step>.replaced-<n>`; otherwise it stays, and
                nothing is saved.

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
            {name: float(value) for name, value in (metrics or {}).items()},
            dict(metadata),
        )
        sealed = record_to_json(record)
        pending = list(digest_each(leaves).values())  # runs on the devices while the next line waits
        self.wait()
        if step in self.steps():
            if not force:
                return SaveResult(False, time.perf_counter() - start)
            self._set_aside(step, "replaced")
        self._writing = step
        self._retention.add(record)
        try:
            with jax.transfer_guard("allow"):  # these transfers are meant, whatever the training loop guards against
                digests = np.stack([np.asarray(value) for value in pending])
                items = {
                    STATE_ITEM: ocp.args.PyTreeSave({"arrays": from_paths(leaves), "digests": digests}),
                    RECORD_ITEM: ocp.args.JsonSave(sealed),
                }
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except OSError as error:
            self._fail(error)
            return SaveResult(False, time.perf_counter() - start)
        return SaveResult(True, time.perf_counter() - start)

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
        for damage in search.damaged:
            self._set_aside(damage.step, "damaged")
        if search.damaged:
            self._log(f"using checkpoint {search.restored.step} instead")
        return search.restored

    def wait(self) -> None:
        """Returns when nothing is being written any more; what went wrong is given by `pending_error`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the storage raised on its thread: the run goes on, the loop decides
            self._fail(error)
        self._writing = None

    def pending_error(self) -> CheckpointError | None:
        """The failure of a save that has ended, once; None while one is being written. Does not wait."""
        if not self._manager.is_saving_in_progress():
            self.wait()
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> None:
        """Waits for the last save and releases the threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            self._sweep()
        multihost_utils.sync_global_devices("maxlm: checkpoints swept")
        return ocp.CheckpointManager(
            self.directory,
            # Weights are noise to a compressor: zstd saved 8% and took three times the CPU time.
            item_handlers={
                STATE_ITEM: ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False),
                RECORD_ITEM: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                # Orbax's own metadata has no seal; a damaged one must not keep a run from starting.
                lightweight_initialize=True,
            ),
        )

    def _sweep(self) -> None:
        """Removes what an interrupted save left behind, by name."""
        for folder in sorted(self.directory.glob(f"*{_TEMPORARY}*")):
            shutil.rmtree(folder)
            self._log(f"removed {folder.name}: the save of this checkpoint was interrupted")

    def _set_aside(self, step: int, why: str) -> None:
        """Renames a checkpoint so that it no longer counts as one."""
        if jax.process_index() == 0:
            number = 1
            while (aside := self.directory / f"{step}.{why}-{number}").exists():
                number += 1
            self.path(step).rename(aside)
            self._log(f"checkpoint {step} was set aside as {aside}")
        self._reopen()

    def _reopen(self) -> None:
        """Lets Orbax see the directory as it is now. (Its `reload` would read metadata that may be damaged.)"""
        self._manager.close()
        self._manager = self._open()

    def _fail(self, error: BaseException) -> None:
        self._failure = CheckpointError(
            f"checkpoint {self._writing} was not saved: {describe(error)}; see that {self.directory} can be written "
            "and has room"
        )
        self._log(str(self._failure))
        self._reopen()


@dataclasses.dataclass
class _Info:
    """What Orbax's policies ask of a checkpoint (their PolicyCheckpointInfo)."""

    step: int
    time: datetime.datetime
    metrics: dict[str, float] | None


class _Retention:
    """Orbax's policies over what our records say of time and metrics (Orbax's own notes of them are not sealed)."""

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
        if config.keep_every_steps:
            chosen.append(policies.EveryNSteps(config.keep_every_steps))
        if config.keep_every_hours:
            chosen.append(policies.EveryNSeconds(config.keep_every_hours * 3600))
        self._policy = policies.AnyPreservationPolicy(chosen)
        self._reader = reader
        self._known: dict[int, _Info] = {}

    def add(self, record: Record) -> None:
        """Notes a checkpoint that is about to be written."""
        score = record.metrics.get(BEST_METRIC, math.nan)
        self._known[record.step] = _Info(
            step=record.step,
            time=datetime.datetime.fromtimestamp(record.saved_at, tz=datetime.UTC),
            metrics=None if math.isnan(score) else {BEST_METRIC: score},
        )

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        """Which of the checkpoints stay; the newest is the one with the highest step."""
        order = sorted(range(len(checkpoints)), key=lambda i: checkpoints[i].step)
        ordered = self._policy.should_preserve([self._info(checkpoints[i].step) for i in order], context=context)
        keep = dict(zip(order, ordered, strict=True))
        return [keep[i] for i in range(len(checkpoints))]

    def _info(self, step: int) -> _Info:
        if step not in self._known:
            try:
                self.add(self._reader.record(step))
            except (OSError, ValueError):  # damaged: kept only as one of the newest or by its step
                self.add(Record(step, 0.0, {}, {}, {}))
        return self._known[step]
