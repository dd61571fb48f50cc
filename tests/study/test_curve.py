"""The curve through rungs: what it says of a larger one, and whether its intervals hold that."""

import numpy as np
import pytest

from maxlm.study.curve import MIN_RUNGS, TooFewRuns, fit_curve

BUDGETS = np.geomspace(1e18, 64e18, 8)
LARGER = 4 * BUDGETS[-1]


def loss(flops):
    return 1.7 + 2.0 * (flops / 1e18) ** -0.12


def test_without_noise_the_curve_goes_on_as_it_was():
    curve = fit_curve(BUDGETS[::-1], loss(BUDGETS)[::-1])  # in any order
    beyond = curve.best(LARGER)
    assert beyond.floored == pytest.approx(loss(LARGER), rel=1e-3)
    assert beyond.power < beyond.loss < beyond.floored  # a power law knows no floor
    assert curve.spread < 1e-3 and curve.best(BUDGETS[3]).loss == pytest.approx(loss(BUDGETS[3]), rel=0.01)


@pytest.mark.slow
def test_the_intervals_hold_the_larger_rung():
    best = run = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        curve = fit_curve(BUDGETS, loss(BUDGETS) + rng.normal(0, 0.005, len(BUDGETS)), seed=seed, replicates=100)
        found = loss(LARGER)
        best += found in curve.best(LARGER).interval
        run += found + rng.normal(0, 0.005) in curve.run(LARGER).interval
        assert abs(curve.best(LARGER).loss / found - 1) < 0.02
    # 46 of 60 or fewer come with a probability of 0.2% at a true coverage of 0.9; both forms together hold more.
    assert best > 46 and run > 46


def test_the_interval_of_a_run_is_wider_and_grows_with_the_noise():
    rng, ends = np.random.default_rng(1), []
    noise = rng.normal(size=len(BUDGETS))
    for scale in (0.001, 0.02):
        curve = fit_curve(BUDGETS, loss(BUDGETS) + scale * noise)
        best, run = curve.best(LARGER).interval, curve.run(LARGER).interval
        assert run.low < best.low and best.high < run.high
        ends.append(run.high - run.low)
    assert ends[1] > 1.5 * ends[0]


def test_few_rungs_have_no_curve():
    with pytest.raises(TooFewRuns, match=f"4 rungs, but a curve through them and its interval take {MIN_RUNGS}"):
        fit_curve(BUDGETS[:4], loss(BUDGETS[:4]))
