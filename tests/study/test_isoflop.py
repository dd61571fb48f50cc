"""Slices of equal compute, forecasts from them, and where the best learning rate is."""

import numpy as np
import pytest
from scipy import stats

from maxlm.study.isoflop import PowerLaw, Slice, TooFewRuns, fit_isoflops, fit_power, forecast
from maxlm.study.law import Points
from maxlm.study.published import LAWS
from maxlm.study.sweep import Try, best_of, near_best, shift, spread_between, trend

LAW = LAWS["besiroglu_2024"].law


def slices(budgets, *, noise=0.0, seed=0, sizes=5, centre=1.0):
    rng, found = np.random.default_rng(seed), []
    for budget in budgets:
        params = LAW.optimum(budget).params * centre * np.geomspace(1 / 3, 3, sizes)
        tokens = budget / 6 / params
        losses = LAW.loss(params, tokens) * np.exp(rng.normal(0, noise, sizes))
        found.append(Slice(budget, Points(params, tokens, losses)))
    return found


BUDGETS = tuple(1e18 * 8 ** (n / 4) for n in range(5))


def test_the_exponents_of_the_law_come_back():
    fit = fit_isoflops(slices(BUDGETS))
    assert fit.params.exponent == pytest.approx(LAW.exponent, abs=0.005)
    assert fit.tokens.exponent == pytest.approx(1 - LAW.exponent, abs=0.005)
    for parabola in fit.used:
        assert parabola.params == pytest.approx(LAW.optimum(parabola.flops).params, rel=0.05)


def test_the_intervals_of_exponent_and_forecast_hold_the_truth():
    target, exponent, held = 2 * BUDGETS[-1], 0, 0
    for seed in range(40):
        fit = fit_isoflops(slices(BUDGETS, noise=0.005, seed=seed), seed=seed, replicates=150)
        exponent += LAW.exponent in fit.interval("params")
        found = forecast(fit, target)
        held += LAW.optimum(target).loss in found.interval
        assert abs(found.loss / LAW.optimum(target).loss - 1) < 0.02
    # Below 31 of 40 comes with a probability of 0.5% at a true coverage of 0.9.
    assert exponent >= 31
    assert held >= 31


def test_the_interval_of_a_run_is_that_of_the_best_loss_and_its_scatter():
    fit = fit_isoflops(slices(BUDGETS, noise=0.005))
    best = forecast(fit, 2 * BUDGETS[-1])
    run = forecast(fit, 2 * BUDGETS[-1], of_a_run=True)
    assert run.loss == best.loss
    assert run.interval.low < best.interval.low and best.interval.high < run.interval.high
    more = fit._replace(replicates=tuple(draw._replace(spread=100 * draw.spread) for draw in fit.replicates))
    much = forecast(more, 2 * BUDGETS[-1], of_a_run=True).interval  # nearly all of it is scatter
    # The spread is itself known from a few runs: 90% of Student's t, not of a normal.
    freedom = sum(item.points.losses.size - 3 for item in slices(BUDGETS))
    wide = 200 * stats.t.ppf(0.95, freedom) * fit.spread
    assert (much.high - much.low) / wide == pytest.approx(1, abs=0.12)


def test_what_has_no_minimum_inside_is_named_and_takes_no_part():
    bad = slices(BUDGETS[:1], centre=30.0)
    fit = fit_isoflops(bad + slices(BUDGETS[1:]))
    assert len(fit.used) == 4
    assert any("lies outside of the sizes run" in words or "opens downwards" in words for words in fit.left_out)
    thin = fit_isoflops(slices(BUDGETS[:1], sizes=2) + slices(BUDGETS[1:]))
    assert "2 sizes, but a parabola takes 3" in thin.left_out[0]
    with pytest.raises(TooFewRuns, match="2 budgets have a minimum between their sizes, but a forecast takes 3"):
        forecast(fit_isoflops(slices(BUDGETS[:2])), 1e20)


def test_why_there_is_no_forecast_is_said_as_it_is():
    with pytest.raises(TooFewRuns, match="no budget has more than 3 sizes, which a parabola goes through"):
        forecast(fit_isoflops(slices(BUDGETS, sizes=3)), 1e20)
    noisy = fit_isoflops(slices(BUDGETS, noise=0.02))._replace(
        replicates=()
    )  # as `_draw` gives where most open downwards
    with pytest.raises(TooFewRuns, match="the losses scatter by .* most draws of them have no minimum"):
        forecast(noisy, 1e20)


def test_a_power_law():
    x = np.geomspace(1, 100, 8)
    law = fit_power(x, 3 * x**0.7)
    assert isinstance(law, PowerLaw) and law(10.0) == pytest.approx(3 * 10**0.7)


RATES = 2.0 ** np.arange(-9, -3, 0.5)
WIDTHS = (32, 64, 128)
NOISE = 0.002


