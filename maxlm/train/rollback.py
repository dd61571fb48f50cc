"""Going back to an earlier checkpoint when updates are refused too often, past the batches between.

The guard refuses single updates. Many of them in a short time mean that the parameters have gone astray, or that a
stretch of the data is bad. Then the run restores a checkpoint from before the first of these refusals and goes on with
the batches after the last one that it has consumed, as PaLM's authors did by hand (Chowdhery et al. 2022, 5.1).

A rollback is a line of rollbacks.json in the run's folder, written before anything follows from it. All of it is
decided from the metrics, which are the same in every process, and from what is in the checkpoint; so a run that is
killed at any moment decides and goes on alike, and data stays a pure function of what is recorded: the skips of the
loader follow from the rollbacks. Checkpoints of the way that was given up are set aside, as `<step>.rolled_back-<n>`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.reader import CheckpointError, CheckpointReader, Restored
from maxlm.cluster import decided
from maxlm.data.loader import Skip
from maxlm.errors import UserError
from maxlm.files import write_atomically
from maxlm.storage import StorageError
from maxlm.train.state import TrainState, as_configured

if TYPE_CHECKING:
    from maxlm.train.loop import Run

FILE_NAME = "rollbacks.json"
REFUSED = "refused"  # of a checkpoint's metadata: the steps lately refused before it
_ASIDE = "rolled_back"


class Rollback(NamedTuple):
    """`at` batches had been consumed when the run went back to the checkpoint of step `to`."""

    at: int
    to: int


class TurnBack(Exception):
    """Too many updates were refused: from step `since` on, when `at` batches had been consumed."""

    def __init__(self, since: int, at: int):
        super().__init__(f"refusals since step {since}, seen after step {at}")
        self.since, self.at = since, at


class Refusals:
    """The steps of late whose updates were refused.

    Args:
      rule: (K, M, N) of `optim.guard.rollback`.
      steps: those known from before, from the checkpoint.
      in_row: refusals in a row up to then, from the state.
    """

    def __init__(self, rule: tuple[int, int, int], *, steps: Sequence[int], in_row: int):
        self._count, self._within, _ = rule
        self.steps, self._in_row = list(steps), in_row

    def read(self, step: int, in_row: int) -> None:
        """Takes what the metrics of a step say. Refusals that loss scaling will mend are not counted in a row.

        Raises:
          TurnBack: K updates of the last M were refused.
        """
        if in_row > self._in_row:
            self.steps.append(step)
        self._in_row = in_row
        self.steps = [refused for refused in self.steps if refused > step - self._within]
        if self._count and len(self.steps) >= self._count:
            raise TurnBack(self.steps[0], step + 1)


def refusals(rule: tuple[int, int, int], state: TrainState, metadata: Mapping[str, Any]) -> Refusals:
    """What a state and the metadata that it came with say of refusals."""
    return Refusals(rule, steps=metadata.get(REFUSED, ()), in_row=int(jax.device_get(state.guard.in_row)))


def recorded(workdir: Path) -> list[Rollback]:
    """The rollbacks of a run so far."""
    path = workdir / FILE_NAME
    return [Rollback(**line) for line in json.loads(path.read_text())] if path.exists() else []


def hand_on(workdir: Path, checkpoints: Path, step: int, heir: Path) -> None:
    """Gives another run, which goes on from this one's checkpoint of `step`, the rollbacks from before that was saved.

    Raises:
      OSError, ValueError: the checkpoint's record cannot be read, or nothing be written.
    """
    if rollbacks := recorded(workdir):
        known = CheckpointReader(checkpoints).record(step).metadata["data"]["skips"]
        _write(heir / FILE_NAME, rollbacks[: len(known)])


def skips(rollbacks: Sequence[Rollback]) -> tuple[Skip, ...]:
    """The batches that these rollbacks pass over: at each step gone back to, all that had been consumed from there."""
    return tuple(Skip(to, at - to) for at, to in rollbacks)


def back_to(refused: Sequence[int], rollbacks: Sequence[Rollback], done: int) -> int | None:
    """The newest step that a rollback could go back to if more updates are refused now; None: any will do.

    Args:
      refused: the steps lately refused.
      done: batches consumed.
    """
    since = refused[0] if refused else done
    return _newest(since, rollbacks) if refused or _again(since, rollbacks) else None


def _again(since: int, rollbacks: Sequence[Rollback]) -> bool:
    """Whether it is the same trouble, before the run has come past where it turned: it began earlier than was seen."""
    return bool(rollbacks) and since < rollbacks[-1].at


def _newest(since: int, rollbacks: Sequence[Rollback]) -> int:
    """The newest step to go back to when the first of the refusals was at step `since`."""
    return min(since, rollbacks[-1].to - 1) if _again(since, rollbacks) else since


def set_others_aside(checkpointer: Checkpointer, rollbacks: Sequence[Rollback], *, damaged: bool = False) -> None:
    """Takes the checkpoints of the way that the last rollback gave up out of the way, if a kill has left any.

    Process 0 says which these are: it renames them, after which another that is slower would not find them any more.

    Args:
      damaged: those too that do not say which way they belong to. A start names them when it restores; where the run
        goes on without one, they would be taken for the saves of their steps.
    """
    if rollbacks and (others := decided(lambda: _given_up(checkpointer, rollbacks, damaged))):
        checkpointer.set_aside(others, _ASIDE)


def _given_up(checkpointer: Checkpointer, rollbacks: Sequence[Rollback], damaged: bool) -> list[int]:
    """The steps of the checkpoints that belong to the way that the last rollback gave up."""
    expected, found = [list(skip) for skip in skips(rollbacks)], []
    for step in checkpointer.steps():
        if step <= rollbacks[-1].to:
            continue
        try:
            known = checkpointer.record(step).metadata["data"]["skips"]
        except StorageError:
            raise
        except (OSError, ValueError):
            known = None if damaged else expected
        if known != expected:
            found.append(step)
    return found


def roll_back(run: Run, since: int, at: int) -> tuple[TrainState, int]:
    """Takes the run back; its state and step there. The loader, the metrics and the ledger go back with it.

    Args:
      since: step of the first of the refusals.
      at: batches consumed.

    Raises:
      UserError: it was taken back often enough already, or there is no whole checkpoint that is old enough.
    """
    count, within, most = run.config.optim.guard.rollback
    rollbacks = run.rollbacks
    trouble = f"the updates of {count} of the last {within} steps were refused, from step {since + 1} to {at}"
    if len(rollbacks) >= most:
        raise UserError(
            f"{trouble}, and the run was taken back {most} times already (optim.guard.rollback). The checkpoints are "
            f"as they were. Look at metrics.jsonl and {FILE_NAME}; lower optim.peak_lr, look at the data, or raise the "
            "third number of optim.guard.rollback"
        )
    newest = _newest(since, rollbacks)
    run.checkpointer.wait()
    restored = _restore(run, newest)
    if restored is None:
        every = run.config.checkpoint.every_steps
        advice = "keep more of them (checkpoint.keep_latest, keep_every_steps)"
        if newest < every:
            advice = f"the first was due at step {every}: lower checkpoint.every_steps"
        raise UserError(
            f"{trouble}, and there is no whole checkpoint of step {newest} or before to go back to; {advice}, or lower "
            "optim.peak_lr"
        )
    rollbacks.append(Rollback(at, restored.step))
    if jax.process_index() == 0:
        _record(run.workdir / FILE_NAME, rollbacks, trouble)
        run.home.push()
    set_others_aside(run.checkpointer, rollbacks, damaged=True)
    further = itertools.takewhile(lambda each: each.to >= restored.step, reversed(rollbacks))
    passed = sum(each.at - each.to for each in further)  # with those that earlier rollbacks to here or after passed
    run.log(
        f"{trouble}: back to the checkpoint of step {restored.step}, past {passed} batches (rollback {len(rollbacks)} "
        f"of at most {most})"
    )
    run.go_on_from(restored, skips(rollbacks))
    run.writer.write("rollback", restored.step, {"at": at, "since": since, "batches": passed})
    return restored.state, restored.step


def _write(path: Path, rollbacks: Sequence[Rollback]) -> None:
    write_atomically(path, json.dumps([each._asdict() for each in rollbacks], indent=1) + "\n")


def _record(path: Path, rollbacks: Sequence[Rollback], trouble: str) -> None:
    try:
        _write(path, rollbacks)
    except OSError as error:
        raise UserError(
            f"{trouble}, and the run cannot be taken back, as {path} cannot be written ({error}). Nothing has changed: "
            "see that there is room and that it may be written; the same command goes on from the newest checkpoint"
        ) from error


def _restore(run: Run, newest: int) -> Restored | None:
    """The newest whole checkpoint that is not newer than that."""
    for step in decided(lambda: [old for old in reversed(run.checkpointer.steps()) if old <= newest]):
        try:
            found = run.checkpointer.restore(run.setup.abstract_state(), step=step)
            return found and found._replace(state=as_configured(found.state, run.config, found.metadata))
        except CheckpointError as error:
            run.log(str(error))
    return None
