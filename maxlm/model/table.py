"""The table language: how a family's tensors correspond to ours, one declaration read in both directions.

A table is a list of rows. A row describes one tensor of theirs, or one a layer and expert where its name has the
placeholders `{layer}` and `{expert}`, as a rearrangement of one of our parameters or of several that lie side by side
in it. Rearrangements are written as in einops, our dims first:

    row("model.layers.{layer}.self_attn.q_proj.weight", "layers/attention/query", "D H h -> (H h) D")

Letters are dims, parentheses dims that are one dim of the array, `1` a dim of size one. The axes `layers` and `expert`
of our parameter are left out of the form where the name has their placeholder: they tell which tensor it is. Fused
tensors join pieces along a dim, which may be taken apart again afterwards (here: gate and up in turn):

    joined(".. .gate_up_proj", {"layers/mlp/gate": "D F -> D F 1", "layers/mlp/up": "D F -> D F 1"}, axis=2,
           form="D F n -> D (F n)")

A table moves elements and never computes with them, so that there and back is the identity, bit for bit, in every
dtype. What would need arithmetic belongs into the model: a norm whose scale is 1 + w is a kind of norm with the
parameter w (1 + w in float32 would not give w back).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maxlm import tree
from maxlm.model.param import ParamSpec

PLACEHOLDERS = {"layer": "layers", "expert": "expert"}
"""Placeholder in a name of theirs -> our logical axis that it counts along."""

_SQUARE = 128  # elements along a side

Shape = tuple[int, ...]
Dims = tuple[tuple[str, ...], ...]  # one group of letters a dim of an array


class TableError(ValueError):
    """A family's table does not fit its model; a mistake in the family's file, not of a user."""


class Piece(NamedTuple):
    """One of our parameters, by path, and the rearrangement of its dims."""

    ours: str
    form: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor of theirs, for each layer and expert that its name has placeholders for. Made by `row` and `joined`.

    theirs: the name.
    pieces: in their order along `axis`; a single piece has axis 0.
    form: rearranges the joined pieces; empty: they stay as they are.
    sizes: of letters that the shapes leave open.
    layers: their number of each of our layers, for a stack that does not begin at 0; None: 0, 1, 2, …
    """

    theirs: str
    pieces: tuple[Piece, ...]
    axis: int
    form: str
    sizes: Mapping[str, int]
    layers: Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class Table:
    """A family's correspondence; every parameter of the model is in exactly one row.

    copies: name of theirs -> the name that it repeats (a tied head written out): checked on reading, never written.
    repeats: the same, but always written: files are expected to hold such copies.
    ignored: patterns of names that carry no weights (rotary frequencies, masks): skipped, never written.
    outer: what old files leave out at the beginning of all names, with its dot; it is always written.
    precise: endings of our paths that keep their precision where the weights are written in a narrower dtype. A bias of
      the choice of experts was moved in steps of a thousandth, which bfloat16 does not have at 1.
    """

    rows: tuple[Row, ...]
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    repeats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    outer: str = ""
    precise: tuple[str, ...] = ("/selection_bias",)


def row(
    theirs: str,
    ours: str,
    form: str = "",
    *,
    sizes: Mapping[str, int] | None = None,
    layers: Sequence[int] | None = None,
) -> Row:
    """A tensor that is one of our parameters; without a form, as it is."""
    return Row(theirs=theirs, pieces=(Piece(ours, form),), axis=0, form="", sizes=sizes or {}, layers=layers)


