"""A seeded permutation of 0 … n-1 that is computed one element at a time, in constant memory.

A generalised Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains",
method 3): an index is written as two digits of a grid just larger than n, the digits are stirred into each other by a
keyed hash, and what lands outside 0 … n-1 goes through again. It is vectorised over indexes, each with its own keys,
so that a batch that lies across epochs is one call.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

ROUNDS = 8  # 64 bytes of keys, one BLAKE2b digest. Luby and Rackoff 1988 want 4; 8 also stirs grids of a few cells.
# Odd multipliers of the murmur3 finalizer (Appleby 2011).
_MULTIPLIERS = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))


def round_keys(*parts: str | int) -> np.ndarray:
    """The keys (ROUNDS,) uint64 of the permutation that `parts` name: other parts, an unrelated permutation."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permute(index: np.ndarray, size: int, *, keys: np.ndarray) -> np.ndarray:
    """Where each index goes under its permutation of 0 … size-1.

    Args:
      index: (n,) integers in 0 … size-1.
      size: What is permuted, under 2**62.
      keys: (n, ROUNDS) or (ROUNDS,) uint64 from `round_keys`.

    Returns:
      (n,) int64 in 0 … size-1; two indexes with the same keys never share a value.
    """
    keys = np.broadcast_to(keys, (index.size, ROUNDS))
    height = math.isqrt(size - 1) + 1
    grid = (np.uint64(height), np.uint64(-(-size // height)))
    out = _stir(index.astype(np.uint64), grid, keys)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _stir(out[outside], grid, keys[outside])
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _stir(value: np.ndarray, grid: tuple[np.uint64, np.uint64], keys: np.ndarray) -> np.ndarray:
    """One pass through the network: a bijection of the height × width cells of the grid."""
    digits = list(np.divmod(value, grid[1]))
    for number in range(ROUNDS):
        side = number % 2
        stirred = digits[1 - side] + keys[:, number]
        stirred *= _MULTIPLIERS[0]
        stirred ^= stirred >> np.uint64(32)
        stirred *= _MULTIPLIERS[1]
        stirred >>= np.uint64(2)  # leaves room for the digit: a sum that wrapped at 2**64 would not be invertible
        stirred += digits[side]
        stirred %= grid[side]
        digits[side] = stirred
    return digits[0] * grid[1] + digits[1]
