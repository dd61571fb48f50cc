"""A run from its config to its report: prepare, restore, train, report.

Read `train_at` top to bottom; its steps are in `loop`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from maxlm import configfile
from maxlm.checkpoint.bucket import open_checkpointer
from maxlm.checkpoint.local import LocalCopies
from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.reader import CheckpointError, Restored
from maxlm.cluster import agree_on, decided
from maxlm.compilation import settle_cpu_devices, use_compilation_cache
from maxlm.config import Config
from maxlm.convert.stored import VOCABULARY
from maxlm.data.loader import Loader, check_records
from maxlm.data.prepare import Prepared, prepare_data
from maxlm.data.proof import Proof
from maxlm.errors import UserError
from maxlm.eval.heldout import check_evaluated, evaluated_records
from maxlm.files import write_atomically
from maxlm.heartbeat import Heartbeat, Standing
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train import rollback
from maxlm.train.alone import alone
from maxlm.train.budget import fitted_steps, recorded_steps, with_steps
from maxlm.train.finish import check_finish, finish
from maxlm.train.first import first_weights, settle_weights
from maxlm.train.goodput import Ledger, process_age
from maxlm.train.home import SAVED, Home, first_start
from maxlm.train.loop import EVALUATED, Leaving, Run
from maxlm.train.metrics import MetricsWriter, Truncation
from maxlm.train.peak import describe_devices
from maxlm.train.sentries import Sentries
from maxlm.train.setup import Setup, make_setup
from maxlm.train.signals import EXIT_PREEMPTED, Signals
from maxlm.train.state import TrainState, as_configured, make_state
from maxlm.train.watchdog import Watchdog

Log = Callable[[str], None]


def train(config: Config, workdir: str | Path, *, log: Log, heartbeat: Heartbeat | None = None) -> int:
    """Trains the run in `workdir`, a folder or a bucket's, or continues it, and returns the exit code of the process.

    0: the run is complete and its report is written. EXIT_PREEMPTED: a signal asked it to stop; the state is saved,
    and the same command continues.

    Args:
      heartbeat: the watch over the other processes, which is told where this one is; None: there are none.

    Raises:
      UserError: what is in `workdir` does not go with the config, no checkpoint is whole, too many updates in a row
        were refused or too many saves in a row have failed, a bucket does not answer, or something else trains there.
    """
    settle_cpu_devices()
    run = decided(lambda: first_start(workdir))
    place = Home(workdir, log=log, writes=jax.process_index() == 0, run=run)
    said = _silent if jax.process_index() else log
    try:
        with alone(place.folder, log=log), place as home:
            train_at(config, home, log=said, heartbeat=heartbeat or Heartbeat())
    except Leaving as leaving:  # out here: the state is saved, whatever becomes of the last metrics
        said(str(leaving))
        return EXIT_PREEMPTED
    return 0


def train_at(config: Config, home: Home, *, log: Log, heartbeat: Heartbeat) -> None:
    """`train`, where the run's files are on this machine. Raises Leaving: a signal came, and the state is saved."""
    first_process, workdir = jax.process_index() == 0, home.folder
    with (
        Ledger(workdir if first_process else None, age=process_age()) as goodput,
        Signals(functools.partial(leave_early, heartbeat)) as signals,
        contextlib.ExitStack() as refused,
    ):
        heartbeat.last_words = goodput.break_off
        heartbeat.standing = lambda: Standing(*goodput.standing)
        # --- devices, data, model
        use_compilation_cache(config.train.compilation_cache)
        given = recorded_steps(config, workdir)
        if given is not config:
            log(
                f"train.steps is {given.train.steps}, as this run was given at its first start; type "
                "train.budget_seconds=0 and train.steps=... for another number"
            )
        config = resolve(given, devices=jax.device_count())
        if first_process and (prepared := workdir / "data" / "prepared.json").exists():
            refused.callback(put_back, prepared, prepared.read_bytes())  # it goes with the checkpoints that are there
        data = prepare_together(config, home)
        check_finish(config, data)
        proof = Proof(data.stores if first_process else {})
        rollbacks = [rollback.Rollback(*each) for each in decided(lambda: rollback.recorded(workdir))]
        loader = Loader(data.stores, config.data, seed=config.seed, skips=rollback.skips(rollbacks))
        mesh = make_mesh(config.parallel)
        setup = make_setup(config, mesh)
        log(f"{describe_devices(list(mesh.devices.flat))}, attention by the {setup.attention!r} back end")
        if config.train.budget_seconds:
            with goodput.bucket("compile"):
                steps = fitted_steps(config, setup, loader, log=log)
            given, setup = with_steps(given, steps), setup.with_steps(steps)
            config = resolve(given, devices=jax.device_count())
        agree_on("train.steps", str(config.train.steps))

        # --- state
        times, least = config.train.watchdog
        watchdog = Watchdog(times, least, folder=workdir, process=jax.process_index(), stuck=heartbeat.stuck)
        with (
            watchdog,
            open_checkpointer(home.checkpoints, config.checkpoint, log=log) as checkpointer,
            local_copies(config, home, log=log) as copies,
        ):
            checkpointer.before_commit = home.push
            with goodput.bucket("restore"):
                rollback.set_others_aside(checkpointer, rollbacks)
                state, start, metadata, vocab_size = begin(
                    config, home, setup, loader, data, checkpointer, copies, log=log
                )
                goodput.restored(start)
            if first_process:  # only now: a config that does not go with the run has been refused
                configfile.record(given, workdir, log=log)
            refused.pop_all()

            # --- steps, then the report
            with MetricsWriter(workdir, config, process_index=jax.process_index(), log=log) as writer:
                tell_cut(writer.truncate(start), start, log=log)
                sentries = Sentries.post(setup, watchdog, proof, state=state, metadata=metadata, log=log)
                run = Run(
                    config,
                    home,
                    setup,
                    loader,
                    data,
                    checkpointer,
                    copies,
                    writer,
                    goodput,
                    signals,
                    sentries,
                    rollbacks,
                    vocab_size,
                    log,
                )
                finish(run, run.to_the_end(state, start))


