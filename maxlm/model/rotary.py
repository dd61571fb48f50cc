"""Rotary positions (Su et al. 2021) and the ways in which their frequencies are stretched to longer texts.

Shapes: B batch, S sequence, H heads, h head dim, p pairs of dims that are turned.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import RopeConfig
from maxlm.kernels.matmul import dot


def rotated_dims(rope: RopeConfig, head_dim: int) -> int:
    """How many of a head's dims are turned: the first ones; the others carry no position."""
    return int(rope.fraction * head_dim)


def rotary(
    x: jax.Array,
    rope: RopeConfig,
    *,
    positions: jax.Array,
    windowed: bool,
    longest: jax.Array | None = None,
    by_products: bool = False,
) -> jax.Array:
    """Turns pair i of a head's dims by position * frequency i.

    With `interleaved`, neighbours are a pair, and come out as the two halves: queries and keys are permuted alike, so
    that their products are the same.

    Args:
      x: (B, S, H, h) queries or keys; angles and products are float32, the result has x's dtype.
      positions: (B, S) int32.
      windowed: whether the layer sees a window only; such a layer may have a base of its own, which is not stretched.
      longest: int32, () or what spreads over (B, S): positions that the rows, or the row or document of each position,
        have or may come to have, by which longrope and dynamic go; None: as many as in pretraining.
      by_products: whether dims change places by products with matrices of zeros and ones (`pays_by_products`).
    """
    dims = rotated_dims(rope, x.shape[-1])
    if not dims:
        return x
    if windowed and rope.local_theta:
        bands, scale = jnp.asarray(_plain(rope.local_theta, dims), jnp.float32), 1.0
    else:
        bands, scale = _bands(rope, dims, longest), amplitude(rope)
    angles = positions.astype(jnp.float32)[:, :, None, None] * bands
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    if by_products:
        return _turned(rope.interleaved, x, cos, sin)
    turned, rest = x[..., :dims].astype(jnp.float32), x[..., dims:]
    if rope.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    parts = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype), rest]
    return jnp.concatenate(parts, axis=-1)


def pays_by_products(platform: str, dtype: Any) -> bool:
    """Whether dims had better change places by products: on a TPU, whose registers hold 128 of them side by side,
    halves of a head are dear to move, and such products, exact for finite numbers of 16 bits, are not."""
    return platform == "tpu" and jnp.dtype(dtype).itemsize == 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned(interleaved: bool, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x (B, S, H, h) turned by angles of these cosines and sines, float32 (B, S, 1, p): see `rotary`, by products."""
    own, other = _orders(interleaved, x.shape[-1], cos.shape[-1])
    by_own, by_other = _beside(cos, cos, x, 1.0), _beside(-sin, sin, x, 0.0)
    return (_moved(x, own) * by_own + _moved(x, other) * by_other).astype(x.dtype)


def _turned_forward(
    interleaved: bool, x: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _turned(interleaved, x, cos, sin), (cos, sin)


def _turned_backward(
    interleaved: bool, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None, None]:
    """Turned back. The gradient changes places before it is multiplied, while it has 16 bits."""
    cos, sin = kept
    own, other = map(np.argsort, _orders(interleaved, g.shape[-1], cos.shape[-1]))
    by_own, by_other = (_beside(a, b, g, rest, interleaved) for a, b, rest in ((cos, cos, 1.0), (sin, -sin, 0.0)))
    return (_moved(g, own) * by_own + _moved(g, other) * by_other).astype(g.dtype), None, None


_turned.defvjp(_turned_forward, _turned_backward)


def _orders(interleaved: bool, dims: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Which dim comes out where: the firsts of all pairs, their seconds, the rest; and with the seconds in front."""
    all_dims, turned = np.arange(dims), np.arange(2 * pairs)
    first, second = (turned[0::2], turned[1::2]) if interleaved else np.split(turned, 2)
    rest = all_dims[2 * pairs :]
    return np.concatenate([first, second, rest]), np.concatenate([second, first, rest])


def _moved(x: jax.Array, order: np.ndarray) -> jax.Array:
    """x[..., order] in float32."""
    if np.array_equal(order, np.arange(order.size)):
        return x.astype(jnp.float32)
    return dot("bsnh,hk->bsnk", x, jnp.asarray(np.eye(order.size)[:, order], x.dtype))


def _beside(first: jax.Array, second: jax.Array, x: jax.Array, rest: float, in_turn: bool = False) -> jax.Array:
    """Factors of the dims of x: of all pairs those of the first and the second dim, as halves or in turn; of the others
    `rest`."""
    both = jnp.stack([first, second], axis=-1) if in_turn else jnp.concatenate([first, second], axis=-1)
    both = both.reshape(*first.shape[:-1], -1)
    return jnp.pad(both, [(0, 0)] * 3 + [(0, x.shape[-1] - both.shape[-1])], constant_values=rest)


def amplitude(rope: RopeConfig) -> float:
    """What turned queries and keys are multiplied by: `attention_factor`, or what the method's paper advises."""
    if rope.attention_factor:
        return rope.attention_factor
    if rope.scaling == "yarn" and rope.factor > 1:
        return 0.1 * math.log(rope.factor) + 1.0  # Peng et al. 2023, equation 22
    if rope.scaling == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))  # Ding et al. 2024
    return 1.0