def joined(
    theirs: str,
    ours: Mapping[str, str],
    *,
    axis: int,
    form: str = "",
    sizes: Mapping[str, int] | None = None,
    layers: Sequence[int] | None = None,
) -> Row:
    """A tensor in which several of our parameters (path -> form) lie side by side along `axis`."""
    pieces = tuple(Piece(*item) for item in ours.items())
    return Row(theirs=theirs, pieces=pieces, axis=axis, form=form, sizes=sizes or {}, layers=layers)


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """A form at given sizes: a reshape, a transposition and a reshape.

    before, after: the letters of each dim on either side. sizes: of every letter.
    """

    before: Dims
    after: Dims
    sizes: Mapping[str, int]

    def there(self, x: np.ndarray) -> np.ndarray:
        """From the left side of the form to the right."""
        return self._move(x, self.before, self.after)

    def back(self, y: np.ndarray) -> np.ndarray:
        """The inverse of `there`."""
        return self._move(y, self.after, self.before)

    def resized(self, letter: str, size: int) -> Rearrangement:
        """The same with another size of one letter."""
        return dataclasses.replace(self, sizes={**self.sizes, letter: size})

    @property
    def shape(self) -> Shape:
        """What `there` returns."""
        return _shape(self.after, self.sizes)

    def _move(self, x: np.ndarray, source: Dims, target: Dims) -> np.ndarray:
        letters, wanted = [*itertools.chain(*source)], [*itertools.chain(*target)]
        apart = x.reshape([self.sizes[letter] for letter in letters])
        return _transposed(apart, [letters.index(letter) for letter in wanted]).reshape(_shape(target, self.sizes))


