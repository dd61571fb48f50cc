"""Learning rates as functions of `step`, the number of batches consumed before the step.

The update of step i is the (i + 1)-th, and every shape is a function of that count s = i + 1: the warm-up is
s / warmup_steps, so that the first update never has a rate of 0, its last update has exactly `peak_lr`, and the last
update of the run exactly the final rate.

The numbers of a schedule are operands of the program that uses them, not constants in it: runs that differ in nothing
else, those of a sweep for one, share a compiled program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import OptimConfig


class Rates(NamedTuple):
    """The numbers of a run's schedule: of NumPy as they are made, of JAX in a program.

    peak, final: learning rates, float32 ().
    warmup, decay, steps: of the warm-up, of the cooldown and of the run, int32 ().
    """

    peak: jax.Array | np.ndarray
    final: jax.Array | np.ndarray
    warmup: jax.Array | np.ndarray
    decay: jax.Array | np.ndarray
    steps: jax.Array | np.ndarray


def make_rates(optim: OptimConfig, steps: int) -> Rates:
    """The numbers of a run of `steps` steps."""
    peak, final = np.float32(optim.peak_lr), np.float32(optim.peak_lr * optim.final_lr_ratio)
    counts = (np.int32(count) for count in (optim.warmup_steps, optim.decay_steps, steps))
    return Rates(*map(np.asarray, (peak, final, *counts)))


def learning_rate(shape: str, rates: Rates, step: jax.Array) -> jax.Array:
    """The rate of the update of `step`, int32 (): float32 ().

    Shapes after the warm-up: constant; cosine (Loshchilov & Hutter 2017) and linear from the peak to the final rate;
    inverse_sqrt, peak * sqrt(warmup / s) (Vaswani et al. 2017); wsd, constant until `decay` steps before the end, then
    linear to the final rate (warmup-stable-decay: Hu et al. 2024, MiniCPM; the linear cooldown: Hägele et al. 2024).
    Up to its cooldown a wsd run is independent of `steps`, so that runs of several lengths branch off one trunk.

    Raises:
      ValueError: `shape` is none of them.
    """
    peak, final, warmup, decay, steps = (jnp.asarray(number) for number in rates)
    count = step + 1
    match shape:
        case "constant":
            after = peak
        case "inverse_sqrt":
            after = peak * jnp.sqrt(jnp.maximum(warmup, 1) / count)
        case "cosine":
            part = _part(count - warmup, steps - warmup)
            after = _ended(part, final, peak - (peak - final) * 0.5 * (1 - jnp.cos(jnp.pi * part)))
        case "linear":
            part = _part(count - warmup, steps - warmup)
            after = _ended(part, final, peak + (final - peak) * part)
        case "wsd":
            part = jnp.where(decay > 0, _part(count - (steps - decay), decay), 0.0)
            after = _ended(part, final, peak + (final - peak) * part)
        case unknown:
            raise ValueError(
                f"optim.schedule is {unknown!r}, which is not a schedule; "
                "type constant, cosine, linear, inverse_sqrt or wsd"
            )
    return jnp.where(count < warmup, peak * count / jnp.maximum(warmup, 1), after).astype(jnp.float32)


def _part(count: jax.Array, length: jax.Array) -> jax.Array:
    """How much of `length` is behind, from 0 to 1."""
    return jnp.clip(count / jnp.maximum(length, 1), 0.0, 1.0)


def _ended(part: jax.Array, final: jax.Array, shaped: jax.Array) -> jax.Array:
    """Rounding may leave the last value of a shape beside the final one, and below 0 if that is 0."""
    return jnp.where(part < 1.0, shaped, final)
