"""The parametric law: the published fit on the published runs, and laws that are known."""

import math
from pathlib import Path

import numpy as np
import pytest

from maxlm.study.law import DELTA, Law, Points, TooFewPoints, _Problem, bootstrap, fit_law
from maxlm.study.published import LAWS, synthetic
from tools.study_coverage import COVERED, coverage

FIGURE_4 = Path(__file__).with_name("hoffmann_figure4.csv")


def published_runs() -> Points:
    """The runs that Besiroglu et al. 2024 fit: all but the five of highest loss."""
    params, flops, losses = np.loadtxt(FIGURE_4, delimiter=",", skiprows=3).T
    kept = losses < np.sort(losses)[-5]
    return Points(params[kept], (flops / 6 / params)[kept], losses[kept])


def test_the_published_fit_is_found_again():
    points = published_runs()
    assert len(points.losses) == 240
    fit = fit_law(points)
    # Their notebook's search over 4,500 starts ends at a sum of 0.0010182740; ours must not be higher (six digits of
    # the data are kept, which moves the sum in its sixth).
    assert fit.objective < 0.0010183
    found = Law(E=1.817235, A=477.84, B=2143.86, alpha=0.347313, beta=0.367183)  # as the notebook prints it
    np.testing.assert_allclose(fit.law, found, rtol=1e-3)
    # The table of the paper, from a likelihood of the same kind, is within a twentieth of its standard errors.
    assert fit.law.alpha == pytest.approx(LAWS["besiroglu_2024"].law.alpha, abs=0.0154 / 20)
    assert fit.law.exponent == pytest.approx(0.5126, abs=0.002)


def test_intervals_on_the_published_runs_are_as_wide_as_published():
    points = published_runs()
    interval = bootstrap(points, fit_law(points)).interval(lambda law: law.alpha)
    # Standard error 0.0154 by their bootstrap, 90% of a normal one is 3.29 of them.
    assert 0.7 < (interval.high - interval.low) / (3.29 * 0.0154) < 1.4


@pytest.mark.parametrize("name", sorted(LAWS))
def test_a_law_without_noise_comes_back(name):
    law = LAWS[name].law
    fit = fit_law(synthetic(law, seed=0, noise=0.0))
    np.testing.assert_allclose(fit.law, law, rtol=1e-3)
    assert fit.spread < 1e-5


def test_thirty_noisy_trials():
    """Coverage and the exponent; 200 trials of every published law are in tools/full_check.py."""
    found = coverage("hoffmann_2022", trials=30, replicates=120)
    # Of 30 trials at a true coverage of 0.9, 22 or fewer come with a probability of 0.8%.
    assert {name for name in COVERED if found.covered[name] < 23} == set()
    assert np.mean(found.errors < 0.02) >= 0.9
    assert found.errors.max() < 0.05


def test_a_prediction_interval_holds_a_single_new_run():
    law, params, tokens, noise = LAWS["hoffmann_2022"].law, 1e10, 5e11, 0.01
    held = {"prediction": 0, "mean": 0}
    for seed in range(30):
        points = synthetic(law, seed=seed, noise=noise, sizes=8, lengths=7)
        drawn = bootstrap(points, fit_law(points), seed=seed, replicates=60)
        run = float(law.loss(params, tokens)) * math.exp(np.random.default_rng([seed, 1]).normal(0, noise))
        held["prediction"] += run in drawn.prediction(params, tokens, seed=seed)
        held["mean"] += run in drawn.interval(lambda law: float(law.loss(params, tokens)))
    # Of 30 at a true coverage of 0.9, 22 or fewer come with a probability of 0.8%.
    assert held["prediction"] >= 23
    assert held["mean"] < 23  # the interval of the law is no interval of a run


def test_every_start_matters_little_and_the_gradient_is_right():
    points = published_runs()
    problem = _Problem(points)
    theta = problem.theta(LAWS["hoffmann_2022"].law)
    value, gradient = problem.value_and_gradient(theta)
    step = 1e-7
    numeric = [
        (problem.value_and_gradient(theta + step * unit)[0] - problem.value_and_gradient(theta - step * unit)[0])
        / (2 * step)
        for unit in np.eye(5)
    ]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4)
    residual = np.abs(LAWS["hoffmann_2022"].law.loss(points.params, points.tokens) / points.losses)
    residual = np.abs(np.log(residual))
    huber = np.where(residual <= DELTA, residual**2 / 2, DELTA * (residual - DELTA / 2)).sum()
    assert value * DELTA**2 == pytest.approx(huber)
    agreed, tried = fit_law(points).agreed
    assert tried >= 12 and agreed / tried > 0.8


def test_outliers_do_not_move_the_fit():
    law = LAWS["hoffmann_2022"].law
    points = synthetic(law, seed=3)
    losses = points.losses.copy()
    losses[::20] *= 1.3  # one run in twenty failed
    clean, dirty = fit_law(points).law, fit_law(points._replace(losses=losses)).law
    assert abs(dirty.exponent - clean.exponent) < 0.01


def test_the_optimum_is_the_minimum():
    law, flops = LAWS["besiroglu_2024"].law, 1e22
    best = law.optimum(flops)
    assert 6 * best.params * best.tokens == pytest.approx(flops)
    for factor in (0.9, 1.1):
        assert law.loss(best.params * factor, best.tokens / factor) > best.loss
    larger = law.optimum(100 * flops)
    assert math.log(larger.params / best.params) / math.log(100) == pytest.approx(law.exponent)


def test_few_points_are_refused_in_words():
    points = synthetic(LAWS["hoffmann_2022"].law, seed=0)
    with pytest.raises(TooFewPoints, match="20 runs with .* are too few to fit E"):
        fit_law(points.take(np.arange(20)))
    with pytest.raises(TooFewPoints, match="3 sizes|3 distinct"):
        fit_law(points.take(np.isin(points.params, np.unique(points.params)[:3])))


def test_runs_that_cannot_tell_the_coefficients_apart_are_refused():
    law = LAWS["hoffmann_2022"].law

    def refused(params, tokens, words):
        with pytest.raises(TooFewPoints, match=words):
            fit_law(Points(params, tokens, law.loss(params, tokens)))

    params = np.geomspace(1e7, 1e10, 40)
    refused(params, 20 * params, r"go together .*\+1.000")  # a ladder: tokens for each parameter
    refused(params, 1e20 / params, r"go together .*-1.000")  # a single budget
    refused(np.geomspace(1e7, 1.9e7, 40), params[::-1], r"the sizes span a factor of 1.90")
    refused(params, np.geomspace(1e9, 1.5e9, 40)[::-1], r"the token counts span a factor of 1.50")
