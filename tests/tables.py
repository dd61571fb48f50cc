"""A family's table applied to whole models in memory, where `convert` works in pieces: what tests compare with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxlm import tree
from maxlm.model.table import BoundRow


def to_ours(rows: Sequence[BoundRow], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters (nested dict) from all of their tensors, in memory."""
    out: dict[str, Any] = {}
    for bound in rows:
        parts = [bound.ours(tensors[name]) for name, _ in bound.tensors()]
        leading = tuple(len(values) for values in bound.numbers.values())
        for piece in bound.row.pieces:
            stacked = np.stack([part[piece.ours] for part in parts])
            out[piece.ours] = stacked.reshape(leading + stacked.shape[1:])
    return tree.from_paths(out)


def to_theirs(rows: Sequence[BoundRow], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors by name from our parameters (nested dict of arrays), in memory."""
    flat = {path: np.asarray(value) for path, value in tree.paths(params).items()}
    return {
        name: np.ascontiguousarray(bound.theirs({p.ours: flat[p.ours][index] for p in bound.row.pieces}))
        for bound in rows
        for name, index in bound.tensors()
    }
