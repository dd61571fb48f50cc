"""What a query sees: the description of a mask that every attention back end takes.

Shapes: B batch, S query positions, T key positions, H query heads.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Finite, so that a row that sees nothing gets an average instead of NaN; far below any score.
MASKED = -1e30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segments_q", "segments_k", "q_offset", "sinks", "slopes"],
    meta_fields=["scale", "window", "softcap"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """What a query sees and how scores are formed. A pytree: arrays are leaves, the rest is static.

    A key is seen if it does not come after the query, lies fewer than `window` positions before it, and has the same
    segment. Positions are row indexes, query i standing at `q_offset + i` among the keys.
    """

    scale: float  # factor on q·k
    window: int = 0  # positions seen, the query's own included; 0: all
    softcap: float = 0.0  # scores become c*tanh(score/c); 0: left alone
    segments_q: jax.Array | None = None  # (B, S) int32; None: one document
    segments_k: jax.Array | None = None  # (B, T) int32
    q_offset: jax.Array | int | None = None  # () int32, in decoding; None: 0
    sinks: jax.Array | None = None  # (H,) float32: a logit a head that joins the softmax's sum and has no value
    slopes: jax.Array | None = None  # (H,) float32: a position of distance takes so much off a (capped) score (ALiBi)


def visible(mask: Mask, queries: int, keys: int) -> jax.Array:
    """Which keys each query sees: bool (B or 1, S, T)."""
    q, k = _places(mask, queries, keys)
    seen = (k <= q)[None]
    if mask.window:
        seen &= q - k < mask.window
    if mask.segments_q is not None and mask.segments_k is not None:
        seen &= mask.segments_q[:, :, None] == mask.segments_k[:, None, :]
    return seen


def biases(mask: Mask, slopes: jax.Array, queries: int, keys: int) -> jax.Array:
    """What heads with these slopes (...) add to their scores: (..., S, T) float32 (Press et al. 2022)."""
    q, k = _places(mask, queries, keys)
    return slopes[..., None, None] * -jnp.abs(q - k).astype(jnp.float32)


def _places(mask: Mask, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Where queries (S, 1) and keys (1, T) stand among the keys."""
    offset = 0 if mask.q_offset is None else mask.q_offset
    return (offset + jnp.arange(queries))[:, None], jnp.arange(keys)[None, :]


def static(mask: Mask) -> Mask:
    """The mask without its arrays: hashable, and a constant of the program."""
    return dataclasses.replace(mask, segments_q=None, segments_k=None, q_offset=None, sinks=None, slopes=None)


def with_sinks(out: jax.Array, normaliser: jax.Array, *, sinks: jax.Array | None) -> jax.Array:
    """Attention's result with a logit a head joined to the sum that it was divided by.

    Args: out (B, S, H, v); normaliser (B, S, H) float32, log of the sum of exp(score); sinks (H,) or None.
    """
    if sinks is None:
        return out
    share = jax.nn.sigmoid(normaliser - sinks.astype(jnp.float32))
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)
