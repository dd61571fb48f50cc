"""The runs of a study that count, read from its folder, and as what the fits take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxlm.study.isoflop import Slice
from maxlm.study.law import Points
from maxlm.study.results import Planned, Result, StudyRecord, read_plan, read_result, weights_wanted
from maxlm.study.spec import StudyError

COUNTS = {"besides embeddings": "params_nonembedding", "total": "params_total"}
"""The two ways of counting N. The first is the default: embeddings of small models would be most of them."""


class Row(NamedTuple):
    """A run that counts."""

    planned: Planned
    result: Result

    @property
    def loss(self) -> float:
        """Nats a token on held-out documents."""
        assert self.result.loss is not None
        return self.result.loss


class Gathered(NamedTuple):
    """The runs of a study that count, and, in words, those that do not. diverged: which of these have diverged."""

    record: StudyRecord
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    diverged: tuple[Planned, ...]


def gather(folder: Path) -> Gathered:
    """Reads all results; missing and diverged runs, and those on other data or weights, are named and left out.

    Raises:
      StudyError: the study was never run, or no run counts.
    """
    record = read_plan(folder)
    rows, left_out, diverged = [], [], []
    results = {planned.label: read_result(folder / "runs" / planned.name) for planned in record.runs}
    ended = [(planned.facts, result) for planned in record.runs if (result := results[planned.label])]
    for planned in record.runs:
        if not planned.fitted:
            continue
        result = results[planned.label]
        if result is None:
            left_out.append(f"{planned.label}: missing, it has not ended")
        elif result.fingerprint != record.fingerprint:
            left_out.append(
                f"{planned.label}: run on other data (fingerprint {result.fingerprint[:12]}, the study's is "
                f"{record.fingerprint[:12]})"
            )
        elif wanted := weights_wanted(planned.facts, result, ended):
            left_out.append(
                f"{planned.label}: begun with other weights (digest {result.weights}, that of the first to end is "
                f"{wanted})"
            )
        elif result.status == "diverged" or result.loss is None:
            left_out.append(f"{planned.label}: diverged, {result.why}")
            diverged.append(planned)
        else:
            rows.append(Row(planned, result))
    known = {planned.name for planned in record.runs}
    strangers = sorted(path.name for path in (folder / "runs").glob("*") if path.is_dir() and path.name not in known)
    left_out += [f"runs/{name}: not in the study's plan" for name in strangers]
    if not rows:
        raise StudyError(f"no run of {folder} counts: {'; '.join(left_out)}")
    return Gathered(record, tuple(rows), tuple(left_out), tuple(diverged))


def points_of(rows: Sequence[Row], counted: str) -> Points:
    """The runs as arrays."""
    return Points(
        np.array([float(getattr(row.planned, COUNTS[counted])) for row in rows]),
        np.array([float(row.result.tokens) for row in rows]),
        np.array([row.loss for row in rows]),
    )


def slices_of(rows: Sequence[Row], counted: str) -> list[Slice]:
    """The runs by budget; [] for a design without budgets."""
    budgets = sorted({row.planned.facts["budget"] for row in rows if "budget" in row.planned.facts})
    return [
        Slice(budget, points_of([row for row in rows if row.planned.facts.get("budget") == budget], counted))
        for budget in budgets
    ]