def frequencies(rope: RopeConfig, dims: int, *, long: bool = False) -> np.ndarray:
    """Radians a position for each pair of `dims` turned dims, float64 (p,); `long`: longrope's set for long rows."""
    plain = _plain(rope.theta, dims)
    match rope.scaling:
        case "none" | "dynamic":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            # By turns within the original length: few are stretched, many stay, those between are mixed in proportion.
            turns = rope.original_length * plain / (2 * math.pi)
            few, many = rope.turns
            kept = np.clip((turns - few) / (many - few), 0.0, 1.0)
            return plain * (kept + (1 - kept) / rope.factor)
        case "yarn":
            kept = 1 - _yarn_ramp(rope, dims)
            return plain * (kept + (1 - kept) / rope.factor)
        case "longrope":
            return plain / np.asarray(rope.long_factors if long else rope.short_factors)
        case other:
            raise ValueError(
                f"model.rope.scaling is {other!r}; it can be none, linear, dynamic, llama3, yarn or longrope"
            )


def _plain(theta: float, dims: int) -> np.ndarray:
    return theta ** (-np.arange(0, dims, 2) / dims)


def _bands(rope: RopeConfig, dims: int, longest: jax.Array | None) -> jax.Array:
    """Radians a position, (p,) or (B, S, 1, p) with a `longest` of each position; B and S may be 1."""
    if longest is not None and longest.ndim:
        longest = longest[:, :, None, None]
    if rope.scaling == "dynamic" and longest is not None:
        # Longer rows have a larger base (bloc97 and emozilla 2023), up to the original length that of pretraining.
        longer = jnp.maximum(longest / rope.original_length, 1.0)
        theta = rope.theta * (rope.factor * longer - (rope.factor - 1)) ** (dims / (dims - 2))
        return theta ** (-jnp.arange(0, dims, 2) / dims)
    short = jnp.asarray(frequencies(rope, dims), jnp.float32)
    if rope.scaling != "longrope" or longest is None:
        return short
    long = jnp.asarray(frequencies(rope, dims, long=True), jnp.float32)
    return jnp.where(longest > rope.original_length, long, short)


def _yarn_ramp(rope: RopeConfig, dims: int) -> np.ndarray:
    """From 0 for pairs that make the most turns in the original length to 1 at the fewest, linear in the pair."""

    def pair(turns: float) -> float:
        return dims * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    few, many = rope.turns
    low, high = pair(many), pair(few)
    if rope.whole_pairs:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    return np.clip((np.arange(dims // 2) - low) / (high - low or 0.001), 0.0, 1.0)