@dataclasses.dataclass(frozen=True)
class BoundRow:
    """A row with the shapes of a model filled in.

    views: one a piece. whole: of the joined pieces. cuts: where they are cut apart along the row's axis.
    numbers: of each placeholder in the name, its value for each of our indices.
    """

    row: Row
    views: tuple[Rearrangement, ...]
    whole: Rearrangement
    cuts: tuple[int, ...]
    numbers: Mapping[str, Sequence[int]]

    @property
    def shape(self) -> Shape:
        """Of a tensor of theirs."""
        return self.whole.shape

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """(name of theirs, index into the leading axes of our parameters) for every tensor, layer by layer."""
        for index in itertools.product(*(range(len(values)) for values in self.numbers.values())):
            values = {key: self.numbers[key][i] for key, i in zip(self.numbers, index, strict=True)}
            yield self.row.theirs.format(**values), index

    def apart(self) -> Iterator[tuple[int, BoundRow]]:
        """(first row in the tensor, the piece as a row of its own) where the pieces lie one below the other in it, or
        (0, this row) where they do not.
        """
        if self.row.form or (len(self.views) > 1 and self.row.axis):
            yield 0, self
            return
        for start, piece, view in zip((0, *self.cuts), self.row.pieces, self.views, strict=True):
            as_it_is = Rearrangement(view.after, view.after, view.sizes)
            row = dataclasses.replace(self.row, pieces=(piece,), axis=0)
            yield start, BoundRow(row, (view,), as_it_is, (), self.numbers)

    def ours(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Our part of each parameter, by path, from one tensor of theirs."""
        parts = np.split(self.whole.back(tensor), self.cuts, axis=self.row.axis)
        return {
            piece.ours: view.back(part) for piece, view, part in zip(self.row.pieces, self.views, parts, strict=True)
        }

    def theirs(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tensor of theirs from our parts of the parameters."""
        pieces = [view.there(parts[piece.ours]) for piece, view in zip(self.row.pieces, self.views, strict=True)]
        return self.whole.there(np.concatenate(pieces, axis=self.row.axis) if len(pieces) > 1 else pieces[0])


def bind(table: Table, specs: Mapping[str, Any]) -> tuple[BoundRow, ...]:
    """The rows with the shapes of a model.

    Args:
      specs: nested dict with a ParamSpec a leaf (`split_model(config).specs`).

    Raises:
      TableError: the table does not cover the model's parameters exactly once, a form does not fit, or a name comes
        twice.
    """
    flat = tree.paths(specs)
    named = [piece.ours for row in table.rows for piece in row.pieces]
    problems = [f"{path} is in no row" for path in flat if path not in named]
    problems += [f"{path} is no parameter of the model" for path in dict.fromkeys(named) if path not in flat]
    problems += [f"{path} is in {named.count(path)} rows" for path in flat if named.count(path) > 1]
    if problems:
        raise TableError(f"the table does not fit the model: {'; '.join(problems)}")
    rows = tuple(_bind(row, flat) for row in table.rows)
    names = [name for row in rows for name, _ in row.tensors()]
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ():
        raise TableError(f"the table names {', '.join(sorted(twice))} more than once")
    return rows


def _bind(row: Row, flat: Mapping[str, ParamSpec]) -> BoundRow:
    placeholders = re.findall(r"\{(\w+)\}", row.theirs)
    axes = tuple(PLACEHOLDERS[name] for name in placeholders)
    try:
        views, leading = [], set()
        for piece in row.pieces:
            spec = flat[piece.ours]
            if spec.logical[: len(axes)] != axes:
                raise TableError(f"{piece.ours} has the axes {spec.logical}, expected {axes} first")
            leading.add(spec.shape[: len(axes)])
            views.append(_fit(piece.form, spec.shape[len(axes) :], row.sizes))
        if len(leading) > 1:
            raise TableError(f"its parameters have different numbers of layers or experts: {sorted(leading)}")
        joint = [list(view.shape) for view in views]
        cuts = tuple(itertools.accumulate(shape[row.axis] for shape in joint))[:-1] if len(joint) > 1 else ()
        for shape in joint[1:]:
            joint[0][row.axis] += shape[row.axis]
        whole = _fit(row.form, tuple(joint[0]), row.sizes)
    except TableError as error:
        raise TableError(f"the row {row.theirs}: {error}") from None
    counts = dict(zip(placeholders, leading.pop(), strict=True))
    numbers: dict[str, Sequence[int]] = {name: range(count) for name, count in counts.items()}
    if row.layers is not None:
        if len(row.layers) != counts.get("layer"):
            raise TableError(f"the row {row.theirs} numbers {len(row.layers)} layers of {counts.get('layer')}")
        numbers["layer"] = row.layers
    return BoundRow(row, tuple(views), whole, cuts, numbers)


def _fit(form: str, shape: Shape, known: Mapping[str, int]) -> Rearrangement:
    """The form at a shape; raises TableError when they do not go together."""
    form = form or (names := " ".join(f"d{i}" for i in range(len(shape)))) + f" -> {names}"
    left, _, right = form.partition("->")
    before, after = _parse(left), _parse(right)
    inner, outer = [*itertools.chain(*before)], [*itertools.chain(*after)]
    if len(set(inner)) < len(inner) or sorted(inner) != sorted(outer):
        raise TableError(f"the form {form!r} has to have every letter once on each side")
    if len(before) != len(shape):
        raise TableError(f"the form {form!r} does not fit the shape {shape}")
    sizes: dict[str, int] = {}
    for group, size in zip(before, shape, strict=True):
        unknown = [letter for letter in group if letter not in known]
        rest = math.prod(known[letter] for letter in group if letter in known)
        if len(unknown) > 1 or size % rest or (not unknown and rest != size):
            raise TableError(f"the form {form!r} does not fit the shape {shape} with {dict(known)}")
        sizes |= {letter: known.get(letter, size // rest) for letter in group}
    return Rearrangement(before, after, sizes)


def _transposed(x: np.ndarray, order: list[int]) -> np.ndarray:
    """x.transpose(order); where two groups of axes trade places, copied in squares that fit a cache: NumPy's own copy
    of a large transposed matrix takes three times as long.
    """
    turns = [i for i in range(1, len(order)) if order[i] != order[i - 1] + 1]
    if len(turns) != 1 or order[0] == 0 or x.size < _SQUARE**2:
        return x.transpose(order)
    flat = x.reshape(math.prod(x.shape[: order[0]]), -1).T
    out = np.empty(flat.shape, x.dtype)
    for i, j in itertools.product(range(0, flat.shape[0], _SQUARE), range(0, flat.shape[1], _SQUARE)):
        out[i : i + _SQUARE, j : j + _SQUARE] = flat[i : i + _SQUARE, j : j + _SQUARE]
    return out.reshape([x.shape[axis] for axis in order])


def _parse(side: str) -> Dims:
    groups = re.findall(r"\(([^()]*)\)|([^\s()]+)", side)
    return tuple(tuple(letter for letter in (many or single).split() if letter != "1") for many, single in groups)


def _shape(dims: Dims, sizes: Mapping[str, int]) -> Shape:
    return tuple(math.prod(sizes[letter] for letter in group) for group in dims)
