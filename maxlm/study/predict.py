"""A prediction is written down before the larger run begins, and judged after it has ended.

predictions/NAME/prediction.json    what was predicted, when, by which fit of which runs
predictions/NAME/config.py          the larger run, ready for `maxlm train`
predictions/NAME/judgement.json     how it came out; of further runs judgement.2.json, judgement.3.json, ...
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import Config
from maxlm.configfile import known, source
from maxlm.files import write_atomically
from maxlm.resolve import ConfigError, as_config_dict, resolve
from maxlm.study import ladder
from maxlm.study.curve import TooFewRuns
from maxlm.study.fitting import StudyFit, as_json, fit_study, foretell, no_forecast
from maxlm.study.identity import changed_leaves, commit, run_name
from maxlm.study.law import LEVEL
from maxlm.study.plan import plan
from maxlm.study.results import data_read, heldout_loss
from maxlm.study.spec import Study, StudyError
from maxlm.train.home import began, weights_given

TOLERANCE = 0.02  # of N or D by which a run may differ from the one that was predicted


class Target(NamedTuple):
    """The run that is predicted. positions: over all steps; tokens: those of them that bear a loss."""

    config: Config
    size: ladder.Size
    positions: int
    tokens: int
    flops: float


def predict(study: Study, folder: Path, *, flops: float, counted: str = "besides embeddings") -> Path:
    """Writes down the loss of a run of `flops`, with its interval and the date, and that run's config.

    By the parametric law where the runs allow it, else by the isoflop fit, whose law of the best N sets the size, or by
    the curve through the rungs, whose rules set it. It is a prediction interval: what the fit leaves uncertain, and how
    far one run scatters about it.

    Returns:
      The prediction's folder.

    Raises:
      StudyError: a run of the study has as much compute already, this target has a prediction, or the folder's runs
        are not those that the study plans now.
      TooFewRuns: the runs allow no forecast.
    """
    fit = fit_study(folder, counted=counted)
    largest = max(row.planned.flops for row in fit.gathered.rows)
    if flops <= largest:
        raise StudyError(f"--flops is {flops:.3g}, but the study has runs of {largest:.3g}; predict a larger one")
    place = folder / "predictions" / f"{flops:.2e}".replace("+", "")
    if (place / "prediction.json").exists():
        raise StudyError(f"{place} has a prediction of this run; it stays as it is. Judge it, or predict another")
    target = _target(study, folder, fit, flops)
    _check_planned(study, folder, fit)
    params = target.size.total if counted == "total" else target.size.besides_embeddings
    foretold = foretell(fit, params=params, tokens=target.tokens, flops=flops)
    content = {
        "study": study.name,
        "date": _now(),
        "loss": foretold.loss,
        "interval": list(foretold.interval),
        "level": LEVEL,
        "interval_kind": "prediction interval of one run",
        "how": foretold.how,
        "flops": target.flops,
        "params_total": target.size.total,
        "params_nonembedding": target.size.besides_embeddings,
        "positions": target.positions,
        "tokens": target.tokens,
        "fingerprint": fit.gathered.record.fingerprint,
        "weights": _weights(study, fit),
        "fit": hashlib.sha256(json.dumps(as_json(fit), sort_keys=True).encode()).hexdigest()[:16],
        "runs": {row.planned.label: row.planned.name for row in fit.gathered.rows},
        "commit": commit(),
        "config": as_config_dict(target.config).to_dict(),
    }
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / "config.py", source(target.config))
    write_atomically(place / "prediction.json", json.dumps(content, indent=1) + "\n")
    return place


def judge(folder: Path, place: Path, workdir: Path, *, home: str | Path = "") -> str:
    """Compares a prediction with the run in `workdir`; returns the verdict in a sentence, and writes it down.

    Args:
      home: where the run lives if that is a bucket; `workdir` then is a copy on this machine.

    Raises:
      StudyError: the prediction or the run is not there or not finished, the run began before the prediction was
        written, it is another run than was predicted, on other data or begun with other weights, or its held-out
        loss is not finite.
    """
    run = str(home or workdir)
    said, report = place / "prediction.json", workdir / "report.json"
    if not said.exists():
        raise StudyError(f"{place} holds no prediction; those of this study are in {folder / 'predictions'}")
    if not report.exists():
        raise StudyError(f"{run} has no report.json: give the folder of a run that has ended")
    prediction, figures = json.loads(said.read_text()), json.loads(report.read_text())
    note = _check_later(prediction, workdir)
    _check_same(prediction, place, figures, workdir)
    found = heldout_loss(figures)
    if found is None:
        raise StudyError(
            f"{run} has no held-out loss that is finite: it diverged, or nothing was held out, and says nothing of "
            f"the prediction; see its report.md, and run {place / 'config.py'} again in another folder"
        )
    low, high = prediction["interval"]
    held = low <= found <= high
    miss = found / prediction["loss"] - 1
    sentence = (
        f"the prediction {'held' if held else 'did not hold'}: {prediction['loss']:.4f} [{low:.4f}, {high:.4f}] was "
        f"written on {prediction['date']}, and the run came to {found:.4f}, {miss:+.2%} from it{note}"
    )
    verdict = {"date": _now(), "workdir": run, "found": found, "held": held, "miss": miss, "verdict": sentence}
    before = _judgements(place)
    if not any(each["workdir"] == run and each["found"] == found for each in before):
        name = f"judgement.{len(before) + 1}.json" if before else "judgement.json"
        write_atomically(place / name, json.dumps(verdict, indent=1) + "\n")
    return sentence


def _judgements(place: Path) -> list[dict[str, Any]]:
    """All verdicts on a prediction, the first one first: none takes the place of another."""
    paths = [place / "judgement.json", *(place / f"judgement.{n}.json" for n in range(2, 1000))]
    return [json.loads(path.read_text()) for path in itertools.takewhile(Path.exists, paths)]


def predictions(folder: Path) -> list[dict[str, Any]]:
    """All predictions of a study with their judgements, under "judgements", the first one first."""
    return [
        json.loads(path.read_text()) | {"name": path.parent.name, "judgements": _judgements(path.parent)}
        for path in sorted((folder / "predictions").glob("*/prediction.json"))
    ]


def _target(study: Study, folder: Path, fit: StudyFit, flops: float) -> Target:
    """The run that the study's rules make of a budget, of the size that the fits call best."""
    base, rules = study.base, study.rules
    share = _share_besides(fit) if fit.counted == "total" else 1.0
    if fit.isoflops and fit.isoflops.params:
        shape = ladder.shape_by_params(rules, base, share * fit.isoflops.params(flops))
    elif fit.law:
        shape = ladder.shape_by_params(rules, base, share * fit.law.fit.law.optimum(flops).params)
    elif fit.curve:
        shape = ladder.shape_by_flops(rules, base, flops)  # the next rung
    else:
        raise TooFewRuns(no_forecast(fit))
    config = ladder.configure(base, shape, rules, devices=study.machine.devices, flops=flops)
    cache = config.data.cache_dir or str(folder / "data")
    config = dataclasses.replace(
        config, name=f"{study.name} {flops:.2e}", data=dataclasses.replace(config.data, cache_dir=cache)
    )
    size = ladder.measure(config.model, config.data.sequence_length)
    positions = config.train.steps * config.data.batch_size * config.data.sequence_length
    return Target(config, size, positions, round(positions * _share_bearing(fit)), positions * size.flops)


