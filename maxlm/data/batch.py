"""What a step reads: one batch of token rows.

Shapes: B rows of the batch (or of a part of it), S positions in a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Token rows; NumPy arrays on the host, JAX arrays on devices, ShapeDtypeStructs where only shapes matter.

    Attributes:
      tokens: (B, S) int32, what the model reads; 0 at padding.
      targets: (B, S) int32, the token that follows; 0 at padding.
      segments: (B, S) int32, number of the document within its row from 1 on, 0 at padding. A token attends to its own
        segment. All 1 (but for padding) where documents are not masked.
      positions: (B, S) int32, from 0 on; they start anew with every segment.
      weights: (B, S) float32, 1 where the target counts; 0 where it is padding or belongs to another document than the
        token, whether documents are masked or not: nothing in a document foretells which one comes next.
    """

    tokens: Any
    targets: Any
    segments: Any
    positions: Any
    weights: Any


def empty_batch(rows: int, sequence_length: int) -> Batch:
    """A batch of nothing but padding, to be filled in."""
    shape = (rows, sequence_length)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
    )


def join_documents(batch: Batch) -> Batch:
    """The batch with each row as one segment, positions 0 to S - 1; tokens, targets and weights stay."""
    rows, length = batch.segments.shape
    return batch._replace(
        segments=np.minimum(np.asarray(batch.segments), 1),
        positions=np.repeat(np.arange(length, dtype=np.int32)[None], rows, axis=0),
    )
