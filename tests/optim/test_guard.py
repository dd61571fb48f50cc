import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import GuardConfig
from maxlm.optim import guard

CONFIG = GuardConfig(window=16, min_history=8, threshold=12.0)
NAN, INF = float("nan"), float("inf")


def judge_all(config, losses, norms, state=None):
    """The accepted flags (numpy bool (n,)) and the last state over a whole curve."""
    state = guard.init_guard(config) if state is None else state
    accepted = []
    for loss, norm in zip(losses, norms, strict=True):
        verdict = judge_one(state, loss, norm, config=config)
        state = verdict.guard
        accepted.append(verdict.accept)
    return np.asarray(accepted), state


def judge_one(state, loss, norm, *, config=CONFIG, excused=False):
    return judge(config, state, np.float32(loss), np.float32(norm), np.bool_(excused))


@functools.partial(jax.jit, static_argnums=0)
def judge(config, state, loss, norm, excused):
    return guard.judge(config, state, loss=loss, grad_norm=norm, excused=excused)


def calm(n, seed=0, level=3.0):
    rng = np.random.default_rng(seed)
    return level * (1 + 0.02 * rng.normal(size=n)), 0.5 * (1 + 0.1 * rng.normal(size=n))


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.mark.parametrize("bad", ((NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, 1.0)))
@pytest.mark.parametrize("history", (0, 3, 40))
def test_one_non_finite_value_is_one_refusal_at_any_time(bad, history):
    losses, norms = calm(history + 21)
    losses[history], norms[history] = bad
    accepted, state = judge_all(CONFIG, losses, norms)
    assert not accepted[history] and accepted.sum() == history + 20
    assert int(state.total) == 1 and int(state.in_row) == 0
    assert np.isfinite(state.losses).all() and np.isfinite(state.norms).all()


@pytest.mark.parametrize("which", ("loss", "norm"))
def test_a_ten_fold_spike_is_refused_and_leaves_no_trace(which):
    losses, norms = calm(40)
    _, state = judge_all(CONFIG, losses, norms)
    spike = (30.0, 0.5) if which == "loss" else (3.0, 5.0)
    verdict = judge_one(state, *spike)
    assert not bool(verdict.accept)
    for field in ("losses", "norms", "accepted"):
        assert same_bits(getattr(verdict.guard, field), getattr(state, field))
    assert int(verdict.guard.in_row) == 1 and int(verdict.guard.total) == 1


def test_a_spike_before_min_history_passes_and_without_a_threshold_always():
    losses, norms = calm(7)
    assert bool(judge_one(judge_all(CONFIG, losses, norms)[1], 30.0, 0.5).accept)
    never = GuardConfig(window=16, min_history=8, threshold=0.0)
    _, state = judge_all(never, *calm(40))
    assert bool(judge_one(state, 1e9, 1e9, config=never).accept)
    assert not bool(judge_one(state, NAN, 1.0, config=never).accept)


def test_many_spikes_do_not_disarm_the_guard():
    # Were refused values to enter the window, the tenth spike would be the median.
    losses, norms = calm(40)
    accepted, state = judge_all(
        CONFIG, np.concatenate([losses, np.full(30, 30.0)]), np.concatenate([norms, norms[:30]])
    )
    assert not accepted[40:].any() and int(state.in_row) == 30 and int(state.total) == 30


def test_refusals_in_a_row_start_anew_after_an_acceptance():
    losses, norms = calm(46)
    losses[40:43], losses[44] = NAN, NAN
    _, state = judge_all(CONFIG, losses[:43], norms[:43])
    assert int(state.in_row) == 3
    _, state = judge_all(CONFIG, losses[:45], norms[:45])
    assert int(state.in_row) == 1 and int(state.total) == 4


def test_an_excused_overflow_is_refused_and_not_counted():
    _, state = judge_all(CONFIG, *calm(20))
    state = judge_one(state, NAN, 1.0).guard
    verdict = judge_one(state, 3.0, INF, excused=True)
    assert not bool(verdict.accept) and same_bits(verdict.guard, state)


def test_the_ring_keeps_the_newest():
    losses = np.linspace(4.0, 3.0, 40)
    _, state = judge_all(CONFIG, losses, np.ones(40))
    np.testing.assert_array_equal(np.sort(state.losses), np.sort(losses[-16:].astype(np.float32)))


