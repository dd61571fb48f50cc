"""Which store each row of a run comes from: a weighted mixture computed from the row's number alone.

Stores are the leaves of a binary tree. At a node that sends the share p of its rows to the left, the first r rows
hold round(r p) left ones: an evenly spread pattern (Bresenham's line) whose counts are known for any r without walking
there. So a row's store, its number among that store's rows, and a store's count after any number of rows all take one
pass down the tree. Splitting near the middle of the weight keeps the tree shallow for heavy stores; at every
prefix, not only at the end, a store's count is within a row or two of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_BITS = 31  # shares are multiples of 2**-31, so that a row number's remainder times a share fits in 62 bits


class Assigned(NamedTuple):
    """Rows of the run given to stores.

    Attributes:
      stores: (n,) int64, index into `Mixture.names`.
      rows: (n,) int64, how many earlier rows of the run went to the same store.
    """

    stores: np.ndarray
    rows: np.ndarray


class _Node(NamedTuple):
    share: int  # of rows that go left, times 2**_BITS
    left: _Node | int  # an int is a leaf: the store's index
    right: _Node | int


class Mixture:
    """Deals the rows of a run out to stores.

    Args:
      weights: Weight by store; need not sum to 1. Stores without weight get no rows.

    Attributes:
      names: The stores that get rows, sorted.
      weights: Their shares, in the same order. They sum to 1.

    Raises:
      ValueError: A weight is negative or not finite, or all are zero.
    """

    def __init__(self, weights: Mapping[str, float]):
        if not all(0 <= weight < float("inf") for weight in weights.values()) or not sum(weights.values()) > 0:
            raise ValueError(
                f"the mixture {dict(weights)} needs weights of zero and more, at least one of them positive"
            )
        self.names = tuple(sorted(name for name, weight in weights.items() if weight > 0))
        given = [float(weights[name]) for name in self.names]
        total = sum(given)
        # Shares that sum to 1 already stay to the bit, so that a recorded mixture can be written into a config.
        self.weights = tuple(given if abs(total - 1) < 1e-9 else (weight / total for weight in given))
        heavy_first = sorted(range(len(self.names)), key=lambda store: -self.weights[store])
        self._tree = self._grow(heavy_first)

    def assign(self, rows: np.ndarray) -> Assigned:
        """The stores of rows (n,) int64 of the run, in any order."""
        out = Assigned(stores=np.zeros(rows.size, np.int64), rows=np.zeros(rows.size, np.int64))

        def descend(node: _Node | int, places: np.ndarray, numbers: np.ndarray) -> None:
            if isinstance(node, int):
                out.stores[places], out.rows[places] = node, numbers
            elif places.size:
                before = _left_of(numbers, node.share)
                left = _left_of(numbers + 1, node.share) > before
                descend(node.left, places[left], before[left])
                descend(node.right, places[~left], (numbers - before)[~left])

        descend(self._tree, np.arange(rows.size), rows.astype(np.int64))
        return out

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows of the run each store gives."""
        out: dict[str, int] = {}

        def descend(node: _Node | int, number: int) -> None:
            if isinstance(node, int):
                out[self.names[node]] = number
            else:
                left = int(_left_of(np.int64(number), node.share))
                descend(node.left, left)
                descend(node.right, number - left)

        descend(self._tree, rows)
        return out

    def _grow(self, stores: Sequence[int]) -> _Node | int:
        if len(stores) == 1:
            return stores[0]
        sums = np.cumsum([self.weights[store] for store in stores])
        cut = 1 + int(np.argmin(np.abs(sums[:-1] - sums[-1] / 2)))
        share = round(sums[cut - 1] / sums[-1] * 2**_BITS)
        share = min(max(share, 1), 2**_BITS - 1)  # the smallest weight still gets a row some time
        return _Node(share=share, left=self._grow(stores[:cut]), right=self._grow(stores[cut:]))


def _left_of(rows: np.ndarray | np.int64, share: int) -> np.ndarray:
    """round(rows * share / 2**_BITS) in exact integers: whole periods of 2**_BITS rows apart, nothing overflows."""
    whole, part = rows >> _BITS, rows & (2**_BITS - 1)
    return np.asarray(whole * share + ((part * share + 2 ** (_BITS - 1)) >> _BITS))
