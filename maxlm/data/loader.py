"""Batches by step: a pure function of (store fingerprints, seed, recorded phases and skips, step).

Nothing is iterated. A step lies in a phase and is batch number `step - from_step` of it (plus what skips passed over),
so its rows have numbers within the phase. The mixture deals these out to stores and tells each store's count; the
count gives the epoch and the place in it; the epoch's permutation gives the row. Any process can make any rows of any
step in any order.

A store goes on in the next phase where it stood, as long as the sequence length stays. Where that changes, rows are
cut anew and the store begins an epoch with a number that it never had: its tokens may come again before all were seen.

A run that goes back to an earlier step goes on behind all that it has consumed: each phase with its next batch, each
store with the row after its last (of that length). The steps are laid out in sections, along the ways that were gone,
so that this too follows from the records alone.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from maxlm.config import DataConfig
from maxlm.data.batch import Batch, empty_batch, join_documents
from maxlm.data.mixture import Mixture
from maxlm.data.packing import PACKER_VERSION, Rows, Split, make_rows
from maxlm.data.permutation import permute, round_keys
from maxlm.errors import UserError

ORDER_VERSION = 1  # changes when the same records would give other batches
_BLOCK = 1024  # rows whose place is worked out at once: for NumPy a few are as much work as a thousand


class DataError(UserError):
    """Stores and settings from which no batches can be made."""


class DataChanged(UserError):
    """A run would go on with other data than it was recorded with."""


class Store(Protocol):
    """What the loader asks of a token store."""

    @property
    def fingerprint(self) -> str:
        """Of its content."""

    @property
    def path(self) -> Path | None:
        """Its folder; None: it lives in memory and packing plans are not kept."""

    def split(self, name: str) -> Split:
        """The split `train`."""


class Shape(NamedTuple):
    """Of a step's whole batch."""

    batch_size: int
    sequence_length: int


class Skip(NamedTuple):
    """A way back to step `at_step`, past the `batches` that had been consumed from there on, whatever their phases."""

    at_step: int
    batches: int


@dataclass(frozen=True)
class Phase:
    """What holds from a step on, with everything that the config left open filled in."""

    from_step: int
    sequence_length: int
    batch_size: int
    mixture: Mixture


@dataclass(frozen=True)
class _Stand:
    """How far a store is.

    Attributes:
      epoch: Number of the epoch in which `row` counts from 0.
      row: Rows taken since then, those passed over counted; may be many epochs of them.
      passed: Epochs consumed before that, in other cuts.
    """

    epoch: int = 0
    row: int = 0
    passed: float = 0.0


class _Section(NamedTuple):
    """Steps of one phase in a row.

    Attributes:
      from_step: The first of them.
      phase: Number of the phase.
      first: Which batch of its phase that step takes, those passed over counted.
      stands: Of each store, as if batch 0 of the phase came next.
    """

    from_step: int
    phase: int
    first: int
    stands: dict[str, _Stand]


class _Progress(NamedTuple):
    """What has been consumed, on all the ways that were gone.

    Attributes:
      batches: By the number of the phase.
      stands: Of each store, by the length's number, which counts the changes of the sequence length.
    """

    batches: dict[int, int]
    stands: dict[int, dict[str, _Stand]]


class _Addresses(NamedTuple):
    """Where rows of the run are found.

    Attributes:
      stores: (n,) int64, index into the mixture's names.
      rows: (n,) int64, row of that store's cut.
    """

    stores: np.ndarray
    rows: np.ndarray


