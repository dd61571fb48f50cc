"""A study of made-up runs: their losses come from a known law, and each takes no time."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
from absl import flags

from maxlm.config import MlpConfig, ModelConfig
from maxlm.data.prepare import prepare_data
from maxlm.resolve import as_config_dict
from maxlm.study import commands
from maxlm.study.ladder import Rules
from maxlm.study.law import Law
from maxlm.study.results import read_plan
from maxlm.study.runner import run_study
from maxlm.study.spec import Isoflops, Machine, Study
from tests.tiny import tiny_config, write_corpus

LAW = Law(E=1.2, A=30.0, B=60.0, alpha=0.33, beta=0.31)
RULES = Rules(rule="transfer", aspect=128, head_dim=16, base_head_dim=16, base_width=32, base_rate=4e-3)


def base_config(corpus: Path):
    """The tiny run, with a model that a ladder can shape."""
    config = tiny_config(corpus)
    return dataclasses.replace(config, model=ModelConfig(vocab_size=264, mlp=MlpConfig(kind="relu2")))


def isoflop_study(folder: Path, *, budgets=tuple(1e13 * 8 ** (n / 4) for n in range(5)), **changes) -> Study:
    """Five budgets over a factor of 8, five sizes each."""
    study = Study(
        name="made_up",
        base=base_config(write_corpus(folder / "corpus", documents=30)),
        rules=RULES,
        design=Isoflops(budgets=budgets, sizes=(0.3, 0.55, 1.0, 1.8, 3.3)),
        machine=Machine(jobs=2),
    )
    return dataclasses.replace(study, **changes)


class Fake:
    """Starts runs that end at once: `fails` with exit code 1, `diverges` after the guard's refusals, others well."""

    def __init__(self, *, noise: float = 0.0, bearing: float = 1.0, fails=(), diverges=(), hangs=()):
        self.noise, self.bearing = noise, bearing  # the part of the positions that bear a loss
        self.fails, self.diverges, self.hangs = fails, diverges, hangs
        self.started: list[str] = []
        self.cores: list[list[int]] = []

    def __call__(self, run, workdir, cores, lock):
        self.started.append(run.label)
        self.cores.append(list(cores))
        (workdir / "config.json").write_text(json.dumps(as_config_dict(run.config).to_dict()))
        prepare_data(run.config, workdir)  # as `maxlm train` does, which lists its sources anew
        if run.label in self.fails:
            (workdir / "log.txt").write_text("a line\nthe disk is full\n")
            return Ended(1)
        if run.label in self.hangs:
            os.kill(os.getpid(), signal.SIGTERM)
            return Ended(None)
        rng = np.random.default_rng([run.params_nonembedding, run.tokens])  # not the name: settings to come change it
        tokens = self.bearing * run.tokens
        loss = float(LAW.loss(run.params_nonembedding, tokens) * np.exp(rng.normal(0, self.noise)))
        refused = run.config.optim.guard.max_rejections if run.label in self.diverges else 0
        steps = [
            {"kind": "step", "step": n + 1, "loss": loss, "tokens": tokens / 10, "seconds": 0.1,
             "accepted": not refused, "rejections_in_row": refused}
            for n in range(10)
        ]  # fmt: skip
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
        if refused:
            return Ended(1)
        heldout = {"tiny": {"nats_per_token": loss, "tokens": 100}}
        report = {
            "heldout": heldout,
            "heldout_bits_per_byte": loss * 1.4,
            "tokens": round(tokens),
            "model": {"parameters besides embeddings": run.params_nonembedding},
        }
        (workdir / "report.json").write_text(json.dumps(report))
        return Ended(0)


class Ended:
    """A process that has ended with a code, or (None) runs until it is asked to leave."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    def terminate(self):
        self.code = 75


def run(study, folder, fake, **kwargs):
    said = []
    outcome = run_study(study, folder, launch=fake, log=said.append, poll=0.0, **kwargs)
    return outcome, "\n".join(said)


def workdir_of(folder, label):
    return folder / "runs" / next(r.name for r in read_plan(folder).runs if r.label == label)


def verb(name, study, folder, monkeypatch, **given):
    """`maxlm study NAME` for a study that is in no file; returns what was logged, and the exit code."""
    values = flags.FlagValues()
    commands.define_flags(values)
    values(["maxlm", f"--dir={folder}", *(f"--{flag}={value}" for flag, value in given.items())])
    monkeypatch.setattr(commands, "load_study", lambda path: study)
    said = []
    code = commands.main(name, "study.py", values, log=said.append)
    return "\n".join(said), code