def swept(exponent, seed, *, rates=RATES, widths=WIDTHS, seeds=2):
    """The best rate by width where it is 0.02 (width / 64)^exponent, from noisy runs of each rate."""
    curves = {}
    for width in widths:
        best = 0.02 * (width / 64) ** exponent
        noise = np.random.default_rng([seed, width]).normal(0, NOISE, (seeds, len(rates)))
        curves[width] = [
            Try(r, 2 + 0.1 * np.log(r / best) ** 2 + e) for row in noise for r, e in zip(rates, row, strict=True)
        ]
    spread = spread_between([group for tries in curves.values() for group in near_best(tries)])
    spreads = spread and spread.draws(seed)
    return {width: best_of(tries, spreads=spreads, seed=1000 * seed + width) for width, tries in curves.items()}


def test_the_best_rate_and_how_far_it_moves():
    same, moved = swept(0.0, 0), swept(-1.0, 0)
    assert all(best.value == pytest.approx(0.02, rel=0.1) and best.inside for best in same.values())
    assert shift(same).factor < 1.15
    assert shift(moved).factor == pytest.approx(4, rel=0.15)
    assert trend(moved).law.exponent == pytest.approx(-1, abs=0.1)
    edge = best_of([Try(r, -r) for r in RATES], spreads=None, seed=0)
    assert not edge.inside and edge.value == RATES[-1]


def test_the_intervals_of_how_far_the_best_rate_moves_hold_the_truth():
    trials, exponents, factors = 60, 0, 0
    for seed in range(trials):
        found = swept(-1.0, seed)
        exponents += -1 in trend(found).interval
        factors += 4 in shift(found).interval
    # 46 of 60 or fewer come with a probability of 0.2% at a true coverage of 0.9. Drawn with one noise for all widths
    # the exponent's interval has no width at all.
    assert exponents > 46
    assert factors > 46


@pytest.mark.parametrize("around", [2, 1], ids=["five rates", "three rates"])
def test_the_interval_of_a_best_rate_holds_the_truth_where_few_runs_tell_the_spread(around):
    rates = 0.02 * 2.0 ** (0.5 * np.arange(-around, around + 1) + 0.1)
    trials, held = 1000, 0
    for seed in range(trials):
        (best,) = swept(0.0, seed, rates=rates, widths=(64,)).values()
        held += 0.02 in best.interval
    # Within 2.6 standard errors. With the spread as found, of 5 and 3 degrees of freedom, 0.84 and 0.80 were held.
    assert held / trials == pytest.approx(0.9, abs=0.025)


def ended(exponent, widths=(32, 64, 128, 256)):
    """As `swept` without noise, at rates whose ends the best passes at some widths."""
    rates = 0.02 * 2.0 ** np.arange(-1.5, 2.0, 0.5)
    tries = {w: [Try(r, np.log(r / (0.02 * (w / 64) ** exponent)) ** 2) for r in rates] for w in widths}
    return {width: best_of(each, spreads=None, seed=0) for width, each in tries.items()}


def test_an_exponent_names_its_widths_and_what_those_at_an_end_leave_of_it():
    whole = trend(ended(-0.5))
    assert whole.law.exponent == pytest.approx(-0.5) and whole.widths == (32, 64, 128, 256)
    assert whole.ends == () and whole.bound is None
    # The best of 256 is 2^-2 of the base's, and the lowest rate tried 2^-1.5 of it.
    falls = trend(ended(-1.0))
    assert falls.law.exponent == pytest.approx(-1) and (falls.widths, falls.ends) == ((32, 64, 128), (256,))
    assert falls.bound.side == "or less"  # least squares of 1, 0, -1 and -1.5 over 0, 1, 2 and 3
    assert falls.bound.exponent == pytest.approx(-0.85)
    rises = trend(ended(1.0))
    assert rises.ends == (256,) and rises.bound.side == "or more" and rises.bound.exponent == pytest.approx(0.85)
    # A narrow model's best beyond the highest rate makes the exponent fall, as a wide one's below the lowest does.
    steep = trend(ended(-1.0, widths=(16, 32, 64, 256)))
    assert steep.ends == (16, 256) and steep.bound.side == "or less"
    # Below the lowest rate at both a narrow and a wide model: more or less, nobody knows.
    open_ended = ended(-0.5, widths=(32, 64)) | {width: ended(-1.0)[256] for width in (16, 256)}
    assert trend(open_ended).ends == (16, 256) and trend(open_ended).bound is None


def test_one_seed_has_no_interval():
    assert spread_between([[2.0], [2.1]]) is None
    found = swept(-1.0, 0, seeds=1)
    assert all(best.interval is None for best in found.values())
    assert shift(found).interval is None and shift(found).factor == pytest.approx(4, rel=0.2)
    assert trend(found).interval is None
