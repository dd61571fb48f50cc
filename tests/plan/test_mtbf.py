"""The simulated goodput tends to the closed form, is best at the policy's interval, and falls as runs grow."""

import math

import pytest

from maxlm.plan.mtbf import Costs, interval, outlooks, simulate

YEAR = 365 * 24 * 3600.0


def expected_goodput(costs, *, mtbf, every):
    """In closed form, where saves commit at once (Daly 2006, section 2).

    A cycle of `every` plus the stall is gone through with probability exp(-cycle / mtbf); until a failure the committed
    cycles are geometrically distributed.
    """
    whole = math.exp(-(every + costs.stall) / mtbf)
    return every * whole / (1 - whole) / (mtbf + costs.restart)


@pytest.mark.parametrize("chips", [256, 4096])
@pytest.mark.parametrize("every", [60.0, 900.0])
def test_the_simulation_tends_to_the_closed_form(chips, every):
    costs = Costs(stall=5.0, write=0.0, restart=240.0)
    found = simulate(chips, costs, chip_mtbf=5 * YEAR, every=every, failures=20_000)
    # The standard error of a mean of 20,000 exponential times is 0.7%.
    assert found.goodput == pytest.approx(expected_goodput(costs, mtbf=5 * YEAR / chips, every=every), rel=0.02)


def test_every_second_has_one_place():
    found = simulate(4096, Costs(stall=5.0, write=60.0, restart=240.0), chip_mtbf=YEAR)
    assert found.goodput + found.saving + found.lost + found.down == pytest.approx(1.0)


def test_no_interval_does_better_than_the_policy():
    costs, chips = Costs(stall=8.0, write=0.0, restart=200.0), 4096
    best = interval(costs, 5 * YEAR / chips)
    at = {
        factor: simulate(chips, costs, chip_mtbf=5 * YEAR, every=best * factor, failures=20_000).goodput
        for factor in (0.3, 1.0, 3.0)
    }
    assert at[1.0] > at[0.3] and at[1.0] > at[3.0]


def test_a_save_that_is_not_committed_does_not_count():
    slow, fast = (simulate(4096, Costs(5.0, write, 200.0), chip_mtbf=YEAR, every=600.0) for write in (590.0, 0.0))
    assert slow.lost > fast.lost + 0.02 and slow.goodput < fast.goodput


def test_larger_runs_lose_more():
    goodputs = [found.goodput for found in outlooks(Costs(2.0, 30.0, 180.0), chip_mtbf_hours=50_000)]
    assert goodputs == sorted(goodputs, reverse=True) and goodputs[-1] < goodputs[0] - 0.02
