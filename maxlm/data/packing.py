"""Rows of S tokens out of a split's documents, in two ways, both pure functions of (document offsets, S).

`split`: the documents, each with its begin token, lie one after another in store order and are cut every S tokens.
Row i reads tokens iS … iS+S-1 and predicts tokens iS+1 … iS+S, so that every token but the begin tokens is a target
that counts exactly once in an epoch. Needs no plan.

`pack`: whole documents are put together in rows by best-fit decreasing (Johnson 1974); a document longer than S is cut
every S tokens first. A token that begins a later piece is also the target of the last position of the piece before,
so the same holds here. The plan is kept beside the store.

Shapes: n rows asked for, S positions in a row, P pieces.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
import zipfile
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from maxlm.data.batch import Batch

PACKER_VERSION = 1  # changes when the same documents would come to lie in other rows
_STALE_SECONDS = 3600.0  # no plan takes so long to write: the process that wrote it is gone

_log = logging.getLogger(__name__)


class Split(Protocol):
    """What rows are made from: the tokens of a store's split, by their index over all shards."""

    num_tokens: int
    offsets: np.ndarray  # (documents + 1,) int64, where each document begins, and the end

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, int32."""


class Rows(Protocol):
    """A split cut into rows.

    Attributes:
      num_rows: Rows in an epoch.
      fill: Share of their positions that hold a token.
    """

    num_rows: int
    fill: float

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows (n,) int64 with documents as segments."""


