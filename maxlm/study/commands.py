"""`maxlm study <verb> STUDY.py`: reads the flags and calls the part that does the work."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.table import Table

from maxlm.errors import UserError
from maxlm.files import write_asked
from maxlm.study.spec import Study, load_study

Log = Callable[[str], None]


OF_VERBS = {
    "json": ("plan", "fit"),
    "topology": ("plan",),
    "launcher": ("run",),
    "jobs": ("run",),
    "flops": ("predict",),
    "prediction": ("judge",),
    "workdir": ("judge",),
    "count": ("fit", "predict", "report"),
}
"""The verbs that a flag is for, where it is not for all of them."""


def define_flags(values: flags.FlagValues) -> None:
    """The flags of all verbs."""

    def helped(name: str, words: str) -> str:
        return f"{', '.join(OF_VERBS[name])}: {words}"

    flags.DEFINE_string("dir", None, "folder of the study; studies/NAME", flag_values=values)
    for name, words in (
        ("json", "also write the figures to this file"),
        ("topology", "hardware whose time and price count, such as v5e-8"),
        ("launcher", "command of launch/ that starts each run and lasts as long"),
        ("prediction", "name of the prediction; the only one"),
        ("workdir", "folder of the larger run"),
    ):
        flags.DEFINE_string(name, None, helped(name, words), flag_values=values)
    jobs = helped("jobs", "runs at a time; 0: as the study says")
    flags.DEFINE_integer("jobs", 0, jobs, flag_values=values, lower_bound=0)
    flops = helped("flops", "compute of the larger run")
    flags.DEFINE_float("flops", 0.0, flops, flag_values=values, lower_bound=0.0)
    count = helped("count", "N counted so, or total")
    flags.DEFINE_string("count", "besides embeddings", count, flag_values=values)


def main(verb: str, path: str, values: flags.FlagValues, *, log: Log) -> int:
    """Runs a verb; returns the exit code.

    Raises:
      UserError: the verb is not known, a flag is not for it, or what it was asked for cannot be done.
    """
    verbs: dict[str, Callable[[Study, Path, flags.FlagValues, Log], int]] = {
        "plan": _plan,
        "run": _run,
        "fit": _fit,
        "predict": functools.partial(_predict, path),
        "judge": _judge,
        "report": _report,
    }
    if verb not in verbs:
        raise UserError(f"{verb!r} is nothing to do with a study; type one of {', '.join(verbs)}")
    if "://" in (values.dir or ""):
        raise UserError(
            f"--dir is {values.dir}, but a study keeps locks and results in files, which a bucket is not for; give a "
            "folder, as in --dir=/shared/NAME"
        )
    for name, its in OF_VERBS.items():
        if values[name].present and verb not in its:
            raise UserError(f"--{name} is for {' and '.join(its)}, and says nothing to {verb}; leave it out")
    study = load_study(path)
    folder = Path(values.dir or f"studies/{study.name}").expanduser().absolute()
    return verbs[verb](study, folder, values, log)


def _plan(study: Study, folder: Path, values: flags.FlagValues, log: Log) -> int:
    from maxlm.study.plan import machine_of, plan, seconds_in_all
    from maxlm.train.progress import format_duration, plain_console

    if values.topology:
        study = dataclasses.replace(study, machine=machine_of(values.topology, study))
    runs, machine = plan(study), study.machine
    table = Table("run", "N", "N, all", "tokens", "FLOPs", "steps", "batch", "rate", "time", box=None, pad_edge=False)
    rows: list[dict[str, Any]] = []
    for run in runs:
        config = run.config
        table.add_row(
            run.label,
            *(f"{count:,}" for count in (run.params_nonembedding, run.params_total, run.tokens)),
            f"{run.flops:.3g}",
            f"{config.train.steps:,}",
            f"{config.data.batch_size} x {config.data.sequence_length}",
            f"{config.optim.peak_lr:.3g}",
            format_duration(run.seconds),
        )
        names = ("label", "facts", "params_nonembedding", "params_total", "tokens", "flops", "seconds")
        rows.append({name: getattr(run, name) for name in names} | {"steps": config.train.steps})
    seconds = seconds_in_all(runs, machine)
    dollars = seconds / 3600 * machine.dollars_per_hour
    write_asked(
        values.json,
        json.dumps({"study": study.name, "seconds": seconds, "dollars": dollars, "runs": rows}, indent=1) + "\n",
    )
    console = plain_console()
    console.width = max(console.width, 130)  # a log has no width of its own
    console.print(table)
    money = f", {dollars:,.2f} dollars" if dollars else ""
    log(
        f"{len(runs)} runs, {sum(run.flops for run in runs):.3g} FLOPs; about {format_duration(seconds)} on "
        f"{machine.name}, {machine.jobs} at a time, at {machine.flops_per_second / 1e9:,.0f} GFLOP/s{money}. N counts "
        "parameters besides embeddings"
    )
    return 0


def _run(study: Study, folder: Path, values: flags.FlagValues, log: Log) -> int:
    from maxlm.study.identity import commit
    from maxlm.study.runner import run_study
    from maxlm.study.starting import through

    code = commit()
    launch = through(shlex.split(values.launcher), study.name, commit=code) if values.launcher else None
    return run_study(study, folder, jobs=values.jobs, launch=launch, code=code, log=log).code


def _fit(study: Study, folder: Path, values: flags.FlagValues, log: Log) -> int:
    from maxlm.study.fitting import as_json, describe, fit_study, write_fit

    fit = fit_study(folder, counted=values.count)
    for line in describe(fit):
        log(line)
    write_fit(folder, fit)
    write_asked(values.json, json.dumps(as_json(fit), indent=1) + "\n")
    return 0


def _predict(path: str, study: Study, folder: Path, values: flags.FlagValues, log: Log) -> int:
    from maxlm.study.predict import predict

    if not values.flops:
        raise UserError("--flops is missing; give the compute of the larger run, as in --flops=1e14")
    place = predict(study, folder, flops=values.flops, counted=values.count)
    said = json.loads((place / "prediction.json").read_text())
    low, high = said["interval"]
    log(
        f"predicted on {said['date']}: loss {said['loss']:.4f} [{low:.4f}, {high:.4f}] for "
        f"{said['params_nonembedding']:,} parameters besides embeddings and {said['tokens']:,} tokens ({said['how']})"
    )
    train = ["maxlm", "train", f"--config={place / 'config.py'}", f"--workdir={place / 'run'}"]
    log(f"now run it: {shlex.join(train)}")
    judge = ["maxlm", "study", "judge", path, *([f"--dir={folder}"] if values.dir else [])]
    log(f"and then: {shlex.join([*judge, f'--prediction={place.name}', train[-1]])}")
    return 0


def _judge(study: Study, folder: Path, values: flags.FlagValues, log: Log) -> int:
    from maxlm.study.predict import judge, predictions
    from maxlm.train.home import beside

    names: Sequence[str] = [item["name"] for item in predictions(folder)]
    if not values.prediction and len(names) != 1:
        raise UserError(f"--prediction is missing; there are {', '.join(names) or 'none: type maxlm study predict'}")
    place = folder / "predictions" / (values.prediction or names[0])
    with beside(values.workdir or place / "run", log=log) as home:
        log(judge(folder, place, home.folder, home=home.place))
    return 0


def _report(study: Study, folder: Path, values: flags.FlagValues, log: Log) -> int:
    from maxlm.study.fitting import fit_study
    from maxlm.study.report import coordinate_checks, write_report

    fit = fit_study(folder, counted=values.count)
    checks = coordinate_checks(study)
    for check in checks:
        log(check.sentence())
    log(f"report: {write_report(study, folder, fit, checks=checks)}")
    return 0
