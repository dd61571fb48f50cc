"""What a study keeps on disk: its plan, and the outcome of each run.

plan.json             the runs by label, with their names, and the fingerprint of the data
data/                 tokenizer and token stores that all runs read
runs/NAME/            the workdir of a run (`identity.run_name`), with log.txt and result.json
fit.json, predictions/, report/
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import Config
from maxlm.errors import UserError
from maxlm.files import write_atomically
from maxlm.study.identity import changed_leaves, fingerprint_of
from maxlm.study.plan import PlannedRun
from maxlm.study.spec import Study, StudyError
from maxlm.train.home import weights_given
from maxlm.train.metrics import read_metrics

RESULT, PLAN = "result.json", "plan.json"
SAID_BY = {"budget": "isoflops", "role": "trunks", "width": "sweep"}  # the design by a fact that it alone gives
SMOOTHED = 0.05  # of a run's steps that its loss is averaged over when it is judged
ROSE = 1.1  # a final training loss this many times the lowest has diverged,
ERRORS = 6.0  # if it is this many standard errors above it, too: windows of few small batches scatter by as much


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of plan.json."""

    label: str
    name: str
    facts: Mapping[str, Any]
    params_total: int
    params_nonembedding: int
    tokens: int
    flops: float
    seconds: float
    trunk: str
    fitted: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a run.

    status: finished, or diverged, which another try would not change.
    seconds: of its own steps; a branch's trunk has its own.
    loss: nats a token on the held-out documents, all stores by their tokens; None where it is not finite.
    tokens: loss-bearing ones, a branch's of its trunk included.
    why: of a divergence.
    weights: digest of those that it was given to begin with; "": it drew them, or did not write down which.
    """

    name: str
    status: str
    loss: float | None
    bits_per_byte: float | None
    train_loss: float | None
    tokens: int
    steps: int
    seconds: float
    fingerprint: str
    commit: str
    finished_at: str
    why: str = ""
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class StudyRecord:
    """plan.json: the study's runs, the data that they are to be run on, and its design's name in small letters."""

    study: str
    fingerprint: str
    runs: tuple[Planned, ...]
    design: str


def write_plan(
    folder: Path, study: Study, fingerprint: str, runs: Sequence[PlannedRun], names: Mapping[str, str]
) -> None:
    """Writes plan.json."""
    entries = [
        Planned(
            label=run.label,
            name=names[run.label],
            facts=run.facts,
            params_total=run.params_total,
            params_nonembedding=run.params_nonembedding,
            tokens=run.tokens,
            flops=run.flops,
            seconds=run.seconds,
            trunk=run.branch.trunk if run.branch else "",
            fitted=run.fitted,
        )
        for run in runs
    ]
    content = {
        "study": study.name,
        "design": type(study.design).__name__.lower(),
        "fingerprint": fingerprint,
        "runs": [dataclasses.asdict(entry) for entry in entries],
    }
    write_atomically(folder / PLAN, json.dumps(content, indent=1) + "\n")


def read_plan(folder: Path) -> StudyRecord:
    """plan.json of a study that has been run at least once.

    Raises:
      StudyError: there is none.
    """
    path = folder / PLAN
    if not path.exists():
        raise StudyError(f"{folder} holds no study that was run; type `maxlm study run` first, with the same --dir")
    content = json.loads(path.read_text())
    runs = tuple(Planned(**run) for run in content["runs"])
    return StudyRecord(content["study"], content["fingerprint"], runs, content.get("design") or _design_of(runs))


def _design_of(runs: Sequence[Planned]) -> str:
    """Of a plan.json from before the design was written there: each design says something else of its runs."""
    said = {name for run in runs for name in run.facts}
    return next((design for name, design in SAID_BY.items() if name in said), "rungs")


def read_result(workdir: Path) -> Result | None:
    """The outcome of a run; None: it has not ended."""
    path = workdir / RESULT
    return Result(**json.loads(path.read_text())) if path.exists() else None


def write_result(workdir: Path, result: Result) -> None:
    """Writes result.json, after which the run is never run again."""
    write_atomically(workdir / RESULT, json.dumps(dataclasses.asdict(result), indent=1) + "\n")


def check_unchanged(workdir: Path, run: PlannedRun) -> None:
    """Raises StudyError where a run was begun with settings that its name does not tell from today's."""
    path = workdir / "config.json"
    if path.exists() and (changed := changed_leaves(json.loads(path.read_text()), run.config)):
        raise StudyError(
            f"{run.label} was begun when defaults were others: {'; '.join(changed)}. Set them in the study's base "
            f"config as they were, or remove {workdir} to run it anew"
        )


