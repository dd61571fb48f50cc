"""Learning rates as functions of `step`, the number of batches consumed before the step.

The update of step i is the (i + 1)-th, and every shape is a function of that count s = i + 1: the warm-up is
s / warmup_steps, so that the first update never has a rate of 0, its last update has exactly `peak_lr`, and the last
update of the run exactly the final rate.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from maxlm.config import OptimConfig

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(optim: OptimConfig, steps: int) -> Schedule:
    """The schedule of a run of `steps` steps: int32 step () -> float32 learning rate ().

    Shapes after the warm-up: constant; cosine (Loshchilov & Hutter 2017) and linear from the peak to
    `final_lr_ratio` of it; inverse_sqrt, peak * sqrt(warmup / s) (Vaswani et al. 2017); wsd, constant until
    `decay_steps` before the end, then linear to `final_lr_ratio` of the peak (warmup-stable-decay: Hu et al. 2024,
    MiniCPM; the linear cooldown: Hägele et al. 2024). Up to its cooldown a wsd run is independent of `steps`, so
    that runs of several lengths branch off one trunk.
    """
    peak, warmup = optim.peak_lr, optim.warmup_steps
    after = _after_warmup(optim, steps - warmup)
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])

    def schedule(step: jax.Array) -> jax.Array:
        return jnp.asarray(after(step + 1), jnp.float32)

    return schedule


def _after_warmup(optim: OptimConfig, length: int) -> optax.Schedule:
    """The rate by the number of updates since the warm-up (0 is its last one), which `length` updates follow."""
    peak, warmup = optim.peak_lr, optim.warmup_steps
    end = peak * optim.final_lr_ratio
    match optim.schedule:
        case "constant":
            return optax.constant_schedule(peak)
        case "inverse_sqrt":
            return lambda count: peak * jnp.sqrt(max(warmup, 1) / jnp.maximum(warmup + count, 1))
        case "cosine":
            shape = optax.cosine_decay_schedule(peak, length, alpha=optim.final_lr_ratio)
        case "linear":
            shape = optax.linear_schedule(peak, end, length)
        case "wsd":
            shape = optax.linear_schedule(peak, end, optim.decay_steps, length - optim.decay_steps)
        case unknown:
            raise ValueError(
                f"optim.schedule is {unknown!r}, which is not a schedule; "
                "type constant, cosine, linear, inverse_sqrt or wsd"
            )
    if optim.schedule == "wsd" and not optim.decay_steps:
        return shape
    # Rounding may leave the last value beside the end, and below 0 if the end is 0.
    return optax.join_schedules([shape, optax.constant_schedule(end)], [length])