def put_back(file: Path, before: bytes) -> None:
    """Writes the file as it was: of a start that is refused nothing is left."""
    if file.read_bytes() != before:
        write_atomically(file, before)


def leave_early(heartbeat: Heartbeat, signal: str) -> None:
    """Ends all processes where a signal comes before the first step."""
    heartbeat.leave_together(f"{signal} before the first step: there is nothing to save yet", code=EXIT_PREEMPTED)


def tell_cut(done: Truncation, start: int, *, log: Log) -> None:
    """Says where metrics.jsonl does not hold all steps up to `start`, where the run goes on."""
    if done.unreadable:
        log(f"metrics.jsonl had {done.unreadable} lines that could not be read; they were left out")
    if done.last_step != start:
        log(f"metrics.jsonl ends with step {done.last_step}, the run goes on from {start}: what is between is missing")


def local_copies(config: Config, home: Home, *, log: Log) -> contextlib.AbstractContextManager[LocalCopies | None]:
    """The copies on this machine's own disk, if they are wanted."""
    folder = config.checkpoint.local_dir
    return contextlib.closing(LocalCopies(folder, home.place, log=log)) if folder else contextlib.nullcontext()


class Beginning(NamedTuple):
    """Where a run begins or goes on. metadata: what its checkpoint says; vocab_size: rows that are not padding."""

    state: TrainState
    step: int
    metadata: Mapping[str, Any]
    vocab_size: int


def begin(
    config: Config,
    home: Home,
    setup: Setup,
    loader: Loader,
    data: Prepared,
    checkpointer: Checkpointer,
    copies: LocalCopies | None,
    *,
    log: Log,
) -> Beginning:
    """The newest checkpoint that is whole, or step 0.

    Raises:
      CheckpointError: there is none, and there was one.
      UserError: it does not go with the config.
    """
    restored = restore(checkpointer, copies, setup, loader, run=home.run)
    if restored is None:
        decided(lambda: check_none_saved(home), error=CheckpointError)
        params, vocab_size = first_weights(config, setup, home.folder, data, log=log)
        if params is not None:
            settle_weights(home, params, config.train.init_from, log=log)
        return Beginning(make_state(config, setup.optimizer, setup.shardings, params), 0, {}, vocab_size)
    step, metadata = restored.step, restored.metadata
    if step > config.train.steps:
        raise UserError(
            f"the run in {home.place} is at step {step}, and train.steps is {config.train.steps}: type {step} or more, "
            "or take its weights as they are with `maxlm generate` or `maxlm convert`"
        )
    if step in decided(checkpointer.steps):  # and not in a local copy alone, which another machine does not have
        home.note_saved(step)
    check_records(metadata["data"], loader.records(), step=step)
    check_evaluated(metadata.get(EVALUATED, {}), evaluated_records(config, data), step=step)
    state = as_configured(restored.state, config, metadata)
    if copies:
        copies.forget_after(step)
    log(f"continuing from the checkpoint of step {step}")
    return Beginning(state, step, metadata, metadata.get(VOCABULARY, config.model.vocab_size))


def check_none_saved(home: Home) -> None:
    """Raises CheckpointError where the run has had a checkpoint: they are gone, and it must not begin from scratch."""
    saved = home.facts().get(SAVED)
    if saved is not None:
        raise CheckpointError(
            f"the run in {home.place} has had checkpoints, that of step {saved} for one, and neither one nor a local "
            f"copy is there: bring {home.checkpoints} back (is the disk mounted?), or start anew in another workdir"
        )


def restore(
    checkpointer: Checkpointer, copies: LocalCopies | None, setup: Setup, loader: Loader, *, run: str
) -> Restored | None:
    """The newest state there is: that of local copies of this run, where they go beyond the newest whole checkpoint."""

    def of_this_run(metadata: Mapping[str, Any]) -> bool:
        return metadata.get("run", "") == run and metadata["data"] == loader.records()

    wanted = setup.abstract_state()
    if copies is None:
        return checkpointer.restore(wanted)
    newest = decided(lambda: max(checkpointer.steps(), default=0))
    if found := copies.restore(wanted, after=newest, usable=of_this_run):
        return found
    restored = checkpointer.restore(wanted)
    if restored is None or restored.step == newest:
        return restored
    step = restored.step  # the newer ones are damaged, and copies may go beyond this one
    del restored  # the devices may not have room for two states
    return copies.restore(wanted, after=step, usable=of_this_run) or checkpointer.restore(wanted)


def prepare_together(config: Config, home: Home) -> Prepared:
    """The data of a run: the first process makes what is missing, the others wait for it, and all have the same.

    Raises:
      UserError: on every process, if one of them could not prepare or read the data, or reads other data.
    """
    if jax.process_count() == 1:
        return prepare_data(config, home.folder, home=home.place)
    prepared: Prepared | None = None
    for turn in (0, 1):  # the first process builds, then the others read what it has made
        found: str | UserError = "nothing yet"
        try:
            if (jax.process_index() == 0) == (turn == 0):
                if turn == 1:
                    home.pull()
                prepared = prepare_data(config, home.folder, build=turn == 0, home=home.place)
                if turn == 0:
                    home.push()
        except UserError as error:
            found = error
        if prepared and turn == 1:
            found = prepared.fingerprint()
        agree_on("data", found)
    assert prepared is not None
    return prepared


def _silent(line: str) -> None:
    """Every process but the first says nothing."""
