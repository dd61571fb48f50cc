"""The guard: which updates are refused, and the bit-exact selection that refuses them.

A loss or gradient norm is judged against the median and the median absolute deviation (MAD) of the last accepted ones.
Only what lies above is refused, so a falling loss never is. Refused values never enter the window: otherwise a few
of them would widen it until it refuses nothing. All of it runs inside the jitted step, on scalars and two rings of
`window` float32 numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import GuardConfig

# The MAD of a normal distribution times this is its standard deviation.
MAD_TO_DEVIATION = 1.4826

# The deviation is taken to be at least this part of the median. In a very calm window the MAD says little about what is
# ordinary: a loss on the plateau before learning starts varies by a thousandth and then does not, and gradient norms
# drift by factors (a rising norm that is refused stays high, since the parameters stand still, and would end the run).
# With the usual threshold of 12 a loss is never refused below 1.24 times the median and a norm never below 4 times,
# while a ten-fold spike always is.
LOSS_FLOOR = 0.02
NORM_FLOOR = 0.25


class GuardState(NamedTuple):
    """What the guard judges by.

    losses, norms: rings of the last accepted values, float32 (window,); slot `accepted % window` is the oldest.
    accepted: accepted values since the start or the last `restart`, int32 ().
    in_row: refusals since the last accepted update, int32 (); the host ends the run at `max_rejections`.
    total: refusals in all, int32 (). Excused ones are in neither count.
    """

    losses: jax.Array
    norms: jax.Array
    accepted: jax.Array
    in_row: jax.Array
    total: jax.Array


class Verdict(NamedTuple):
    """What `judge` says about a step.

    accept: bool (); whether the update is to be applied.
    guard: the state after the step.
    loss_limit, norm_limit: the largest values that would have been accepted, float32 (); inf before `min_history`.
    """

    accept: jax.Array
    guard: GuardState
    loss_limit: jax.Array
    norm_limit: jax.Array


def init_guard(config: GuardConfig) -> GuardState:
    """The state at step 0: an empty window."""
    return GuardState(
        losses=jnp.zeros((config.window,), jnp.float32),
        norms=jnp.zeros((config.window,), jnp.float32),
        accepted=jnp.zeros((), jnp.int32),
        in_row=jnp.zeros((), jnp.int32),
        total=jnp.zeros((), jnp.int32),
    )


def restart(guard: GuardState, where: jax.Array) -> GuardState:
    """Forgets the window if `where` (bool ()) holds: the first step of a data phase has other losses and norms."""
    return guard._replace(accepted=jnp.where(where, 0, guard.accepted))


def judge(
    config: GuardConfig, guard: GuardState, *, loss: jax.Array, grad_norm: jax.Array, excused: jax.Array
) -> Verdict:
    """Judges a step by its loss and its gradient norm before clipping (float32 scalars).

    Refused is a value that is not finite, always, and from `min_history` accepted steps on one that lies more than
    `threshold` deviations above the window's median. A refusal with `excused` (bool ()) set, an overflow that loss
    scaling will mend, is not counted.
    """
    loss, grad_norm = loss.astype(jnp.float32), grad_norm.astype(jnp.float32)
    loss_limit = _limit(config, guard.losses, guard.accepted, floor=LOSS_FLOOR)
    norm_limit = _limit(config, guard.norms, guard.accepted, floor=NORM_FLOOR)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    accept = finite & (loss <= loss_limit) & (grad_norm <= norm_limit)
    counted = (~accept & ~jnp.asarray(excused)).astype(jnp.int32)
    slot = guard.accepted % config.window
    state = GuardState(
        losses=guard.losses.at[slot].set(jnp.where(accept, loss, guard.losses[slot])),
        norms=guard.norms.at[slot].set(jnp.where(accept, grad_norm, guard.norms[slot])),
        accepted=guard.accepted + accept.astype(jnp.int32),
        in_row=jnp.where(accept, 0, guard.in_row + counted),
        total=guard.total + counted,
    )
    return Verdict(accept, state, loss_limit, norm_limit)


def select(accept: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `accept` (bool ()) holds, else `old`, bit for bit; both trees of the same shapes and dtypes.

    A selection, not a product: 0 * NaN is NaN. `lax.select` refuses dtypes that differ instead of promoting them.
    """
    return jax.tree.map(lambda n, o: jax.lax.select(accept, n, o), new, old)


def median(values: jax.Array, count: jax.Array) -> jax.Array:
    """The median of the first `count` (int32 (), at least 1) of `values` (float32 (n,)), as NumPy defines it."""
    ordered = jnp.sort(jnp.where(jnp.arange(values.size) < count, values, jnp.inf))
    return 0.5 * ordered[(count - 1) // 2] + 0.5 * ordered[count // 2]


def deviation(values: jax.Array, count: jax.Array) -> jax.Array:
    """The median absolute deviation of the first `count` of `values`, scaled to a standard deviation."""
    return MAD_TO_DEVIATION * median(jnp.abs(values - median(values, count)), count)


def _limit(config: GuardConfig, ring: jax.Array, accepted: jax.Array, *, floor: float) -> jax.Array:
    """The largest acceptable value, float32 (); inf while outliers are not judged."""
    if config.threshold == 0:
        return jnp.float32(jnp.inf)
    count = jnp.minimum(accepted, config.window)
    middle = median(ring, count)
    spread = jnp.maximum(deviation(ring, count), floor * jnp.abs(middle))
    return jnp.where(count >= config.min_history, middle + config.threshold * spread, jnp.inf)
