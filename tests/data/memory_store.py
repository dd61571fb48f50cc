"""Token stores in memory, in which every token is told from every other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class MemorySplit:
    """Token i of the split has the id first_id + i: a batch shows where each of its tokens comes from."""

    def __init__(self, lengths: Sequence[int], *, first_id: int = 1):
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])
        self.num_tokens = int(self.offsets[-1])
        self.first_id = first_id

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.num_tokens
        return np.arange(start, stop, dtype=np.int32) + self.first_id

    @property
    def legitimate(self) -> list[int]:
        """Ids of the tokens that are targets: all but each document's begin token."""
        return sorted(set(range(self.num_tokens)) - set(self.offsets.tolist()))


class MemoryStore:
    def __init__(self, lengths: Sequence[int], *, first_id: int = 1, path: Path | None = None):
        self.train = MemorySplit(lengths, first_id=first_id)
        self.path = path
        self.fingerprint = hashlib.sha256(repr((list(lengths), first_id)).encode()).hexdigest()

    def split(self, name: str) -> MemorySplit:
        assert name == "train"
        return self.train


def targets_of(batches: Sequence, split: MemorySplit) -> list[int]:
    """Token numbers of `split` that are targets with a weight, sorted, as often as they occur."""
    ids = np.concatenate([np.asarray(batch.targets)[np.asarray(batch.weights) > 0] for batch in batches])
    ids = ids[(ids >= split.first_id) & (ids < split.first_id + split.num_tokens)]
    return sorted((ids - split.first_id).tolist())
