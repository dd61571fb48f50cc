import math

import jax
import numpy as np
import pytest

from maxlm.config import OptimConfig
from maxlm.optim.schedules import learning_rate, make_rates

PEAK, RATIO, WARMUP, STEPS = 3e-3, 0.1, 10, 100
SHAPES = ("constant", "cosine", "linear", "inverse_sqrt", "wsd")
# The schedules are float32 functions of a step: a few roundings of 6e-8 each.
TOLERANCE = 1e-6


def rates(schedule, steps=STEPS, *, count=None, **changes):
    settings = {"peak_lr": PEAK, "final_lr_ratio": RATIO, "warmup_steps": WARMUP}
    optim = OptimConfig(schedule=schedule, **(settings | changes))
    rates = make_rates(optim, steps)
    every = jax.vmap(lambda rates, step: learning_rate(schedule, rates, step), in_axes=(None, 0))
    return np.asarray(jax.jit(every)(rates, np.arange(count or steps, dtype=np.int32)))


@pytest.mark.parametrize("schedule", SHAPES)
def test_warmup_is_linear_and_starts_above_zero(schedule):
    lr = rates(schedule, decay_steps=20 if schedule == "wsd" else 0)
    assert lr.dtype == np.float32
    np.testing.assert_allclose(lr[:WARMUP], PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=TOLERANCE)
    for peak in (PEAK, 2e-4, 8e-4):
        assert rates(schedule, peak_lr=peak, decay_steps=20 if schedule == "wsd" else 0)[WARMUP - 1] == np.float32(peak)


@pytest.mark.parametrize("schedule", ("cosine", "linear", "wsd"))
def test_the_last_update_has_the_final_rate_and_so_has_all_that_follows(schedule):
    lr = rates(schedule, count=STEPS + 5, decay_steps=20 if schedule == "wsd" else 0)
    assert (lr[STEPS - 1 :] == np.float32(PEAK * RATIO)).all()
    assert lr[STEPS - 2] > lr[STEPS - 1] * 1.0001


@pytest.mark.parametrize("schedule", ("cosine", "linear", "wsd"))
def test_a_final_ratio_of_zero_ends_at_exactly_zero(schedule):
    lr = rates(schedule, final_lr_ratio=0.0, decay_steps=20 if schedule == "wsd" else 0)
    assert lr[-1] == 0.0 and lr[-2] > 0.0


def test_values_between():
    after = np.arange(WARMUP, STEPS) + 1 - WARMUP
    part = after / (STEPS - WARMUP)
    cosine = PEAK * (RATIO + (1 - RATIO) * 0.5 * (1 + np.cos(np.pi * part)))
    np.testing.assert_allclose(rates("constant")[WARMUP:], PEAK, rtol=TOLERANCE)
    np.testing.assert_allclose(rates("cosine")[WARMUP:], cosine, rtol=1e-5)  # cos near pi: cancellation in float32
    np.testing.assert_allclose(rates("linear")[WARMUP:], PEAK * (1 - (1 - RATIO) * part), rtol=TOLERANCE)
    np.testing.assert_allclose(
        rates("inverse_sqrt")[WARMUP:], PEAK * np.sqrt(WARMUP / (WARMUP + after)), rtol=TOLERANCE
    )


def test_without_warmup():
    assert rates("constant", warmup_steps=0)[0] == np.float32(PEAK)
    np.testing.assert_allclose(
        rates("inverse_sqrt", warmup_steps=0)[:4], [PEAK / math.sqrt(s) for s in (1, 2, 3, 4)], rtol=TOLERANCE
    )
    np.testing.assert_allclose(rates("linear", 10, warmup_steps=0, final_lr_ratio=0.0)[0], PEAK * 0.9, rtol=TOLERANCE)


def test_wsd_decays_over_exactly_decay_steps_updates():
    lr = rates("wsd", decay_steps=20)
    assert (lr[WARMUP - 1 : STEPS - 20] == np.float32(PEAK)).all()
    np.testing.assert_allclose(lr[STEPS - 20 :], PEAK * (1 - (1 - RATIO) * np.arange(1, 21) / 20), rtol=TOLERANCE)


def test_wsd_cooldowns_branch_off_one_trunk():
    trunk = rates("wsd", 400, decay_steps=40)
    for steps, decay in ((100, 10), (200, 50)):
        branch = rates("wsd", steps, decay_steps=decay)
        assert (branch[: steps - decay] == trunk[: steps - decay]).all()
        assert (branch[steps - decay :] < trunk[steps - decay : steps]).all()


def test_wsd_without_a_cooldown_is_constant():
    assert (rates("wsd", count=STEPS + 5)[WARMUP:] == np.float32(PEAK)).all()


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'cosin', which is not a schedule; type constant, cosine"):
        learning_rate("cosin", make_rates(OptimConfig(), 10), 0)
