"""Choosing the next token from logits.

Every filter is a pure function from float32 logits to float32 logits in which a token that may not be drawn has -inf.
The order is the usual one: repetition penalty, and in `sample` temperature, top-k, top-p, min-p. Tokens that tie with
the last one kept are kept, so that a result never hangs on the order in which a sort leaves equal values.

Shapes: B batch, V vocab.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from maxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the filters' defaults leave them out. Hashable, so that a program is compiled for each.

    Args:
      temperature: divides the logits; 0 takes the likeliest token whatever the filters are.
      top_k: only this many of the likeliest tokens are drawn from; 0: all.
      top_p: only the fewest likeliest tokens with at least this probability together (Holtzman et al. 2020); 1: all.
      min_p: only tokens at least this many times as likely as the likeliest (Nguyen et al. 2024); 0: all.
      repetition_penalty: logits of tokens that a row has already are divided by this where they are positive, and
        multiplied by it where they are negative (Keskar et al. 2019), at temperature 0, too; 1: none.

    Raises:
      UserError: when a value is outside its range.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}, but it has to be finite and at least 0 (0: greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, but it has to be at least 0 (0: all tokens)")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}, but it has to be above 0 and at most 1 (1: all tokens)")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p is {self.min_p}, but it has to be between 0 and 1 (0: all tokens)")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}, but it has to be finite and above 0 (1: none)"
            )


def penalised(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Makes the tokens that a row has already less likely, as `Sampling.repetition_penalty` says.

    Args:
      logits: (B, V) float32.
      seen: (B, V) bool.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: jax.Array, top_k: int) -> jax.Array:
    """Keeps the `top_k` highest logits of each row.

    Args:
      logits: (B, V) float32.
      top_k: at least 1; as many as V or more keep all.
    """
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits >= kth, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Keeps the fewest likeliest tokens of each row whose probabilities sum to `top_p` or more: one at least.

    Args:
      logits: (B, V) float32.
      top_p: above 0 and at most 1.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    lowest = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def keep_min_p(logits: jax.Array, min_p: float) -> jax.Array:
    """Keeps the tokens of each row that are at least `min_p` times as likely as its likeliest.

    Args:
      logits: (B, V) float32.
      min_p: above 0 and at most 1.
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits - highest >= jnp.log(min_p), logits, -jnp.inf)


def filtered(logits: jax.Array, *, settings: Sampling) -> jax.Array:
    """The logits that `sample` draws from at a temperature above 0: (B, V) to (B, V) float32."""
    logits = logits.astype(jnp.float32) / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p:
        logits = keep_min_p(logits, settings.min_p)
    return logits


def sample(logits: jax.Array, keys: jax.Array, *, settings: Sampling) -> jax.Array:
    """The next token of each row.

    Args:
      logits: (B, V), any float dtype; the arithmetic is float32.
      keys: (B,) typed random keys, one a row, so that a row's draw does not depend on its neighbours.
      settings: how to draw; static under jit.

    Returns:
      (B,) int32.
    """
    if settings.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = jax.vmap(jax.random.categorical)(keys, filtered(logits, settings=settings))
    return draws.astype(jnp.int32)