class Loader:
    """Batches of the training splits.

    Args:
      stores: Every store of `data`, by name.
      data: Mixture, lengths, packing, phases.
      seed: Of the order of rows.
      skips: The ways back, in the order in which they were gone.

    Raises:
      DataError: A mixture names a store twice, or one that is not there or has nothing to train on, or a skip is
        negative.
    """

    def __init__(self, stores: Mapping[str, Store], data: DataConfig, *, seed: int, skips: Sequence[Skip] = ()):
        self._stores, self._data, self._seed = stores, data, seed
        self._skips = tuple(Skip(*skip) for skip in skips)
        if any(skip.at_step < 0 or skip.batches < 0 for skip in self._skips):
            raise DataError(f"skips are (step, batches) of zero and more, not {list(self._skips)}")
        self._rows: dict[tuple[str, int], Rows] = {}
        self._phases = self._resolve()
        self._starts = [phase.from_step for phase in self._phases]
        lengths = [phase.sequence_length for phase in self._phases]
        changes = [one != other for one, other in itertools.pairwise(lengths)]
        self._lengths = list(itertools.accumulate(changes, initial=0))  # of each phase: the length's number
        self._sections = self._lay()
        self._section_starts = [section.from_step for section in self._sections]
        self._block = functools.lru_cache(maxsize=8)(self._address_block)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, or the given rows of it; reads no others.

        Args:
          step: From 0 on.
          rows: Which rows of the whole batch (axis B), as in indexing; None: all.
        """
        section, phase = self._section_number(step), self.phase(step)
        wanted = np.arange(phase.batch_size)[rows if rows is not None else slice(None)]
        addresses = self._addresses(section, wanted + self._batches(section, step) * phase.batch_size)
        batch = empty_batch(wanted.size, phase.sequence_length)
        for store, name in enumerate(phase.mixture.names):
            chosen = np.flatnonzero(addresses.stores == store)
            if not chosen.size:
                continue
            part = self._cut(name, phase.sequence_length).batch(addresses.rows[chosen])
            if chosen.size == wanted.size:
                batch = part
                break
            for whole, piece in zip(batch, part, strict=True):
                whole[chosen] = piece
        return batch if self._data.mask_documents else join_documents(batch)

    def rows(self, step: int) -> dict[str, np.ndarray]:
        """Which rows of each store's cut the whole batch of a step is made of; (n,) int64."""
        section, phase = self._section_number(step), self.phase(step)
        first = self._batches(section, step) * phase.batch_size
        addresses = self._addresses(section, np.arange(first, first + phase.batch_size))
        return {name: addresses.rows[addresses.stores == store] for store, name in enumerate(phase.mixture.names)}

    def shape(self, step: int) -> Shape:
        """(B, S) of a step's whole batch."""
        phase = self.phase(step)
        return Shape(batch_size=phase.batch_size, sequence_length=phase.sequence_length)

    def phase(self, step: int) -> Phase:
        """The phase that a step lies in."""
        return self._phases[self._sections[self._section_number(step)].phase]

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each store that the batches before `step` have consumed."""
        number = self._section_number(step)
        length = self.phase(step).sequence_length
        return {
            name: self._consumed(name, stand, length)
            for name, stand in self._advance(self._sections[number], self._batches(number, step)).items()
        }

    def fill(self, step: int) -> dict[str, float]:
        """Share of the positions that hold a token, by store of the step's mixture."""
        phase = self.phase(step)
        return {name: self._cut(name, phase.sequence_length).fill for name in phase.mixture.names}

    def records(self) -> dict[str, Any]:
        """All that the order of data depends on, fit for JSON; for checkpoints (see `check_records`)."""
        names = sorted({name for phase in self._phases for name in phase.mixture.names})
        return {
            "order_version": ORDER_VERSION,
            "packer_version": PACKER_VERSION,
            "seed": self._seed,
            "packing": self._data.packing,
            "mask_documents": self._data.mask_documents,
            "stores": {name: self._stores[name].fingerprint for name in names},
            "phases": [
                {
                    "from_step": phase.from_step,
                    "sequence_length": phase.sequence_length,
                    "batch_size": phase.batch_size,
                    "mixture": [list(pair) for pair in zip(phase.mixture.names, phase.mixture.weights, strict=True)],
                }
                for phase in self._phases
            ],
            "skips": [list(skip) for skip in self._skips],
        }

    def _addresses(self, section: int, rows: np.ndarray) -> _Addresses:
        """Where rows (n,) of a phase are found, on the way that a section belongs to."""
        if not rows.size:
            return _Addresses(stores=rows, rows=rows)
        first = int(rows.min()) // _BLOCK
        blocks = [self._block(section, block) for block in range(first, int(rows.max()) // _BLOCK + 1)]
        return _Addresses(*(np.concatenate(parts)[rows - first * _BLOCK] for parts in zip(*blocks, strict=True)))

    def _address_block(self, section: int, block: int) -> _Addresses:
        """Where rows block * _BLOCK … of a section's phase are found."""
        phase, stands = self._phases[self._sections[section].phase], self._sections[section].stands
        stores, counts = phase.mixture.assign(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        rows = np.empty(_BLOCK, np.int64)
        for store, name in enumerate(phase.mixture.names):
            chosen = np.flatnonzero(stores == store)
            if chosen.size:
                rows[chosen] = self._shuffle(name, stands[name], counts[chosen], sequence_length=phase.sequence_length)
        return _Addresses(stores=stores, rows=rows)

    def _shuffle(self, name: str, stand: _Stand, counts: np.ndarray, *, sequence_length: int) -> np.ndarray:
        """The rows (n,) of a store's cut that come when `counts` (n,) rows have been taken since the phase began."""
        size = self._cut(name, sequence_length).num_rows
        epochs, places = np.divmod(stand.row + counts, size)
        first, fingerprint = int(epochs.min()), self._stores[name].fingerprint
        numbers = range(stand.epoch + first, stand.epoch + int(epochs.max()) + 1)
        keys = np.stack([round_keys(self._seed, fingerprint, number) for number in numbers])
        return permute(places, size, keys=keys[epochs - first])

    def _cut(self, name: str, sequence_length: int) -> Rows:
        if (name, sequence_length) not in self._rows:
            store = self._stores[name]
            self._rows[name, sequence_length] = make_rows(
                store.split("train"),
                sequence_length,
                packing=self._data.packing,
                cache=store.path / "cache" if store.path else None,
                fingerprint=store.fingerprint,
            )
        return self._rows[name, sequence_length]

    def _resolve(self) -> list[Phase]:
        data = self._data
        mixture = _weights(data.mixture) or {
            name: float(self._cut(name, data.sequence_length).num_rows) for name in self._stores
        }
        if not any(mixture.values()):
            raise DataError("no store has tokens to train on: lower heldout_permille or add text to data.stores")
        length, size = data.sequence_length, data.batch_size
        phases = [Phase(from_step=0, sequence_length=length, batch_size=size, mixture=self._mixture(mixture, length))]
        for later in sorted(data.phases.values(), key=lambda phase: phase.from_step):
            length = later.sequence_length or phases[-1].sequence_length
            mixture = _weights(later.mixture) or mixture
            phases.append(
                Phase(
                    from_step=later.from_step,
                    sequence_length=length,
                    batch_size=later.batch_size or phases[-1].batch_size,
                    mixture=self._mixture(mixture, length),
                )
            )
        return phases

    def _mixture(self, weights: Mapping[str, float], sequence_length: int) -> Mixture:
        for name in weights:
            if name not in self._stores:
                raise DataError(f"the mixture names the store {name!r}, but the stores are {sorted(self._stores)}")
        mixture = Mixture(weights)
        for name in mixture.names:
            if not self._cut(name, sequence_length).num_rows:
                raise DataError(f"the store {name!r} has no tokens to train on: take it out of the mixture")
        return mixture

    def _lay(self) -> list[_Section]:
        """The sections of the way that is gone in the end: to each step gone back from, back, and on."""
        sections: list[_Section] = []
        progress, step = _Progress({}, {}), 0
        ways: list[tuple[float, int]] = [(skip.at_step + skip.batches, skip.at_step) for skip in self._skips]
        for end, back in [*ways, (math.inf, 0)]:
            sections = [section for section in sections if section.from_step < step]
            for number, start in enumerate(self._starts):
                stop = min(end, self._starts[number + 1] if number + 1 < len(self._starts) else math.inf)
                if (begin := max(step, start)) >= stop:
                    continue
                sections.append(self._enter(number, begin, progress))
                if stop < math.inf:
                    taken = sections[-1].first + int(stop) - begin
                    progress.batches[number] = taken
                    progress.stands[self._lengths[number]] = self._advance(sections[-1], taken)
            step = back
        return sections

    def _enter(self, number: int, step: int, progress: _Progress) -> _Section:
        """The section of phase `number` that begins at `step`, when so much has been consumed."""
        phase, length = self._phases[number], self._lengths[number]
        stands = dict(progress.stands.get(length, {}))
        if number and self._lengths[number - 1] != length and step == phase.from_step:
            before = self._phases[number - 1].sequence_length
            for name, stand in progress.stands[length - 1].items():
                passed = self._consumed(name, stand, before)
                if name in stands:  # it was here on another way
                    stands[name] = replace(stands[name], passed=passed)
                elif stand.row:
                    begun = -(-stand.row // self._cut(name, before).num_rows)
                    stands[name] = _Stand(epoch=stand.epoch + begun, passed=passed)
                else:
                    stands[name] = stand
        for name in phase.mixture.names:
            stands.setdefault(name, _Stand())
        first = progress.batches.get(number, 0)
        taken = phase.mixture.counts(first * phase.batch_size)
        stands = {name: replace(stand, row=stand.row - taken.get(name, 0)) for name, stand in stands.items()}
        return _Section(step, number, first, stands)

    def _advance(self, section: _Section, batches: int) -> dict[str, _Stand]:
        """Where each store stands after so many batches of a section's phase."""
        phase = self._phases[section.phase]
        taken = phase.mixture.counts(batches * phase.batch_size)
        return {name: replace(stand, row=stand.row + taken.get(name, 0)) for name, stand in section.stands.items()}

    def _consumed(self, name: str, stand: _Stand, sequence_length: int) -> float:
        """Epochs of a store, whole and part, up to a stand."""
        # A store that has not been read since rows were cut anew is not cut (and packed) just to be counted.
        return stand.passed + (stand.row / self._cut(name, sequence_length).num_rows if stand.row else 0.0)

    def _batches(self, section: int, step: int) -> int:
        """Which batch of its phase a step of a section takes, those passed over counted."""
        return step - self._sections[section].from_step + self._sections[section].first

    def _section_number(self, step: int) -> int:
        if step < 0:
            raise IndexError(f"steps begin at 0, not {step}")
        return bisect.bisect_right(self._section_starts, step) - 1


def _weights(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """A mixture's weight by store."""
    weights = dict(pairs)
    if len(weights) < len(pairs):
        raise DataError(f"the mixture {tuple(pairs)} names a store twice: give each one weight")
    return weights


def check_records(old: Mapping[str, Any], new: Mapping[str, Any], *, step: int) -> None:
    """Lets a run go on only with the data that it was recorded with, to which later phases may have been added.

    Args:
      old: `Loader.records()` as the checkpoint has it.
      new: That of the loader that is to go on.
      step: The first step that is to be made; phases and skips may be added from it on.

    Raises:
      DataChanged: Names everything that differs.
    """
    problems = [
        f"{name} was {old.get(key)!r} and is {new[key]!r}"
        for key, name in (
            ("order_version", "the version of the data's order"),
            ("packer_version", "the version of the packer"),
            ("seed", "seed"),
            ("packing", "data.packing"),
            ("mask_documents", "data.mask_documents"),
        )
        if old.get(key) != new[key]
    ]
    for name, fingerprint in old.get("stores", {}).items():
        if new["stores"].get(name, fingerprint) != fingerprint:
            problems.append(f"the store {name!r} was {fingerprint[:12]} and is {new['stores'][name][:12]}")
    before = {phase["from_step"]: phase for phase in old.get("phases", ())}
    after = {phase["from_step"]: phase for phase in new["phases"]}
    for start, phase in before.items():
        if start not in after:
            problems.append(f"the phase that begins at step {start} is gone")
            continue
        for key, value in phase.items():
            now = after[start].get(key)
            if now != value:
                problems.append(f"from step {start} on {key} was {_shown(value)} and is {_shown(now)}")
    for start in after:
        if start not in before and start < step:
            problems.append(f"the new phase from step {start} on begins before step {step}")
    past, more = list(old.get("skips", ())), new["skips"][len(old.get("skips", ())) :]
    if new["skips"][: len(past)] != past or any(skip[0] < step for skip in more):
        problems.append(f"the skipped batches were {past} and are {new['skips']}")
    if problems:
        raise DataChanged(
            f"the run cannot go on at step {step} with other data than it was recorded with: {'; '.join(problems)}. "
            f"Set these back, put the change in data.phases with a from_step of {step} or more, or use a new workdir"
        )


def _shown(value: Any) -> str:
    """A record's value as one would write it into a config."""
    return repr(tuple(tuple(pair) for pair in value)) if isinstance(value, list) else repr(value)