def _check_planned(study: Study, folder: Path, fit: StudyFit) -> None:
    """The larger run is made by the study's file, which has to be what the runs behind the fit were made by."""
    record = fit.gathered.record
    now = {run.label: run_name(run.config, record.fingerprint) for run in plan(study)}
    if now != {run.label: run.name for run in record.runs}:
        raise StudyError(
            f"the runs in {folder} are not those that the study plans now: its file has changed since, or this is the "
            "folder of another study; type `maxlm study run` again for what is missing, or another --dir"
        )


def _weights(study: Study, fit: StudyFit) -> str:
    """The digest of the weights that the larger run begins with, as the study's runs did; "": it draws them."""
    place, base = "train.init_from", study.base.train.init_from
    rows = [row for row in fit.gathered.rows if row.planned.facts.get(place, base) == base]
    return next((row.result.weights for row in rows if row.result.weights), "")


def _share_bearing(fit: StudyFit) -> float:
    """Of the positions, those that bear a loss, as in the study's own runs: the first of each document does not."""
    rows = fit.gathered.rows
    return sum(row.result.tokens for row in rows) / sum(row.planned.tokens for row in rows)


def _share_besides(fit: StudyFit) -> float:
    """Parameters besides embeddings over all, of the study's largest model."""
    planned = max((row.planned for row in fit.gathered.rows), key=lambda item: item.params_total)
    return planned.params_nonembedding / planned.params_total


def _check_later(prediction: dict[str, Any], workdir: Path) -> str:
    """The run has to have begun after the prediction was written; returns what is to be said where it does not tell."""
    written, note = datetime.datetime.fromisoformat(prediction["date"]), ""
    started = began(workdir)
    if started is None:
        # From before runs wrote it down. Of what is left the oldest file is the best that can be had.
        times = [path.stat().st_mtime for path in workdir.iterdir() if path.is_file()]
        started = datetime.datetime.fromtimestamp(min(times), datetime.UTC)
        note = "; when it began it has not written down, so that its files' times had to do"
    if started < written - datetime.timedelta(seconds=1):
        raise StudyError(
            f"{workdir} began ({started.isoformat(timespec='seconds')}) before the prediction was written "
            f"({prediction['date']}): what was known is not predicted"
        )
    return note


def _check_same(prediction: dict[str, Any], place: Path, figures: dict[str, Any], workdir: Path) -> None:
    """The run has to be the predicted one, on the same data."""
    config = workdir / "config.json"
    if not config.exists():
        raise StudyError(f"{workdir} has no config.json: give the folder of a run, as `maxlm train` has left it")
    wanted = prediction["params_nonembedding"], prediction["tokens"]
    params, tokens = figures["model"]["parameters besides embeddings"], figures["tokens"]
    if abs(params / wanted[0] - 1) > TOLERANCE or abs(tokens / wanted[1] - 1) > TOLERANCE:
        raise StudyError(
            f"{workdir} has {params:,} parameters besides embeddings and {tokens:,} tokens, but {wanted[0]:,} and "
            f"{wanted[1]:,} were predicted; run {place / 'config.py'}"
        )
    try:
        recorded = resolve(known(json.loads(config.read_text())).given)
    except ConfigError as error:
        raise StudyError(
            f"this version refuses what {config} records, so that it cannot judge the run: {error}"
        ) from None
    if changed := changed_leaves(prediction["config"], recorded):
        raise StudyError(f"{workdir} is another run than was predicted: {'; '.join(changed)}")
    found, wanted_data = data_read(recorded, workdir), prediction["fingerprint"]
    if found != wanted_data:
        raise StudyError(
            f"{workdir} was run on other data (fingerprint {found[:12]}, the study's is {wanted_data[:12]}); run "
            f"{place / 'config.py'} with data.cache_dir as it stands there"
        )
    given, study_gave = weights_given(workdir), prediction.get("weights", "")
    if given and study_gave and given != study_gave:
        raise StudyError(
            f"{workdir} began with other weights (digest {given}) than the study's runs ({study_gave}): what is in "
            "train.init_from has changed"
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