def data_read(config: Config, workdir: Path) -> str:
    """The fingerprint of the data that a run has read, as its own folder says.

    A run lists its sources when it starts. What the study was planned with says nothing of a file that changed since.

    Raises:
      StudyError: the folder does not say, or the data is there no more.
    """
    from maxlm.data.prepare import prepare_data

    try:
        prepared = prepare_data(config, workdir, build=False)
    except UserError as error:
        raise StudyError(f"what data {workdir} was run on cannot be told: {error}") from error
    stores = {name: store.fingerprint for name, store in prepared.stores.items()}
    return fingerprint_of(stores, prepared.tokenizer.fingerprint)


def outcome(workdir: Path, run: PlannedRun, *, commit: str, now: str) -> Result | None:
    """The result of a run whose program has ended; None where it neither finished nor diverged.

    Diverged is a run that the guard has stopped, one whose held-out loss is not finite or above that of knowing nothing
    (log V), and one whose training loss ends more than ROSE times above its lowest.

    Raises:
      StudyError: see `data_read`.
    """
    steps = list(read_metrics(workdir, "step"))
    report_path = workdir / "report.json"
    report = json.loads(report_path.read_text()) if report_path.exists() else None
    stopped = bool(steps) and steps[-1].get("rejections_in_row", 0) >= run.config.optim.guard.max_rejections
    if report is None and not stopped:
        return None
    loss = heldout_loss(report) if report else None
    first = run.branch.step if run.branch else 0  # a branch's records begin with its trunk's
    why = (
        "the guard refused too many updates in a row"
        if stopped
        else divergence(steps, loss, run.config.model.vocab_size)
    )
    return Result(
        name=workdir.name,
        status="diverged" if why else "finished",
        loss=loss,
        bits_per_byte=report["heldout_bits_per_byte"] if report else None,
        train_loss=_smooth_end(steps),
        tokens=round(sum(record["tokens"] for record in steps)),
        steps=len(steps),
        seconds=sum(record["seconds"] for record in steps if record["step"] > first),
        fingerprint=data_read(run.config, workdir),
        commit=commit,
        finished_at=now,
        why=why,
        weights=weights_given(workdir),
    )


def weights_wanted(facts: Mapping[str, Any], result: Result, ended: Iterable[tuple[Mapping[str, Any], Result]]) -> str:
    """The digest of the weights that a run should have begun with, if it began with others; "": with none or these.

    A name tells only where they were, and what is there may change while the study runs. So the runs that took theirs
    from one place are held to the first of them to end.

    Args:
      facts: those of the run, and in `ended`, in the order of the plan, those of all runs that have ended.
    """
    if not result.weights:
        return ""
    place = "train.init_from"  # a fact where a sweep sets it
    alike = [
        other
        for its_facts, other in ended
        if other.weights and other.fingerprint == result.fingerprint and its_facts.get(place) == facts.get(place)
    ]
    wanted = min(alike, key=lambda other: other.finished_at).weights
    return "" if wanted == result.weights else wanted


def heldout_loss(report: Mapping[str, Any]) -> float | None:
    """Nats a token of a run's report.json, all stores by their tokens; None: not finite, or nothing was held out."""
    records = report["heldout"].values()
    counted = sum(record["tokens"] for record in records)
    # What is not finite is written as null.
    if not counted or any(record["nats_per_token"] is None for record in records):
        return None
    loss = sum(record["nats_per_token"] * record["tokens"] for record in records) / counted
    return loss if math.isfinite(loss) else None


def divergence(steps: Sequence[Mapping[str, Any]], loss: float | None, vocab_size: int) -> str:
    """Why, or nothing."""
    if loss is None:
        return "the held-out loss is not finite, or nothing was held out"
    if loss > math.log(vocab_size):
        return f"the held-out loss {loss:.3f} is above that of knowing nothing, {math.log(vocab_size):.3f}"
    curve = _smoothed(steps)
    if len(curve.means) and curve.means[-1] > max(ROSE * curve.means.min(), curve.means.min() + ERRORS * curve.error):
        return f"the training loss ended at {curve.means[-1]:.3f}, after {curve.means.min():.3f}"
    return ""


class _Smoothed(NamedTuple):
    """means: of losses over windows of SMOOTHED of the steps; error: the standard error of two means' difference."""

    means: np.ndarray
    error: float


def _smoothed(steps: Sequence[Mapping[str, Any]]) -> _Smoothed:
    losses = np.array([record["loss"] for record in steps if record["accepted"]])
    if not len(losses):
        return _Smoothed(losses, 0.0)
    window = max(round(SMOOTHED * len(losses)), 1)
    # From one step to the next a loss moves by its scatter, times the root of two; a median is not moved by spikes.
    moves = 1.4826 * float(np.median(np.abs(np.diff(losses)))) if len(losses) > 1 else 0.0
    return _Smoothed(np.convolve(losses, np.full(window, 1 / window), mode="valid"), moves / math.sqrt(window))


def _smooth_end(steps: Sequence[Mapping[str, Any]]) -> float | None:
    means = _smoothed(steps).means
    return float(means[-1]) if len(means) and math.isfinite(means[-1]) else None
