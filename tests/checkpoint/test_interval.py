"""The interval between saves, against published values and against brute force."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.checkpoint.interval import best_interval, interval_steps

MINUTE = 60.0


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_the_optima_that_daly_printed(hours, minutes):
    """Figures 3 to 5 of the paper: a dump of 5 minutes, and the optimum between dumps that the model predicts."""
    assert best_interval(5 * MINUTE, hours * 60 * MINUTE) / MINUTE == pytest.approx(minutes, rel=0.01)


def expected(interval: float, cost: float, mtbf: float) -> float:
    """Seconds that a second of work takes (Daly 2006, equation 20, a restart that takes no time)."""
    return mtbf * math.expm1((interval + cost) / mtbf) / interval


@given(cost=st.floats(0.01, 600), mtbf=st.floats(1800, 1e6))
def test_no_other_interval_is_better_by_more_than_a_thousandth(cost, mtbf):
    best = best_interval(cost, mtbf)
    at_best = expected(best, cost, mtbf)
    others = (expected(best * factor, cost, mtbf) for factor in (0.25, 0.5, 0.8, 0.95, 1.05, 1.25, 2, 4))
    assert all(at_best <= other * 1.001 for other in others)


def test_a_run_that_fails_as_often_as_it_saves_still_has_an_interval():
    assert best_interval(100.0, 40.0) == 40.0
    assert best_interval(0.0, 3600.0) == 0.0
    with pytest.raises(ValueError, match="cannot be"):
        best_interval(1.0, 0.0)
    with pytest.raises(ValueError, match="cannot be"):
        best_interval(-1.0, 10.0)


def test_steps_are_bounded_by_the_write_and_by_the_setting():
    asked = {"cost": 2.0, "mtbf": 4 * 3600.0, "step_seconds": 1.5}
    assert interval_steps(**asked, write_seconds=0.0, at_most=10_000) == math.ceil(best_interval(2.0, 14400) / 1.5)
    assert interval_steps(**asked, write_seconds=600.0, at_most=10_000) == 400
    assert interval_steps(**asked, write_seconds=600.0, at_most=100) == 100
    assert interval_steps(cost=0.0, mtbf=10.0, step_seconds=60.0, write_seconds=0.0, at_most=5) == 1