class PackPlan(NamedTuple):
    """Where each piece of a document lies.

    Attributes:
      row_offsets: (rows + 1,) int64, index of each row's first piece, and the end.
      starts: (P,) int64, first token of each piece.
      lengths: (P,) int32, its tokens, at most S.
    """

    row_offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class _Runs(NamedTuple):
    """Pieces of documents that make up rows, row after row.

    Attributes:
      counts: (n,) int64, runs of each row, at least one.
      starts: (P,) int64, first token of each run.
      lengths: (P,) int64, its tokens. A run is inside one document, and ends with it unless it ends with a full row.
    """

    counts: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class SplitRows:
    """Documents joined in store order and cut every S tokens."""

    def __init__(self, split: Split, sequence_length: int):
        self._split = split
        self._length = sequence_length
        targets = max(0, split.num_tokens - 1)
        self.num_rows = -(-targets // sequence_length)
        self.fill = targets / max(1, self.num_rows * sequence_length)

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows (n,) int64; the last row of the split is padded at its end."""
        split, offsets = self._split, self._split.offsets
        starts = rows * self._length
        stops = np.minimum(starts + self._length, split.num_tokens)
        first = np.searchsorted(offsets, starts, side="right")
        counts = np.searchsorted(offsets, stops) - first + 1
        begins = np.maximum(offsets[_ranges(first - 1, counts)], np.repeat(starts, counts))
        ends = np.minimum(offsets[_ranges(first, counts)], np.repeat(stops, counts))
        tokens = np.zeros((rows.size, self._length + 1), np.int32)
        # Reading row by row is not where the time goes: a few microseconds each.
        for row, start in zip(tokens, starts.tolist(), strict=True):
            stop = min(start + self._length + 1, split.num_tokens)
            row[: stop - start] = split.read(start, stop)
        return _lay_out(_Runs(counts, begins, ends - begins), tokens, offsets=offsets)


class PackRows:
    """Whole documents put together in rows, after a plan."""

    def __init__(self, split: Split, sequence_length: int, *, plan: PackPlan):
        self._split = split
        self._length = sequence_length
        self._plan = plan
        self.num_rows = plan.row_offsets.size - 1
        self.fill = float(plan.lengths.sum()) / max(1, self.num_rows * sequence_length)

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows (n,) int64; what pieces leave free at a row's end is padding."""
        first = self._plan.row_offsets[rows]
        counts = self._plan.row_offsets[rows + 1] - first
        pieces = _ranges(first, counts)
        runs = _Runs(counts, self._plan.starts[pieces], self._plan.lengths[pieces].astype(np.int64))
        tokens = np.zeros((rows.size, self._length + 1), np.int32)
        row_of_run = np.repeat(np.arange(rows.size), counts)
        before = np.cumsum(runs.lengths) - runs.lengths
        columns = before - before[np.repeat(np.cumsum(counts) - counts, counts)]
        # A full row's last target is the token behind it, read with it. Elsewhere that token does not count.
        stops = np.minimum(runs.starts + runs.lengths + (runs.lengths == self._length), self._split.num_tokens)
        for row, column, start, stop in zip(
            row_of_run.tolist(), columns.tolist(), runs.starts.tolist(), stops.tolist(), strict=True
        ):
            tokens[row, column : column + stop - start] = self._split.read(start, stop)
        return _lay_out(runs, tokens, offsets=self._split.offsets)


def _lay_out(runs: _Runs, tokens: np.ndarray, *, offsets: np.ndarray) -> Batch:
    """The batch whose rows hold `runs` one after another, padded at the end.

    Args:
      runs: Of n rows.
      tokens: (n, S + 1) int32, inputs and behind them the last target.
      offsets: Where documents begin, and the end.
    """
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    tails = np.cumsum(runs.counts) - 1  # each row's last run
    heads = tails + 1 - runs.counts
    row_of_run = np.repeat(np.arange(rows), runs.counts)
    # Each row gets one more run, its padding, so that the runs cover the (n S) places of the batch.
    place = np.arange(runs.lengths.size) + row_of_run
    sizes = np.zeros(runs.lengths.size + rows, np.int64)
    sizes[place] = runs.lengths
    sizes[tails + 1 + np.arange(rows)] = length - np.add.reduceat(runs.lengths, heads)
    numbers = np.zeros(sizes.size, np.int32)
    numbers[place] = np.arange(1, runs.lengths.size + 1) - heads[row_of_run]
    ends = np.cumsum(sizes)

    segments = np.repeat(numbers, sizes)
    filled = segments > 0
    positions = np.arange(rows * length, dtype=np.int32)
    positions -= np.repeat((ends - sizes).astype(np.int32), sizes)
    positions *= filled
    weights = filled.astype(np.float32)
    # A run's last token has no target that counts, unless its document goes on, which only a full row's last one can.
    weights[ends[place] - 1] = 0
    stops = runs.starts[tails] + runs.lengths[tails]
    weights = weights.reshape(rows, length)
    weights[offsets[np.searchsorted(offsets, stops)] != stops, -1] = 1
    return Batch(
        tokens=np.ascontiguousarray(tokens[:, :-1]),
        targets=np.ascontiguousarray(tokens[:, 1:]),
        segments=segments.reshape(rows, length),
        positions=positions.reshape(rows, length),
        weights=weights,
    )


def make_rows(split: Split, sequence_length: int, *, packing: str, cache: Path | None, fingerprint: str) -> Rows:
    """Cuts a split into rows.

    Args:
      split: The documents.
      sequence_length: Positions S of a row.
      packing: `split` or `pack`.
      cache: Folder in which plans are kept; None: they are made each time.
      fingerprint: Of the documents; a plan is found again by it.
    """
    if packing == "split":
        return SplitRows(split, sequence_length)
    path = cache / f"pack-v{PACKER_VERSION}-{sequence_length}-{fingerprint[:16]}.npz" if cache else None
    plan = _load(path) if path else None
    if plan is None:
        plan = plan_packing(split.offsets, sequence_length)
        if path:
            _save(path, plan)
    return PackRows(split, sequence_length, plan=plan)


def plan_packing(offsets: np.ndarray, sequence_length: int) -> PackPlan:
    """Deals pieces of at most S tokens out to rows by best-fit decreasing.

    Args:
      offsets: (documents + 1,) int64, where each document begins, and the end.
      sequence_length: Positions S of a row.

    Returns:
      Rows in the order in which they were opened, in each its pieces from the longest to the shortest. A piece that
      would predict nothing (a document's last token alone, or a document that is only its begin token) is left out.
    """
    sizes = np.diff(offsets)
    counts = -(-np.maximum(sizes - 1, 0) // sequence_length)  # as many as its targets need
    document = np.repeat(np.arange(sizes.size), counts)
    passed = _ranges(np.zeros(sizes.size, np.int64), counts) * sequence_length
    starts = offsets[document] + passed
    lengths = np.minimum(sizes[document] - passed, sequence_length)

    longest_first = np.argsort(-lengths, kind="stable")
    rows = _best_fit(lengths[longest_first], sequence_length)
    order = longest_first[np.argsort(rows, kind="stable")]
    row_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows))])
    return PackPlan(row_offsets=row_offsets, starts=starts[order], lengths=lengths[order].astype(np.int32))


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row (P,) int64 of each piece: the fullest one that still has room for it, or a new one.

    Pieces of one length and rows with the same room are handled at once: the tightest row with room for a piece stays
    the tightest for the next of that length until it has none, so it takes room // length of them. That is exactly what
    one piece after another would give, in a few steps a length. The rooms that exist are bits of one integer.
    """
    out = np.empty(lengths.size, np.int64)
    open_rows: dict[int, list[np.ndarray]] = {}
    rooms = 0
    num_rows = 0
    edges = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1)).tolist()
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        length = int(lengths[begin])
        while begin < end:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length
            needed = -((begin - end) // each)
            if fitting:
                rooms ^= 1 << room
                rows = np.concatenate(open_rows.pop(room))
            else:
                rows = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            used, unused = rows[:needed], rows[needed:]
            placed = min(each * used.size, end - begin)
            out[begin : begin + placed] = np.repeat(used, each)[:placed]
            begin += placed
            short = each * used.size - placed  # pieces by which the last row holds fewer than the others
            whole = used.size - (short > 0)
            for group, left in (
                (unused, room),
                (used[:whole], room - each * length),
                (used[whole:], room - (each - short) * length),
            ):
                if group.size and left:
                    open_rows.setdefault(left, []).append(group)
                    rooms |= 1 << left
    return out


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[i], starts[i] + 1, … counts[i] times, for each i, one after another; int64."""
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(starts - (ends - counts), counts)


def _load(path: Path) -> PackPlan | None:
    """The plan that was kept, or None where there is none or it is damaged (members of an npz carry a CRC)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return PackPlan(**{name: file[name] for name in PackPlan._fields})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("the packing plan %s cannot be read (%s) and is made again", path, error)
        return None


def _save(path: Path, plan: PackPlan) -> None:
    """Keeps a plan: written beside its place and moved into it, so that no reader sees half of one."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        for left in path.parent.glob("*.tmp"):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                _log.warning("removed %s, which was left when writing it was interrupted", left)
                left.unlink()
        with temporary.open("xb") as file:
            np.savez(file, **plan._asdict())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a store may be read-only or its disk full: the plan is as good from memory
        _log.warning(
            "the packing plan could not be kept in %s (%s); it is made anew at every start", path.parent, error
        )
        with contextlib.suppress(OSError):
            temporary.unlink()
