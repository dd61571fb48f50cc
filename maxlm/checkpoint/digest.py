"""Digests of arrays, computed where the arrays live and equal on every mesh.

Each element's bits and its position in the array are hashed together, and the hashes are summed modulo 2^32. A sum
does not ask in which order or on which device its terms were added, so a digest does not depend on the sharding, the
number of devices or the number of processes. Two lanes with independent constants make 64 bits. The finaliser is
the bias-searched 32-bit one of https://github.com/skeeto/hash-prospector ("lowbias32"). A lane is a bijection of
an element's bits at a given position, so one altered element always shows; several altered ones go unseen with a
probability of about 2^-64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

POSITIONS = 2**30  # elements that the lower position word tells apart


class _Lane(NamedTuple):
    """Odd multipliers of one lane, and the seed of its upper position word."""

    bits: int
    position: int
    seed: int


# The determinant bits0 * position1 - bits1 * position0 is 4 times an odd number. Two elements trade places unseen in
# both lanes only if it vanishes modulo 2^32 when multiplied by the difference of their lower position words, which
# takes a difference of 2^30: hence POSITIONS.
_LANES = (_Lane(0x9E3779B1, 0x85EBCA77, 0x165667B1), _Lane(0xC2B2AE3D, 0x27D4EB2F, 0xD3A2646C))


def array_paths(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by path (`params/layers/mlp/up`, `opt_state/0/mu/...`), in the order of its leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest_array(x: jax.Array) -> jax.Array:
    """The digest of one array.

    Args:
        x: float, integer or bool array of any shape, sharded in any way.

    Returns:
        uint32 (2,). Signed zeros and the payloads of NaNs count: the bits are hashed, not the values.

    Raises:
        TypeError: for complex numbers, PRNG keys and other dtypes whose bits cannot be read as words.
    """
    return digest_block(x, (0,) * x.ndim, shape=x.shape)


def digest_block(x: jax.Array, start: Sequence[int | jax.Array] | jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    """What a block adds to the digest of its array: the blocks that make up an array have its digest as their sum.

    Args:
        x: a block of the array; the rest is as for `digest_array`.
        start: where the block begins, an index for each dim, as uint32 if they are traced.
        shape: of the whole array.
    """
    words = _words(x)
    extra = words.shape[x.ndim :]  # 64-bit elements are two words
    begin = (*start, *(0 for _ in extra))
    lower, upper = _positions(words.shape, begin, shape + extra, POSITIONS)
    hashes = []
    for lane in _LANES:
        mixed = words * jnp.uint32(lane.bits) + lower * jnp.uint32(lane.position)
        if upper is not None:
            mixed = mixed + _finalise(upper + jnp.uint32(lane.seed))
        hashes.append(_finalise(mixed))
    # One reduction over both lanes: XLA:CPU fuses the hashing into a variadic reduction, while two plain sums
    # were seen to write the hashes to memory first and take four times as long.
    zero = jnp.uint32(0)
    sums = lax.reduce(tuple(hashes), (zero, zero), _add_lanes, tuple(range(words.ndim)))
    return jnp.stack(sums)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32; 64-bit elements become a last axis of two words."""
    dtype = x.dtype
    if jnp.issubdtype(dtype, jnp.bool_) or (jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize <= 4):
        return x.astype(jnp.uint32)  # wraps, so that every value keeps bits of its own
    if jnp.issubdtype(dtype, jnp.integer) or (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in (4, 8)):
        return lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits in (8, 16):
        return lax.bitcast_convert_type(x, f"uint{jnp.finfo(dtype).bits}").astype(jnp.uint32)
    raise TypeError(
        f"cannot digest an array of dtype {dtype}: expected bool, integers or floats of 8 to 64 bits; "
        "store a PRNG key as jax.random.key_data(key) and a complex array as its real and imaginary parts"
    )


def _positions(
    block: tuple[int, ...], start: Sequence[int | jax.Array], shape: tuple[int, ...], limit: int
) -> tuple[jax.Array, jax.Array | None]:
    """Row-major index in an array of `shape` of each element of a block, as two uint32 words that broadcast to it.

    The lower word counts within the trailing axes that hold at most `limit` elements, the upper one over the leading
    axes; without leading axes it is None.
    """
    split = len(shape)
    while split > 0 and math.prod(shape[split - 1 :]) <= limit:
        split -= 1

    def index(first: int, stop: int) -> jax.Array:
        """Over the axes [first, stop), modulo 2^32."""
        found = jnp.zeros((1,) * len(shape), jnp.uint32)
        for axis in range(first, stop):
            ones = tuple(size if i == axis else 1 for i, size in enumerate(block))
            stride = math.prod(shape[axis + 1 : stop]) % 2**32
            found = found + (lax.broadcasted_iota(jnp.uint32, ones, axis) + start[axis]) * jnp.uint32(stride)
        return found

    return index(split, len(shape)), index(0, split) if split else None


def _finalise(x: jax.Array) -> jax.Array:
    """A bijection of uint32 under which every input bit moves about half of the output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _add_lanes(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return left[0] + right[0], left[1] + right[1]
