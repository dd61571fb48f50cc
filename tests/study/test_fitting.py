"""Which runs are fitted by what: sweeps by curves over rate and batch and a table, other designs by laws."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from maxlm.study.fitting import as_json, describe, fit_study, foretell
from maxlm.study.isoflop import TooFewRuns
from maxlm.study.ladder import Shape
from maxlm.study.plan import plan
from maxlm.study.plots import draw_compute, draw_swept
from maxlm.study.predict import predict
from maxlm.study.published import LAWS
from maxlm.study.report import write_report
from maxlm.study.results import PLAN, Planned, Result, read_plan, read_result, write_result
from maxlm.study.spec import Sweep
from maxlm.study.sweep import Try, near_best
from tests.study.fake import isoflop_study

RATES = tuple(2.0**-n for n in range(9, 4, -1))
BEST = {(2, 0.1): 2.0**-8, (2, 0.01): 2.0**-6, (4, 0.01): 2.0**-7}  # by layers and weight decay
SPREAD = 0.003


def write_study(folder, runs, *, design=None):
    """The plan and results of runs, each (facts, N, D, loss); without a design, the plan of an older version."""
    planned = []
    for facts, params, tokens, loss in runs:
        name = f"run{len(planned)}"
        planned.append(Planned(name, name, facts, 2 * params, params, tokens, 6.0 * params * tokens, 1.0, "", True))
        (folder / "runs" / name).mkdir(parents=True)
        result = Result(name, "finished", loss, 1.0, loss, tokens, 10, 1.0, "f", "c", "now")
        write_result(folder / "runs" / name, result)
    content = {"study": "made", "fingerprint": "f", "runs": [dataclasses.asdict(run) for run in planned]}
    (folder / PLAN).write_text(json.dumps(content | ({"design": design} if design else {})))


def write_sweep(folder, *, rates=RATES, widths=(32, 64), best=BEST, seeds=(0, 1)):
    """A sweep whose best rate hangs on the depth and the weight decay, as many runs at each rate."""
    runs = []
    for (layers, decay), width, rate, seed in itertools.product(best, widths, rates, seeds):
        facts = {"rule": "transfer", "width": width, "layers": layers, "optim.weight_decay": decay}
        loss = 2 + 0.1 * layers + decay + 0.05 * math.log(rate / best[layers, decay]) ** 2
        loss += SPREAD * (seed - 0.5) * math.sqrt(2)  # two seeds this far apart have a standard deviation of SPREAD
        runs.append((facts | {"optim.peak_lr": rate, "seed": seed}, 900, 100, loss))
    write_study(folder, runs)


def test_runs_that_differ_in_more_than_their_seed_are_never_averaged(tmp_path):
    write_sweep(tmp_path)
    fit = fit_study(tmp_path)
    (found,) = fit.swept
    names = {key: f"transfer, layers {key[0]}, optim.weight_decay {key[1]}" for key in BEST}
    assert set(found.bests) == set(names.values()) == set(found.shifts)
    for key, rate in BEST.items():
        for width, best in found.bests[names[key]].items():
            assert width in (32, 64)
            assert best.value == pytest.approx(rate, rel=1e-6)
            # Other depths and decays lie a hundred spreads away: with them in it the interval would hold every rate.
            assert best.interval.high / best.interval.low < 1.1
    words = "\n".join(describe(fit))
    assert "transfer, layers 4, optim.weight_decay 0.01, width 64: best rate 0.00781" in words
    assert set(as_json(fit)["swept"]["rate"]["best"]) == set(names.values())


def test_widths_are_uncertain_each_by_itself(tmp_path):
    write_sweep(tmp_path, widths=(32, 64, 128), best={(2, 0.1): 2.0**-7})
    (found,) = fit_study(tmp_path).swept
    trend, shift = found.trends["transfer"], found.shifts["transfer"]
    # Of one noise for all widths the exponent would be 0 in every draw, and the factor 1.
    assert trend.interval.low < -0.01 and trend.interval.high > 0.01
    assert shift.interval.high > 1.01
    one = next(iter(found.bests["transfer"].values())).interval
    error = math.log(one.high / one.low) / 2
    # Least squares through three widths a factor of two apart: sqrt(2) log 2 of them.
    assert (trend.interval.high - trend.interval.low) / 2 == pytest.approx(error / math.sqrt(2) / math.log(2), rel=0.1)


def test_unstable_runs_far_from_the_best_leave_the_intervals_as_they_are(tmp_path):
    rates = tuple(2.0**-n for n in range(10, 3, -1))
    write_sweep(tmp_path / "calm", rates=rates, best={(2, 0.1): 2.0**-8})
    write_sweep(tmp_path / "wild", rates=rates, best={(2, 0.1): 2.0**-8})
    plan_of = read_plan(tmp_path / "wild")
    for run in plan_of.runs:  # one pair, at the highest rate of one width
        if run.facts["width"] == 64 and run.facts["optim.peak_lr"] == rates[-1]:
            result = read_result(tmp_path / "wild" / "runs" / run.name)
            write_result(
                tmp_path / "wild" / "runs" / run.name, dataclasses.replace(result, loss=3.0 + run.facts["seed"])
            )
    calm, wild = (fit_study(tmp_path / name).swept[0] for name in ("calm", "wild"))
    assert wild.shifts == calm.shifts
    for width in (32, 64):
        one, other = calm.bests["transfer"][width], wild.bests["transfer"][width]
        assert one.interval == other.interval and one.value == other.value


def test_what_the_spread_is_of_are_the_runs_that_the_parabola_goes_through():
    tries = [Try(float(value), loss) for value, loss in zip((1, 2, 4, 8, 16, 32), (4, 3, 1, 2, 5, 9), strict=True)]
    assert near_best(tries) == [[4], [3], [1], [2], [5]]
    assert near_best(tries[:3]) == [[4], [3], [1]]


def test_settings_that_all_runs_share_are_not_repeated_and_few_rates_are_named(tmp_path):
    write_sweep(tmp_path / "one", widths=(32,), best={(2, 0.1): 2.0**-8})
    assert set(fit_study(tmp_path / "one").swept[0].bests) == {"transfer"}
    write_sweep(tmp_path / "few", rates=RATES[:2], widths=(32,), best={(2, 0.1): 2.0**-8})
    fit = fit_study(tmp_path / "few")
    assert fit.swept[0].bests == {} and fit.swept[0].shifts == {}
    assert "transfer, width 32: 2 rates have no best; three at least do" in fit.notes


def test_one_seed_gives_no_interval_and_a_best_at_the_end_moves_by_that_much_at_least(tmp_path):
    write_sweep(tmp_path, best={(2, 0.1): 2.0**-8}, seeds=(0,))
    fit = fit_study(tmp_path)
    words = "\n".join(describe(fit))
    assert "width 32: best rate 0.00391 (one seed: no interval)" in words
    assert "the best rate moves by a factor of 1.00 (one seed: no interval)" in words
    assert any(note.startswith("one seed: no interval of the best rate") for note in fit.notes)
    assert draw_swept(fit.swept[0])[:4] == b"\x89PNG"
    write_sweep(tmp_path / "end", best={(2, 0.1): 2.0**-4})
    words = "\n".join(describe(fit_study(tmp_path / "end")))
    assert "the best rate moves by a factor of at least 1.00" in words and "no interval" not in words


def test_an_exponent_by_width_is_told_with_the_widths_that_it_is_of(tmp_path):
    runs = []
    for width, rate, seed in itertools.product((32, 64, 128, 256), RATES, (0, 1)):
        best = 2.0**-6 * 32 / width if width < 256 else 2.0**-10  # the lowest rate is 2^-9
        loss = 2 + 0.05 * math.log(rate / best) ** 2 + SPREAD * (seed - 0.5) * math.sqrt(2)
        runs.append(
            ({"rule": "standard", "width": width, "layers": 2, "optim.peak_lr": rate, "seed": seed}, 9, 9, loss)
        )
    write_study(tmp_path / "most", runs)
    fit = fit_study(tmp_path / "most")
    words = "\n".join(describe(fit))
    assert (
        "(an exponent of 0: it stays), from 3 of 4 widths (32, 64, 128); that of 256 is at an end of the rates or "
        "beyond: over all widths the exponent is -1.00 [" in words
    )
    assert "] or less" in words
    content = as_json(fit)["swept"]["rate"]["exponents"]["standard"]
    assert content["widths"] == (32, 64, 128) and content["widths_at_an_end"] == (256,)
    assert content["over_all_widths"]["side"] == "or less"
    write_study(tmp_path / "one", [run for run in runs if run[0]["width"] in (64, 256)])
    fit = fit_study(tmp_path / "one")
    assert fit.swept[0].trends == {}
    assert "standard: 1 of 2 widths have their best rate between others: no exponent" in fit.notes


def test_a_value_that_lost_a_seed_is_on_no_curve_and_never_best(tmp_path):
    write_sweep(tmp_path, widths=(32, 64), best={(2, 0.1): 2.0**-7})
    edge = RATES[-2]  # the seed that survives is lucky there, and would move the best of width 64 from 2^-7
    for run in read_plan(tmp_path).runs:
        result = read_result(tmp_path / "runs" / run.name)
        if run.facts["width"] == 64 and run.facts["optim.peak_lr"] == edge:
            lost = dataclasses.replace(result, status="diverged", loss=None, why="the guard refused")
            made = lost if run.facts["seed"] else dataclasses.replace(result, loss=2.0)
            write_result(tmp_path / "runs" / run.name, made)
    fit = fit_study(tmp_path)
    bests = fit.swept[0].bests["transfer"]
    assert [list(bests[width].tried[0]) for width in (32, 64)] == [list(RATES), [r for r in RATES if r != edge]]
    assert bests[64].value == pytest.approx(2.0**-7, rel=1e-6)
    words = "\n".join(describe(fit))
    assert "note: transfer, width 64: a seed diverged at rate 0.0156, which is left out of the curve" in words
    assert "width 32: a seed diverged" not in words
    assert "best setting of transfer, 2 layers of width 64: optim.peak_lr 0.0078125, loss" in words
    last = fit.settings[-1]
    assert (last.loss, last.facts["optim.peak_lr"], last.runs, last.diverged) == (2.0, edge, 1, 1)
    assert [setting.diverged for setting in fit.settings[:-1]] == [0] * (len(fit.settings) - 1)
    study = isoflop_study(tmp_path / "base")
    assert "<th>diverged</th>" in write_report(study, tmp_path, fit).read_text()


def test_a_mixture_of_which_a_seed_diverged_says_so(tmp_path):
    facts = {"rule": "standard", "width": 32, "layers": 2}
    runs = [(facts | {"optim.weight_decay": d, "seed": s}, 9, 9, 2 + d + s) for d in (0.0, 0.1) for s in (0, 1)]
    write_study(tmp_path, runs)
    place = tmp_path / "runs" / "run1"
    write_result(place, dataclasses.replace(read_result(place), status="diverged"))
    lines = describe(fit_study(tmp_path))
    told = "standard, 2 layers of width 32: optim.weight_decay"
    assert f"best setting of {told} 0.1, loss 2.6000, spread 0.7071 over 2 seeds" in lines
    assert f"then, of {told} 0.0, loss 2.0000, one seed, 1 diverged" in lines


def write_batches(folder, *, batches=(4, 8, 16, 32, 64)):
    """A sweep over batch and decay at one rate: the best batch is half the width, the lower decay the better."""
    runs = []
    for (width, decay), batch, seed in itertools.product(((32, 0.1), (32, 0.0), (64, 0.1), (64, 0.0)), batches, (0, 1)):
        facts = {"rule": "standard", "width": width, "layers": 2, "optim.peak_lr": 0.01, "optim.weight_decay": decay}
        loss = 2 + decay + 0.05 * math.log(batch / (width / 2)) ** 2 + SPREAD * (seed - 0.5) * math.sqrt(2)
        runs.append((facts | {"data.batch_size": batch, "seed": seed}, 100 * width + batch, 10**4 * batch, loss))
    write_study(folder, runs, design="sweep")


def test_a_sweep_without_rates_is_no_law_but_says_which_batch_and_setting_are_best(tmp_path):
    write_batches(tmp_path)
    fit = fit_study(tmp_path)
    assert len(fit.gathered.rows) == 40 and fit.law is None and fit.isoflops is None and fit.held_back is None
    (found,) = fit.swept
    assert found.dial.word == "batch"
    series = "standard, optim.weight_decay 0.1"
    assert [found.bests[series][width].value for width in (32, 64)] == pytest.approx([16, 32])
    assert found.trends[series].law.exponent == pytest.approx(1) and 1 in found.trends[series].interval
    words = "\n".join(describe(fit))
    assert f"{series}, width 64: best batch 32" in words
    best = (
        "best setting of standard, 2 layers of width 64: optim.weight_decay 0.0, data.batch_size 32, loss 2.0000, "
        "spread 0.0030 over 2 seeds"
    )
    assert best in words
    with pytest.raises(TooFewRuns, match="a sweep says nothing of larger runs"):
        foretell(fit, params=1e6, tokens=1e8, flops=6e14)
    with pytest.raises(TooFewRuns, match="no forecast can be made: a sweep says nothing of larger runs"):
        predict(isoflop_study(tmp_path / "base"), tmp_path, flops=1e20)
    content = as_json(fit)
    assert content["swept"]["batch"]["best"][series]["32"]["value"] == pytest.approx(16)
    assert content["settings"][0]["loss"] == pytest.approx(2.0) and len(content["settings"]) == 20
    page = write_report(isoflop_study(tmp_path / "base"), tmp_path, fit).read_text()
    assert "<h2>Settings</h2>" in page and 'src="batches.png"' in page


def test_settings_without_a_curve_are_all_told(tmp_path):
    mixtures = ([["web", 1.0], ["code", 1.0]], [["web", 3.0], ["code", 1.0]])
    facts = {"rule": "standard", "width": 32, "layers": 2}
    runs = [
        (facts | {"data.mixture": mixture, "seed": seed}, 900, 100, 2 - 0.1 * n + 0.01 * seed)
        for n, mixture in enumerate(mixtures)
        for seed in (0, 1)
    ]
    write_study(tmp_path, runs)
    lines = describe(fit_study(tmp_path))
    told = "standard, 2 layers of width 32: data.mixture"
    assert f"best setting of {told} {mixtures[1]}, loss 1.9050, spread 0.0071 over 2 seeds" in lines
    assert f"then, of {told} {mixtures[0]}, loss 2.0050, spread 0.0071 over 2 seeds" in lines


def write_trunks(folder, *, sizes, lengths):
    law, runs, rng = LAWS["besiroglu_2024"].law, [], np.random.default_rng(0)
    for params, tokens in itertools.product(np.geomspace(2e7, 2e9, sizes), np.geomspace(1e9, 1e11, lengths)):
        loss = float(law.loss(params, tokens) * np.exp(rng.normal(0, 0.003)))
        runs.append(({"rule": "standard", "role": "branch"}, round(params), round(tokens), loss))
    write_study(folder, runs, design="trunks")


def test_trunks_are_foretold_by_the_law_that_predicts(tmp_path):
    write_trunks(tmp_path, sizes=6, lengths=6)
    fit = fit_study(tmp_path)
    assert fit.law is not None and fit.held_back is not None
    largest = max(fit.gathered.rows, key=lambda row: row.planned.flops)
    assert fit.held_back.found == largest.loss and fit.held_back.flops == largest.planned.flops
    assert fit.held_back.how == "parametric law of 35 runs"
    assert abs(fit.held_back.miss) < 0.02 and fit.held_back.found in fit.held_back.interval
    assert "the prediction held (bounds: 2% and 3%; parametric law of 35 runs)" in "\n".join(describe(fit))


def test_trunks_with_few_runs_are_not_told_of_slices_that_they_cannot_have(tmp_path):
    write_trunks(tmp_path / "few", sizes=4, lengths=4)
    fit = fit_study(tmp_path / "few")
    assert fit.law is None and fit.held_back is None
    assert any("16 runs" in note and "reported without a fit" in note for note in fit.notes)
    words = "\n".join(describe(fit))
    assert "isoflop" not in words and words.count(", loss ") == 16
    assert draw_compute(fit)[:4] == b"\x89PNG"
    write_trunks(tmp_path / "just", sizes=5, lengths=6)  # 30: without the largest the law is not to be had
    fit = fit_study(tmp_path / "just")
    assert fit.law is not None and fit.held_back is None
    assert any("not foretold from the others: without it, 29 runs" in note for note in fit.notes)


def test_what_the_largest_budget_is_foretold_by_is_said_where_predict_goes_by_something_else(tmp_path):
    law, runs, rng = LAWS["besiroglu_2024"].law, [], np.random.default_rng(0)
    for budget in np.geomspace(1e18, 1e19, 4):
        for multiple in np.geomspace(0.25, 4, 8):
            params = law.optimum(budget).params * multiple
            loss = float(law.loss(params, budget / 6 / params) * np.exp(rng.normal(0, 0.002)))
            runs.append(({"budget": budget}, round(params), round(budget / 6 / params), loss))
    write_study(tmp_path, runs, design="isoflops")
    fit = fit_study(tmp_path)
    assert fit.way == "law" and fit.held_back.by == "isoflops"  # 32 runs; 24 without the largest budget
    words = "\n".join(describe(fit))
    assert "`predict` goes by the parametric law, for which the others are too few: untested" in words
    outside = fit.held_back._replace(found=fit.held_back.interval.high + 0.001)
    assert abs(outside.miss) < 0.02 and not outside.inside and as_json(fit)["held_back"]["inside"] is True
    words = "\n".join(describe(fit._replace(held_back=outside)))
    assert "found outside the interval: the prediction held (bounds: 2% and 3%" in words


def test_a_study_is_of_its_design_whether_its_plan_says_so_or_is_older(tmp_path):
    write_batches(tmp_path / "new")
    assert read_plan(tmp_path / "new").design == "sweep"
    for facts, design in (
        ({"rule": "standard", "budget": 1e12}, "isoflops"),
        ({"rule": "standard", "role": "branch"}, "trunks"),
        ({"rule": "standard", "params": 1e6}, "rungs"),
        ({"rule": "standard", "width": 32, "layers": 2}, "sweep"),
    ):
        write_study(tmp_path / design, [(facts, 900, 100, 2.0)])
        assert read_plan(tmp_path / design).design == design


def test_a_planned_sweep_says_its_runs_depths(tmp_path):
    design = Sweep(shapes=(Shape(2, 64), Shape(4, 64)), tokens=1e5, settings={"seed": (3,)})
    study = isoflop_study(tmp_path, design=design)
    for rules, rule in (((), study.rules.rule), (("standard",), "standard")):
        runs = plan(dataclasses.replace(study, design=dataclasses.replace(design, rules=rules)))
        assert [run.facts for run in runs] == [
            {"rule": rule, "width": 64, "layers": layers, "seed": 3} for layers in (2, 4)
        ]
        assert all((run.config.model.head_init < 1) == (rule == "transfer") for run in runs)
    assert study.rules.rule == "transfer"
