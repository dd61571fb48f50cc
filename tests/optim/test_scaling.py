import jax
import jax.numpy as jnp
import pytest

from maxlm.optim import scaling

INF, NAN = jnp.float32(jnp.inf), jnp.float32(jnp.nan)


@jax.jit
def step(state, grad_norm):
    overflow = scaling.overflowed(state, grad_norm)
    return overflow, scaling.update_scale(state, overflow)


@pytest.mark.parametrize("norm", (INF, NAN))
def test_an_overflow_halves_and_restarts_the_count(norm):
    state = scaling.init_scale("float16")
    _, state = step(state, jnp.float32(1.0))
    overflow, state = step(state, norm)
    assert bool(overflow) and float(state.scale) == 2.0**14 and int(state.good_steps) == 0


def test_it_doubles_after_the_interval_and_not_before():
    state = scaling.init_scale("float16")._replace(good_steps=jnp.int32(scaling.GROWTH_INTERVAL - 2))
    _, state = step(state, jnp.float32(1.0))
    assert float(state.scale) == 2.0**15
    overflow, state = step(state, jnp.float32(1.0))
    assert not bool(overflow) and float(state.scale) == 2.0**16 and int(state.good_steps) == 0


def test_it_stays_within_its_bounds_and_stops_excusing_at_the_smallest():
    state = scaling.init_scale("float16")
    excused = 0
    for _ in range(20):
        overflow, state = step(state, INF)
        excused += int(overflow)
    assert excused == 15 and float(state.scale) == 1.0
    state = state._replace(scale=state.ceiling, good_steps=jnp.int32(scaling.GROWTH_INTERVAL))
    assert float(step(state, jnp.float32(1.0))[1].scale) == 2.0**24


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_without_float16_the_scale_is_one_for_ever(precision):
    state = scaling.init_scale(precision)._replace(good_steps=jnp.int32(scaling.GROWTH_INTERVAL))
    for norm in (jnp.float32(1.0), INF, NAN):
        overflow, state = step(state, norm)
        assert not bool(overflow) and float(state.scale) == 1.0
