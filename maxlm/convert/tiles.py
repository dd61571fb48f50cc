"""Tiles: pieces of a table's correspondence that fit into memory, whatever the size of the model.

A tile is some experts of one layer, one tensor, or rows of one tensor. On our side it is a block of each parameter in
the row, and the blocks of a parameter make up a regular grid, which is how they are stored.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from maxlm.model.table import BoundRow

TILE_BYTES = 2**25
"""Of a tensor of theirs in four-byte elements; several copies of a tile are in memory at once."""

Region = tuple[slice, ...]
ReadRows = Callable[[str, slice], np.ndarray]


class _Cut(NamedTuple):
    """The first letter of a tensor's first axis, along which it can be read in slabs.

    letter: in the row's `whole`. letters, axes: of each piece's view, the letter and our axis that begins with it.
    """

    letter: str
    letters: tuple[str, ...]
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tile:
    """names: the tensors of theirs. rows: which rows of each. regions: of each of our parameters, by path."""

    bound: BoundRow
    names: tuple[str, ...]
    rows: slice
    regions: Mapping[str, Region]
    slab: BoundRow  # `bound` for as many rows as these

    @property
    def elements(self) -> int:
        """Scalars in it."""
        return len(self.names) * int(np.prod(self.slab.shape))

    def ours(self, read: ReadRows) -> dict[str, np.ndarray]:
        """The blocks of our parameters, by path; `read` gives rows of a tensor by name."""
        parts = [self.slab.ours(read(name, self.rows)) for name in self.names]
        leading = len(self.bound.numbers)
        return {
            path: np.stack([part[path] for part in parts]).reshape(extent(region[:leading]) + parts[0][path].shape)
            for path, region in self.regions.items()
        }

    def theirs(self, blocks: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, rows of the tensor) from the blocks of our parameters."""
        leading = len(self.bound.numbers)
        flat = {path: block.reshape(-1, *block.shape[leading:]) for path, block in blocks.items()}
        for i, name in enumerate(self.names):
            yield name, self.slab.theirs({path: block[i] for path, block in flat.items()})


def tiles(bound: BoundRow) -> Iterator[Tile]:
    """The tiles of a row, each of at most TILE_BYTES where it can be cut; those of a piece in the order of tensors."""
    for first, part in bound.apart():
        yield from _tiles(part, first)


def _tiles(bound: BoundRow, first: int) -> Iterator[Tile]:
    """Of a row that begins at the row `first` of its tensors."""
    size = 4 * int(np.prod(bound.shape))
    cut = _cut(bound) if size > TILE_BYTES else None
    step = 1
    if cut:
        length = bound.whole.sizes[cut.letter]
        step = max(1, TILE_BYTES * length // size)
        spans = [(start, min(start + step, length)) for start in range(0, length, step)]
    axes = [len(values) for values in bound.numbers.values()]
    together = 1
    if "expert" in bound.numbers and size <= TILE_BYTES:
        together = min(axes[-1], max(1, TILE_BYTES // max(size, 1)))
    names = [name for name, _ in bound.tensors()]
    inner = axes[-1] if axes else 1
    for outer, begin in itertools.product(range(len(names) // inner), range(0, inner, together)):
        count = min(together, inner - begin)
        chosen = tuple(names[outer * inner + begin : outer * inner + begin + count])
        leads = [slice(int(i), int(i) + 1) for i in np.unravel_index(outer, axes[:-1])] if axes[:-1] else []
        leads += [slice(begin, begin + count)] if axes else []
        if cut is None:
            rows = slice(first, first + bound.shape[0]) if bound.shape else slice(0, 1)
            yield Tile(bound, chosen, rows, _regions(bound, leads), bound)
            continue
        height = bound.shape[0] // length
        for start, stop in spans:
            rows = slice(first + start * height, first + stop * height)
            yield Tile(
                bound, chosen, rows, _regions(bound, leads, cut, start, stop), _resized(bound, cut, stop - start)
            )


def chunks(bound: BoundRow) -> dict[str, tuple[int, ...]]:
    """The grid that the tiles of a row make of each of our parameters: the shape of its cells."""
    largest = [next(_tiles(part, first)) for first, part in bound.apart()]
    return {path: extent(region) for tile in largest for path, region in tile.regions.items()}


def extent(region: Region | list[slice]) -> tuple[int, ...]:
    """The shape of a region."""
    return tuple(part.stop - part.start for part in region)


def _cut(bound: BoundRow) -> _Cut | None:
    """Where the tensor's first axis begins with a letter that begins a dim of every piece, too."""
    if not bound.whole.after or not bound.whole.after[0]:
        return None
    letter = bound.whole.after[0][0]
    joint = next((axis for axis, group in enumerate(bound.whole.before) if group[:1] == (letter,)), None)
    if joint is None or (joint == bound.row.axis and len(bound.views) > 1):
        return None
    letters, axes = [], []
    for view in bound.views:
        first = view.after[joint][:1]
        axis = next((i for i, group in enumerate(view.before) if first and group[:1] == first), None)
        if axis is None or view.sizes[first[0]] != bound.whole.sizes[letter]:
            return None
        letters.append(first[0])
        axes.append(axis)
    return _Cut(letter, tuple(letters), tuple(axes))


def _resized(bound: BoundRow, cut: _Cut, size: int) -> BoundRow:
    views = tuple(view.resized(letter, size) for view, letter in zip(bound.views, cut.letters, strict=True))
    return dataclasses.replace(bound, views=views, whole=bound.whole.resized(cut.letter, size))


def _regions(
    bound: BoundRow, leads: list[slice], cut: _Cut | None = None, start: int = 0, stop: int = 0
) -> dict[str, Region]:
    regions = {}
    for i, (piece, view) in enumerate(zip(bound.row.pieces, bound.views, strict=True)):
        sizes = [int(np.prod([view.sizes[letter] for letter in group])) for group in view.before]
        region = [slice(0, size) for size in sizes]
        if cut:
            axis = cut.axes[i]
            unit = sizes[axis] // view.sizes[cut.letters[i]]
            region[axis] = slice(start * unit, stop * unit)
        regions[piece.ours] = (*leads, *region)
    return regions