def curves():
    """Realistic runs by name: (losses, norms), none of which may lose a step."""
    rng = np.random.default_rng(7)
    n = 600
    t = np.arange(n)
    noise = 1 + 0.02 * rng.normal(size=n)
    decay = 2.0 + 6.3 * (1 + t / 20) ** -0.7
    warm = np.where(t < 50, 8.32 - 0.0004 * t**2, 0)  # a slow start under the warm-up, then the fast drop
    warm = np.where(t >= 50, 2.0 + 5.3 * (1 + np.maximum(t - 50, 0) / 15) ** -0.6, warm)
    halving_batch = np.where(t < 300, 1.0, np.sqrt(2.0))
    tail = np.exp(0.3 * rng.standard_t(5, size=n))  # the heavy tail of norms at small batches
    plateau = np.where(t < 100, 8.3, 3.0 + 5.3 * np.exp(-(t - 100) / 30))
    return {
        "fast drop from the first step": (decay * noise, 0.4 + 8 * np.exp(-t / 15) + 0.05 * rng.random(n)),
        "warm-up, then the drop": (warm * (1 + 0.003 * rng.normal(size=n)), (0.5 + 2 * np.exp(-t / 40)) * noise),
        "calm plateau, then learning": (
            plateau * (1 + 0.0005 * rng.normal(size=n)),
            np.where(t < 100, 1.0, 1 + 2 * np.exp(-((t - 160) ** 2) / 1000)) * (1 + 0.005 * rng.normal(size=n)),
        ),
        "noisy small batches": (decay * (1 + 0.08 * rng.normal(size=n)), 1.0 * tail),
        "batch halved on the way": (
            decay * (1 + 0.02 * halving_batch * rng.normal(size=n)),
            0.5 * halving_batch * (1 + 0.1 * rng.normal(size=n)),
        ),
        "sequence lengthened on the way": (decay * noise * np.where(t < 300, 1.0, 0.93), 0.5 * noise),
        "a perfectly calm window": (np.where(t % 50 == 49, 3.1, 3.0), np.where(t % 70 == 69, 1.2, 1.0)),
        "steps down to nearly nothing": (8.0 * 0.97**t + 1e-4, 2.0 * 0.98**t + 1e-5),
    }


@pytest.mark.parametrize("name", list(curves()))
def test_ordinary_training_is_never_refused(name):
    losses, norms = curves()[name]
    accepted, state = judge_all(GuardConfig(), losses, norms)
    assert accepted.all(), f"refused at {np.flatnonzero(~accepted)}"
    assert int(state.total) == 0


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0.0, 1.0), min_size=150, max_size=150),
    st.floats(0.0, 0.1),
)
def test_a_loss_that_only_falls_is_never_refused(drops, rate):
    losses = 10.0 * np.exp(-rate * np.cumsum(drops))
    accepted, _ = judge_all(GuardConfig(window=32, min_history=4), losses, np.ones(150))
    assert accepted.all()


def test_a_new_phase_is_judged_by_itself():
    losses, norms = calm(40)
    _, state = judge_all(CONFIG, losses, norms)
    harder, harder_norms = calm(40, seed=1, level=9.0)
    assert not judge_all(CONFIG, harder, harder_norms, state)[0].any()
    assert same_bits(guard.restart(state, jnp.zeros((), bool)), state)
    accepted, state = judge_all(CONFIG, harder, harder_norms, guard.restart(state, jnp.ones((), bool)))
    assert accepted.all()
    assert not bool(judge_one(state, 90.0, 0.5).accept)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_median_and_deviation_are_those_of_numpy(data):
    finite = st.floats(-1e6, 1e6, width=32)
    values = np.asarray(data.draw(st.lists(finite, min_size=16, max_size=16)), np.float32)
    count = data.draw(st.integers(1, 16))
    part = values[:count].astype(np.float64)
    median = np.median(part)
    deviation = 1.4826 * np.median(np.abs(part - median))
    # Differences of float32 numbers round to the spacing at the largest of them.
    slack = 1e-6 * max(1e-30, np.abs(part).max())
    np.testing.assert_allclose(jax.jit(guard.median)(values, jnp.int32(count)), median, rtol=1e-6, atol=slack)
    np.testing.assert_allclose(jax.jit(guard.deviation)(values, jnp.int32(count)), deviation, rtol=1e-5, atol=4 * slack)


def test_selection_is_bit_exact_and_stops_nan():
    old = {"a": jnp.asarray([-0.0, 1e-45, 3.0], jnp.float32), "b": jnp.asarray([1.5], jnp.bfloat16), "n": jnp.int32(7)}
    new = {"a": jnp.full(3, NAN, jnp.float32), "b": jnp.asarray([NAN], jnp.bfloat16), "n": jnp.int32(8)}
    select = jax.jit(guard.select)
    assert same_bits(select(jnp.zeros((), bool), new, old), old)
    assert same_bits(select(jnp.ones((), bool), new, old), new)


def test_selection_refuses_to_promote():
    with pytest.raises(TypeError):
        guard.select(jnp.ones((), bool), {"a": jnp.ones(2, jnp.float32)}, {"a": jnp.ones(2, jnp.bfloat16)})
