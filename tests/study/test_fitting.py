"""Which runs of a sweep make one curve of the loss over the learning rate, and which never do."""

import dataclasses
import itertools
import json
import math

import pytest

from maxlm.study.fitting import as_json, describe, fit_study
from maxlm.study.ladder import Shape
from maxlm.study.plan import plan
from maxlm.study.results import PLAN, Planned, Result, write_result
from maxlm.study.spec import Sweep
from tests.study.fake import isoflop_study

RATES = tuple(2.0**-n for n in range(9, 4, -1))
BEST = {(2, 0.1): 2.0**-8, (2, 0.01): 2.0**-6, (4, 0.01): 2.0**-7}  # by layers and weight decay
SPREAD = 0.003


def write_sweep(folder, *, rates=RATES, widths=(32, 64), best=BEST):
    """The plan and results of a sweep whose best rate hangs on the depth and the weight decay, as many at each rate."""
    runs = []
    for (layers, decay), width, rate, seed in itertools.product(best, widths, rates, (0, 1)):
        facts = {"rule": "transfer", "width": width, "layers": layers, "optim.weight_decay": decay}
        facts |= {"optim.peak_lr": rate, "seed": seed}
        name = f"run{len(runs)}"
        runs.append(Planned(name, name, facts, 1000, 900, 100, 1e6, 1.0, "", True))
        loss = 2 + 0.1 * layers + decay + 0.05 * math.log(rate / best[layers, decay]) ** 2
        loss += SPREAD * (seed - 0.5) * math.sqrt(2)  # two seeds this far apart have a standard deviation of SPREAD
        (folder / "runs" / name).mkdir(parents=True)
        write_result(folder / "runs" / name, Result(name, "finished", loss, 1.0, loss, 100, 10, 1.0, "f", "c", "now"))
    content = {"study": "made", "fingerprint": "f", "runs": [dataclasses.asdict(run) for run in runs]}
    (folder / PLAN).write_text(json.dumps(content))


def test_runs_that_differ_in_more_than_their_seed_are_never_averaged(tmp_path):
    write_sweep(tmp_path)
    fit = fit_study(tmp_path)
    names = {key: f"transfer, layers {key[0]}, optim.weight_decay {key[1]}" for key in BEST}
    assert set(fit.bests) == set(names.values()) == set(fit.shifts)
    for key, rate in BEST.items():
        for width, best in fit.bests[names[key]].items():
            assert width in (32, 64)
            assert best.rate == pytest.approx(rate, rel=1e-6)
            # Other depths and decays lie a hundred spreads away: with them in it the interval would hold every rate.
            assert best.interval.high / best.interval.low < 1.1
    words = "\n".join(describe(fit))
    assert "transfer, layers 4, optim.weight_decay 0.01, width 64: best rate 0.00781" in words
    assert set(as_json(fit)["best_rates"]) == set(names.values())


def test_settings_that_all_runs_share_are_not_repeated_and_few_rates_are_named(tmp_path):
    write_sweep(tmp_path / "one", widths=(32,), best={(2, 0.1): 2.0**-8})
    assert set(fit_study(tmp_path / "one").bests) == {"transfer"}
    write_sweep(tmp_path / "few", rates=RATES[:2], widths=(32,), best={(2, 0.1): 2.0**-8})
    fit = fit_study(tmp_path / "few")
    assert fit.bests == {} and fit.shifts == {}
    assert "transfer, width 32: 2 rates have no best; three at least do" in fit.notes


def test_a_planned_sweep_says_its_runs_depths(tmp_path):
    design = Sweep(shapes=(Shape(2, 32), Shape(4, 32)), tokens=1e5, settings={"seed": (3,)})
    runs = plan(isoflop_study(tmp_path, design=design))
    assert [run.facts for run in runs] == [
        {"rule": "standard", "width": 32, "layers": layers, "seed": 3} for layers in (2, 4)
    ]
