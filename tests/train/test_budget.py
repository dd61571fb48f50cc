"""A time budget becomes a number of steps once, and stays that number when the run is started again."""

import dataclasses
import json

import numpy as np

from maxlm.train.budget import with_steps
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train
from tests.tiny import tiny_config, write_corpus


def test_the_number_of_steps_is_measured_once_and_recorded(tmp_path):
    corpus, lines = write_corpus(tmp_path / "corpus"), []
    config = tiny_config(corpus, parallel__data=8, train__steps=9, train__budget_seconds=1e-6, optim__schedule="linear")
    assert train(config, tmp_path / "short", log=lines.append) == 0
    told = [line for line in lines if "steps fit into" in line]
    assert len(told) == 1 and " 3 steps fit" in told[0]  # never fewer than the warm-up and one
    recorded = json.loads((tmp_path / "short" / "config.json").read_text())["train"]
    assert (recorded["steps"], recorded["budget_seconds"]) == (3, 0.0)
    rates = [record["lr"] for record in read_metrics(tmp_path / "short", "step")]
    assert rates[-1] == np.float32(config.optim.peak_lr * config.optim.final_lr_ratio)  # the end is that of 3 steps

    late = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=90, profile=(50, 2)),
        checkpoint=dataclasses.replace(config.checkpoint, keep_best=1, every_steps=40),
        eval=dataclasses.replace(config.eval, every_steps=40),
    )
    fixed = with_steps(late, 3)  # nothing of it begins in 3 steps, which nobody typed
    assert (fixed.train.profile, fixed.checkpoint.keep_best) == ((), 0)
    fixed = with_steps(late, 80)
    assert (fixed.train.profile, fixed.checkpoint.keep_best) == ((50, 2), 1)

    lines.clear()
    assert train(config, tmp_path / "short", log=lines.append) == 0
    assert not [line for line in lines if "fit into" in line or line.startswith("config:")]
    assert any(line.startswith("train.steps is 3, as this run was given at its first start;") for line in lines)
