"""The steps of a run, and what happens between them: metrics, evaluation, checkpoints, rollbacks.

The host stays a step ahead of the devices: it hands them step n, then reads the metrics of step n - 1, and waits for
nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import maxlm
from maxlm.checkpoint.local import LocalCopies
from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.pace import Pace
from maxlm.checkpoint.reader import Restored
from maxlm.cluster import Agreement, decided
from maxlm.config import Config
from maxlm.convert.stored import VOCABULARY
from maxlm.data.loader import Loader, Skip
from maxlm.data.prefetch import Prefetcher
from maxlm.data.prepare import Prepared
from maxlm.data.proof import HEAD_START
from maxlm.errors import UserError
from maxlm.eval.heldout import HeldOut, evaluate_stores, evaluated_names, evaluated_records
from maxlm.model.flops import ledger as flop_ledger
from maxlm.resolve import as_config_dict
from maxlm.train import rollback
from maxlm.train.goodput import Ledger
from maxlm.train.home import SAVED, Home
from maxlm.train.metrics import FAILED_SAVE, MetricsWriter, read_metrics
from maxlm.train.outlook import heaviest
from maxlm.train.peak import Peak, describe_place, run_peak
from maxlm.train.profile import FOLDER as PROFILE
from maxlm.train.profile import Profiler
from maxlm.train.progress import Cost, Progress
from maxlm.train.sentries import Sentries
from maxlm.train.setup import Program, Setup, place_batch
from maxlm.train.signals import Signals
from maxlm.train.state import TrainState
from maxlm.train.watermark import Watermark

EVALUATED = "evaluated"  # of a checkpoint's metadata: the fingerprints of the stores by which the run is judged
RETRY_SECONDS = 5.0  # between tries to save when there is nothing else left to do

Log = Callable[[str], None]


class TrainingStopped(UserError):
    """The run cannot go on by itself; the message says why and what to do."""


class Leaving(Exception):
    """A signal asked the run to leave, and it does: its state is saved at `step`."""

    def __init__(self, signal: str, step: int):
        super().__init__(f"{signal}: saved at step {step}; the same command continues")


class Due(NamedTuple):
    """What is to be done between a step and the next. stop: the signal that asks the run to leave; None: none does."""

    stop: str | None
    audit: bool
    save: bool
    copy: bool
    evaluate: bool


@dataclasses.dataclass
class Run:
    """The parts of a running run, passed around together."""

    config: Config
    home: Home
    setup: Setup
    loader: Loader
    data: Prepared
    checkpointer: Checkpointer
    copies: LocalCopies | None
    writer: MetricsWriter
    goodput: Ledger
    signals: Signals
    sentries: Sentries
    rollbacks: list[rollback.Rollback]  # so far
    vocab_size: int  # without rows that are neither a token's nor the first weights'
    log: Log
    watermark: Watermark | None = None  # since the last program was compiled
    device_bytes: float | None = None  # the most that the heaviest steps held on a device, as `weigh` has found it
    copy_pace: Pace = dataclasses.field(init=False)
    agreement: Agreement = dataclasses.field(init=False)
    step_seconds: float = 0.0  # of a step, lately

    def __post_init__(self) -> None:
        self.agreement = Agreement(self.setup.mesh)
        settings = self.config.checkpoint
        self.copy_pace = Pace(settings.local_every_steps, mtbf=settings.mtbf_hours * 3600)
        for store in self.data.stores.values():
            store.on_arrival(self.data_came_on)

    @property
    def workdir(self) -> Path:
        """The run's folder on this machine."""
        return self.home.folder

    def data_came_on(self) -> None:
        """A part of a store has come from its bucket: whoever waits for data does not hang."""
        if self.goodput.standing[1] in ("data_wait", "evaluation"):
            self.sentries.watchdog.alive()

    def to_the_end(self, state: TrainState, start: int) -> TrainState:
        """`steps`, and again from an earlier checkpoint where too many updates are refused."""
        while True:
            try:
                return self.steps(state, start)
            except rollback.TurnBack as turn:
                since, at = turn.since, turn.at
            del state  # with the exception, whose frames held it, the last one of the way that is given up
            with self.goodput.bucket("restore"):
                state, start = rollback.roll_back(self, since, at)

    def go_on_from(self, restored: Restored, skips: tuple[Skip, ...]) -> None:
        """The run is where a checkpoint was, and passes over other batches from there on."""
        self.goodput.begin_anew(restored.step)
        for pace in (self.checkpointer.pace, self.copy_pace):
            pace.go_on_from(restored.step)
        if self.copies:
            self.copies.forget_after(restored.step)
        self.loader = Loader(self.data.stores, self.config.data, seed=self.config.seed, skips=skips)
        self.sentries.refusals = rollback.refusals(self.config.optim.guard.rollback, restored.state, restored.metadata)
        self.writer.truncate(restored.step)

    def steps(self, state: TrainState, start: int) -> TrainState:
        """Consumes the batches from `start` on.

        Raises:
          Leaving: a signal came, and the state is saved.
          TurnBack: too many updates were refused.
        """
        config, total = self.config, self.config.train.steps
        if start >= total:
            return state
        progress = Progress(
            total_steps=total,
            start_step=start,
            log_every=config.train.log_every,
            cost=self.cost(start),
            stream=sys.stdout if jax.process_index() == 0 else None,
        )
        prefetch = Prefetcher(self.batch, start=start, stop=total, depth=config.data.prefetch)
        profiler = Profiler(config.train.profile, self.workdir / PROFILE, self.signals)
        behind: tuple[int, dict[str, Any]] | None = None
        with (
            prefetch,
            profiler,
            progress,
            self.sentries.watchdog.steps(),
            jax.transfer_guard_device_to_host("disallow"),
        ):
            with progress.once():
                self.sentries.proof.check(wait=HEAD_START)
                self.make_up(state, start)
            self.goodput.settle("step")
            for step in range(start, total):
                if step == start or self.loader.shape(step) != self.loader.shape(step - 1):
                    self.read(behind, progress)
                    behind = None
                    if step > start:
                        self.weigh(state, step - 1)
                    program = self.program(self.loader.shape(step), progress)
                    if step > start:
                        progress.renew(self.cost(step))
                with self.goodput.bucket("data_wait"):
                    batch = next(prefetch)
                profiler.before(step)
                state, metrics = program(state, batch)
                self.signals.armed = True
                if step == start:  # while the devices have something to do
                    self.checkpointer.prepare(self.setup.abstract_state())
                self.read(behind, progress)
                behind = (step, metrics)

                done, due = step + 1, self.due(step + 1)
                if any(due) or done == total or profiler.closing(step):
                    self.read(behind, progress)
                    behind = None
                    self.weigh(state, step)
                    profiler.after(step)
                    with progress.paused(), self.sentries.watchdog.between():
                        self.between(state, batch, done, due)
                self.tell_failures(done)
        return state

    def due(self, done: int) -> Due:
        """What is to be done after so many steps; the same on every process, and called for each step in turn."""
        config, more = self.config, done < self.config.train.steps
        save = self.checkpointer.due(done, time.monotonic()) and more
        return Due(
            stop=self.stop_asked(),
            audit=bool(config.train.audit_every and done % config.train.audit_every == 0),
            save=save,
            copy=self.copies is not None and self.copy_pace.due(done) and not save and more,
            evaluate=self.evaluates(done),
        )

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after so many steps, that at the end apart."""
        every = self.config.eval.every_steps
        return bool(every) and step % every == 0 and step < self.config.train.steps

    def between(self, state: TrainState, batch: Any, done: int, due: Due) -> None:
        """Does what is due after a step. What can be done again, and can fail, comes after the save.

        Raises:
          Leaving: a signal came, and the state is saved.
        """
        if due.stop:
            self.sentries.proof.check()
            self.save(state, done)
            self.settle_save(state, done)
            raise Leaving(due.stop, done)
        if due.audit:  # before the save: of what a faulty device has computed none is to be kept
            with self.goodput.bucket("evaluation"):
                self.sentries.audit.check(state, batch, step=done)
        self.sentries.proof.check()
        if due.save:
            self.save(state, done)
        elif due.copy:
            self.copy(state, done)
        if due.evaluate:
            try:
                held_out = self.evaluate(state, done)
            except Leaving:
                if not due.save:
                    self.save(state, done)
                self.settle_save(state, done)
                raise
            if due.save:  # what was found belongs to that checkpoint
                self.score(done, held_out)
            self.put_down(done, held_out)
            self.goodput.checkpoint(done)

    def make_up(self, state: TrainState, start: int) -> None:
        """Evaluates the state that the run goes on from, where that was cut off after the state had been saved."""
        if not start or not self.evaluates(start):
            return
        wanted = set(evaluated_names(self.config, self.data))
        if not wanted <= set(decided(lambda: self.evaluated(start))):
            self.log(f"the evaluation of step {start} was cut off: it is made up for")
            held_out = self.evaluate(state, start)
            self.score(start, held_out)
            self.put_down(start, held_out)
            self.goodput.checkpoint(start)

    def evaluated(self, step: int) -> list[str]:
        """The stores of which the evaluation of a step is written down, for the process that writes."""
        return [record["store"] for record in read_metrics(self.workdir, "evaluation") if record["step"] == step]

    def heed(self, step: int) -> None:
        """Raises Leaving where a signal asks for it and the state is saved; every process calls it alike."""
        if stop := self.stop_asked():
            raise Leaving(stop, step)

    def stop_asked(self) -> str | None:
        """What asked the run to leave, the same on every process; None: nothing did."""
        if not self.agreement.tell(self.signals.stop is not None):
            return None
        return self.signals.stop or "a signal to another process"

    @functools.cached_property
    def peak(self) -> Peak | None:
        """What the devices can do; measured once, where it has to be."""
        return run_peak(list(self.setup.mesh.devices.flat), self.config.train.precision)

    def cost(self, step: int) -> Cost:
        """What MFU is computed from in the steps from `step` on, also written down for the report."""
        peak = self.peak
        flops = flop_ledger(self.config.model, sequence_length=self.loader.shape(step).sequence_length)
        cost = Cost(flops.six_n, flops.causal_exact, peak.flops if peak else None)
        record = {"peak_source": peak.source if peak else "", **describe_place(self.config, self.setup.mesh)}
        self.writer.write("cost", step, {**dataclasses.asdict(cost), **record})
        return cost

    def program(self, shape: tuple[int, int], progress: Progress) -> Program:
        """The step for one batch shape, with its memory and compile time in the log when it is compiled."""
        with self.goodput.bucket("compile"), progress.once(), self.sentries.watchdog.between():
            program = self.setup.compile(*shape, log=progress.note)
        self.watermark = Watermark()
        return program

    def weigh(self, state: TrainState, step: int) -> None:
        """Notes once what steps have held, after `step`, before a save, an evaluation or a compiler adds to it.

        Of a run with phases the heaviest steps, which are those that a plan is of.
        """
        if self.device_bytes is None and self.watermark and self.loader.shape(step) == heaviest(self.config).shape:
            self.device_bytes = self.watermark.device_bytes(state)

    def batch(self, step: int) -> Any:
        """The batch of a step, on the devices."""
        return place_batch(self.setup.mesh, self.loader.shape(step), lambda rows: self.loader.batch(step, rows))

    def read(self, behind: tuple[int, dict[str, Any]] | None, progress: Progress) -> None:
        """Waits for the metrics of a step, writes them down and judges whether the run may go on."""
        if behind is None:
            return
        step, metrics = behind
        norms = metrics.pop("norms")
        values = {name: np.asarray(value).item() for name, value in jax.device_get(metrics).items()}
        reading = progress.update(
            step + 1,
            tokens=values["tokens"],
            loss=values["loss"],
            learning_rate=values["lr"],
            grad_norm=values["grad_norm"],
            accepted=values["accepted"],
        )
        self.writer.write("step", step + 1, {**values, "seconds": reading.seconds})
        self.step_seconds = 0.9 * self.step_seconds + 0.1 * reading.seconds if self.step_seconds else reading.seconds
        if norms and step % self.config.train.norms_every == 0:
            self.writer.write("norms", step + 1, jax.device_get(norms))
        self.goodput.completed(step + 1)
        self.sentries.watchdog.completed(step + 1)
        self.sentries.refusals.read(step, values["rejections_in_row"])
        if values["rejections_in_row"] >= self.config.optim.guard.max_rejections:
            raise TrainingStopped(
                f"the guard refused the updates of the last {values['rejections_in_row']} steps, up to step {step + 1} "
                f"(loss {values['loss']:.4g} of at most {values['loss_limit']:.4g}, gradient norm "
                f"{values['grad_norm']:.4g} of at most {values['norm_limit']:.4g}). The parameters are those "
                "from before, and so are the checkpoints. Look at metrics.jsonl; lower optim.peak_lr, or raise "
                "optim.guard.threshold if the data has really shifted"
            )

    def evaluate(self, state: TrainState, step: int) -> dict[str, HeldOut]:
        """Held-out quality by store. Raises Leaving: a signal came meanwhile."""

        def came_on(*done: Any) -> None:
            self.sentries.watchdog.alive()
            self.heed(step)

        with self.goodput.bucket("evaluation"):
            final = step == self.config.train.steps
            return evaluate_stores(
                self.setup,
                state.evaluated(),
                self.data,
                final=final,
                progress=came_on,
            )

    def put_down(self, step: int, held_out: Mapping[str, HeldOut]) -> None:
        """Writes an evaluation down; after its score, so that one which is found written down is done with."""
        self.writer.drop("evaluation", step)
        for name, result in held_out.items():
            self.writer.write("evaluation", step, {"store": name, **result._asdict()})
            self.log(f"step {step}: {result.bits_per_byte:.4f} bits per byte on the held-out documents of {name}")
        self.flush()

    def save(self, state: TrainState, step: int) -> None:
        """Starts a checkpoint; what it says of the run makes it readable by itself."""
        with self.goodput.bucket("checkpoint_stall"):
            self.flush()
            self.checkpointer.back_to = rollback.back_to(self.sentries.refusals.steps, self.rollbacks, step)
            result = self.checkpointer.save(step, state, metadata=self.metadata())
            self.note_saved()
            self.goodput.checkpoint(step)
            if result.started:
                self.settle_pace(self.checkpointer.pace, step, result.stall_seconds, self.checkpointer.write_seconds)
            else:  # what was refused at once has cost next to nothing, which says nothing of what a save costs
                self.checkpointer.pace.go_on_from(step)
        self.tell_failures(step)

    def note_saved(self) -> None:
        """Writes down that the run has a checkpoint, once the first is there."""
        if jax.process_index() == 0 and SAVED not in self.home.facts():
            with contextlib.suppress(OSError):  # whether the storage answers, saves say
                for first in self.checkpointer.steps()[:1]:
                    self.home.note_saved(first)

    def score(self, step: int, held_out: Mapping[str, HeldOut]) -> None:
        """Says of the checkpoint of `step` how good it is, where the best are kept."""
        if self.config.checkpoint.keep_best and held_out:
            size = sum(result.bytes for result in held_out.values())
            bits = sum(result.bits_per_byte * result.bytes for result in held_out.values())
            with self.goodput.bucket("checkpoint_stall"):
                self.checkpointer.score(step, bits / size)

    def copy(self, state: TrainState, step: int) -> None:
        """Starts a copy on the machines' own disks."""
        assert self.copies is not None
        with self.goodput.bucket("checkpoint_stall"):
            self.flush()
            began = time.perf_counter()
            self.copies.save(step, state, metadata=self.metadata())
            self.goodput.checkpoint(step)
            self.settle_pace(self.copy_pace, step, time.perf_counter() - began, 0.0)

    def flush(self) -> None:
        """Brings the metrics to the disk before a checkpoint that belongs to them."""
        if error := self.writer.flush():
            self.log(f"metrics wait in memory for room on the disk: {error}")

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of the run, which makes it readable by itself."""
        return {
            "config": as_config_dict(self.config).to_dict(),
            "data": self.loader.records(),
            EVALUATED: evaluated_records(self.config, self.data),
            "tokenizer": self.data.tokenizer.fingerprint,
            VOCABULARY: self.vocab_size,
            "run": self.home.run,
            "version": maxlm.__version__,
            rollback.REFUSED: self.sentries.refusals.steps,
        }

    def settle_pace(self, pace: Pace, step: int, cost: float, write_seconds: float) -> None:
        """Decides when the next save is due, and says so where the choice is made by failures and cost."""
        steps = pace.saved(step, cost=cost, write_seconds=write_seconds, step_seconds=self.step_seconds)
        if self.config.checkpoint.mtbf_hours:
            kind = "copy" if pace is self.copy_pace else "checkpoint"
            self.writer.write("pace", step, {kind: {"cost_seconds": cost, "next_in_steps": steps}})

    def tell_failures(self, step: int) -> None:
        """Writes down a save that has failed; too many of them in a row end the run."""
        error, in_row = self.checkpointer.pending_error(), self.checkpointer.failures
        if error:
            self.writer.write(FAILED_SAVE, step, {"reason": str(error), "in_row": in_row})
            self.log(f"saves that failed in a row: {in_row}, of {self.config.checkpoint.max_failures} that end the run")
        if in_row >= self.config.checkpoint.max_failures:
            raise TrainingStopped(
                f"the last {in_row} checkpoints could not be saved: {error or self.checkpointer.directory}. What was "
                "trained since the newest one is lost; mend the storage and run the same command, or raise "
                "checkpoint.max_failures"
            )

    def settle_save(self, state: TrainState, step: int) -> None:
        """Waits until the checkpoint of `step` is there; a run must not end as if it were saved when it is not."""
        with self.goodput.bucket("checkpoint_stall"):
            self.checkpointer.wait()
        self.tell_failures(step)
        while self.checkpointer.failures:
            self.sentries.watchdog.alive()
            time.sleep(RETRY_SECONDS)
            self.save(state, step)
            self.checkpointer.wait()
            self.tell_failures(step)
        self.note_saved()
        self.goodput.checkpoint(step)  # with what the wait has taken
