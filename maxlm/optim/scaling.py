"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2).

The loss is multiplied by a power of two before the backward pass, so that small gradients do not vanish in float16,
and the gradients are divided by it afterwards, which is exact. A gradient that overflowed halves the scale and its
update is skipped; a long row of good ones doubles it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The values of the paper's authors' implementation. They find the scale by search, whatever the model.
INITIAL_SCALE = 2.0**15
GROWTH_INTERVAL = 2000  # steps without overflow before the scale doubles
LARGEST_SCALE = 2.0**24
SMALLEST_SCALE = 1.0


class ScaleState(NamedTuple):
    """The scale and what moves it.

    scale: the loss is multiplied by this, float32 (), a power of two.
    ceiling: the scale never grows beyond this, float32 (); SMALLEST_SCALE where the precision needs no scaling, which
      holds the scale at 1.
    good_steps: steps without overflow since the scale last changed, int32 ().
    """

    scale: jax.Array
    ceiling: jax.Array
    good_steps: jax.Array


def _scales(precision: str) -> bool:
    """Whether gradients of a compute dtype, by name, vanish without a scale."""
    return precision == "float16"


def init_scale(precision: str) -> ScaleState:
    """The state at step 0 for a compute dtype by name; for all but float16 the scale is 1 and stays so."""
    scale, ceiling = (INITIAL_SCALE, LARGEST_SCALE) if _scales(precision) else (SMALLEST_SCALE, SMALLEST_SCALE)
    return ScaleState(jnp.float32(scale), jnp.float32(ceiling), jnp.zeros((), jnp.int32))


def loss_factor(state: ScaleState, precision: str) -> jax.Array:
    """What the loss is multiplied by, float32 (): a constant 1 for all but float16, and XLA leaves the products out.

    Of a number that only the state holds it does not know that, and writes every gradient once more.
    """
    return state.scale if _scales(precision) else jnp.float32(1.0)


def overflowed(state: ScaleState, grad_norm: jax.Array) -> jax.Array:
    """Whether the scale is to blame for a non-finite gradient norm: bool ().

    False once the scale is at its smallest (always, where no scaling is needed): then it has nothing left to give
    and the refusal is the guard's to count.
    """
    return ~jnp.isfinite(grad_norm) & (state.scale > SMALLEST_SCALE)


def update_scale(state: ScaleState, overflow: jax.Array) -> ScaleState:
    """The state after a step: halved by an overflow, doubled after GROWTH_INTERVAL steps without one."""
    good_steps = jnp.where(overflow, 0, state.good_steps + 1)
    grow = good_steps >= GROWTH_INTERVAL
    scale = jnp.where(overflow, state.scale * 0.5, jnp.where(grow, state.scale * 2.0, state.scale))
    return ScaleState(
        scale=jnp.clip(scale, SMALLEST_SCALE, state.ceiling),
        ceiling=state.ceiling,
        good_steps=jnp.where(grow, 0, good_steps),
    )
