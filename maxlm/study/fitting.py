"""What the runs of a study say together: which count, the fits, and how well they foretell the largest budget."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.files import write_atomically
from maxlm.study import sweep
from maxlm.study.isoflop import (
    IsoflopFit,
    Slice,
    TooFewRuns,
    exponent_interval,
    fit_isoflops,
    fit_power,
    forecast,
)
from maxlm.study.law import Bootstrap, Interval, Points, TooFewPoints, bootstrap, check_points, fit_law
from maxlm.study.results import Planned, Result, StudyRecord, read_plan, read_result
from maxlm.study.spec import StudyError

COUNTS = {"besides embeddings": "params_nonembedding", "total": "params_total"}
"""The two ways of counting N. The first is the default: embeddings of small models would be most of them."""

RATE = "optim.peak_lr"


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
    """The runs of a study that count, and, in words, those that do not."""

    record: StudyRecord
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]


class HeldBack(NamedTuple):
    """The largest budget foretold from the smaller ones."""

    flops: float
    predicted: float
    interval: Interval
    found: float
    how: str

    @property
    def miss(self) -> float:
        """Part of the loss found."""
        return self.predicted / self.found - 1

    @property
    def reach(self) -> float:
        """Half the interval's width, as a part of the prediction."""
        return (self.interval.high - self.interval.low) / 2 / self.predicted


class StudyFit(NamedTuple):
    """All fits of a study. What could not be had is None, and `notes` say why.

    bests: of a sweep over learning rates, by series and width; see `_series`. shifts: by series.
    """

    gathered: Gathered
    counted: str
    isoflops: IsoflopFit | None
    law: Bootstrap | None
    held_back: HeldBack | None
    bests: dict[str, dict[float, sweep.Best]]
    shifts: dict[str, sweep.Shift]
    notes: tuple[str, ...]


def gather(folder: Path) -> Gathered:
    """Reads all results; missing and diverged runs, and those on other data, are named and left out.

    Raises:
      StudyError: the study was never run, or no run counts.
    """
    record = read_plan(folder)
    rows, left_out = [], []
    for planned in record.runs:
        if not planned.fitted:
            continue
        result = read_result(folder / "runs" / planned.name)
        if result is None:
            left_out.append(f"{planned.label}: missing, it has not ended")
        elif result.fingerprint != record.fingerprint:
            left_out.append(
                f"{planned.label}: run on other data (fingerprint {result.fingerprint[:12]}, the study's is "
                f"{record.fingerprint[:12]})"
            )
        elif result.status == "diverged" or result.loss is None:
            left_out.append(f"{planned.label}: diverged, {result.why}")
        else:
            rows.append(Row(planned, result))
    known = {planned.name for planned in record.runs}
    strangers = sorted(path.name for path in (folder / "runs").glob("*") if path.is_dir() and path.name not in known)
    left_out += [f"runs/{name}: not in the study's plan" for name in strangers]
    if not rows:
        raise StudyError(f"no run of {folder} counts: {'; '.join(left_out)}")
    return Gathered(record, tuple(rows), tuple(left_out))


def fit_study(folder: Path, *, counted: str = "besides embeddings") -> StudyFit:
    """Fits everything that the runs allow.

    Args:
      counted: how N is counted, a key of COUNTS.

    Raises:
      StudyError: see `gather`, or `counted` is not known.
    """
    if counted not in COUNTS:
        raise StudyError(f"parameters are counted {counted!r}; it can be {' or '.join(map(repr, COUNTS))}")
    gathered = gather(folder)
    notes: list[str] = []
    slices = slices_of(gathered.rows, counted)
    isoflops = fit_isoflops(slices) if slices else None
    if isoflops:
        notes += isoflops.left_out
    law = None
    series = _series(gathered.rows)
    if not series:
        points = points_of(gathered.rows, counted)
        try:
            check_points(points)
            law = bootstrap(points, fit_law(points))
        except TooFewPoints as error:
            notes.append(str(error))
    bests = _bests(series, notes)
    shifts = {words: sweep.shift(found) for words, found in bests.items() if len(found) > 1}
    held_back = None
    if isoflops:
        try:
            held_back = hold_back(slices, isoflops)
        except TooFewRuns as error:
            notes.append(f"the largest budget is not foretold from the others: {error}")
    return StudyFit(gathered, counted, isoflops, law, held_back, bests, shifts, tuple(notes))


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


def hold_back(slices: Sequence[Slice], whole: IsoflopFit) -> HeldBack | None:
    """Leaves the largest budget out, foretells its best loss, and looks; None if its minimum was not found."""
    largest = max(slices).flops
    found = [parabola for parabola in whole.used if parabola.flops == largest]
    if not found:
        return None
    rest = fit_isoflops([item for item in slices if item.flops < largest])
    predicted = forecast(rest, largest)
    return HeldBack(largest, predicted.loss, predicted.interval, found[0].loss, predicted.how)


def _series(rows: Sequence[Row]) -> dict[str, dict[float, list[Row]]]:
    """The runs of a sweep over learning rates by series, in words, and by width.

    A series is a rule and one value of every other setting of the sweep, the depth among them, so that its runs of one
    width differ in their rate and seed alone. The words name the rule, and those settings that have several values.
    """
    tried = [row for row in rows if RATE in row.planned.facts]
    values: dict[str, set[str]] = {}
    for row in tried:
        for name, value in row.planned.facts.items():
            values.setdefault(name, set()).add(json.dumps(value))
    told = [name for name, seen in values.items() if len(seen) > 1 and name not in ("rule", "width", RATE, "seed")]
    found: dict[str, dict[float, list[Row]]] = {}
    for row in tried:
        facts = row.planned.facts
        words = ", ".join([facts["rule"], *(f"{name} {facts.get(name)}" for name in told)])
        found.setdefault(words, {}).setdefault(facts["width"], []).append(row)
    return found


def _bests(series: dict[str, dict[float, list[Row]]], notes: list[str]) -> dict[str, dict[float, sweep.Best]]:
    """The best rate of each series at each width; where there are too few rates for one, `notes` say so."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for words, widths in series.items():
        for width, rows in widths.items():
            for row in rows:
                groups.setdefault((words, width, row.planned.facts[RATE]), []).append(row.loss)
    spread = sweep.spread_between(list(groups.values()))
    found: dict[str, dict[float, sweep.Best]] = {}
    for words, widths in series.items():
        for width, rows in widths.items():
            tries = [sweep.Try(row.planned.facts[RATE], row.loss) for row in rows]
            if (rates := len({item.rate for item in tries})) < 3:
                notes.append(f"{words}, width {width:g}: {rates} rates have no best; three at least do")
                continue
            found.setdefault(words, {})[width] = sweep.best_rate(tries, spread=spread)
    return found


# --- in words and figures --------------------------------------------------------------------------------------------


def describe(fit: StudyFit) -> list[str]:
    """The fits as lines for a person."""
    rows = fit.gathered.rows
    lines = [f"{len(rows)} of {sum(p.fitted for p in fit.gathered.record.runs)} runs count; N {fit.counted}"]
    lines += [f"left out: {words}" for words in fit.gathered.left_out]
    if fit.isoflops:
        for p in fit.isoflops.used:
            lines.append(f"budget {p.flops:.3g}: best at N {p.params:,.0f}, D {p.tokens:,.0f}, loss {p.loss:.4f}")
        for letter, name in (("N", "params"), ("D", "tokens")):
            if power := getattr(fit.isoflops, name):
                interval = fit.isoflops.interval(name)
                lines.append(f"best {letter} = {power.scale:.3g} C^{power.exponent:.3f}{_words(interval)}")
    if fit.law:
        for name, value, ends in _coefficients(fit.law):
            lines.append(f"{name} = {value:.4g}{_words(ends)}")
        agreed, tried = fit.law.fit.agreed
        lines.append(f"{agreed} of {tried} starts came to this minimum; residuals of {fit.law.fit.spread:.2%}")
    for series, bests in fit.bests.items():
        for width, best in sorted(bests.items()):
            edge = "" if best.inside else " (at the end of the rates tried: the best may lie beyond)"
            lines.append(f"{series}, width {width:g}: best rate {best.rate:.3g}{_words(best.interval)}{edge}")
        if law_words := _rate_law(bests):
            lines.append(f"{series}: {law_words}")
    for series, moved in fit.shifts.items():
        lines.append(f"{series}: the best rate moves by a factor of {moved.factor:.2f}{_words(moved.interval)}")
    if fit.held_back:
        lines.append(_held_words(fit.held_back))
    return lines + [f"note: {note}" for note in fit.notes]


def _held_words(held: HeldBack) -> str:
    missed = abs(held.miss) >= 0.02 or held.reach >= 0.03
    verdict = "the prediction failed" if missed else "the prediction held"
    return (
        f"largest budget left out: predicted {held.predicted:.4f}{_words(held.interval)}, found {held.found:.4f}; "
        f"missed by {held.miss:+.2%}, half-width {held.reach:.2%}: {verdict} (bounds: 2% and 3%)"
    )


def _rate_law(bests: dict[float, sweep.Best]) -> str:
    """The power law of the best rate by width, from widths where it is inside of the rates."""
    inside = {width: best.rate for width, best in sorted(bests.items()) if best.inside}
    if len(inside) < 2:
        return ""
    widths, rates = list(inside), list(inside.values())
    law = fit_power(widths, rates)
    return f"best rate = {law.scale:.3g} width^{law.exponent:.2f}{_words(exponent_interval(widths, rates))}"


def _coefficients(law: Bootstrap) -> list[tuple[str, float, Interval]]:
    """The coefficients by name, and the exponent of the best size, with their intervals."""
    names = ("E", "A", "B", "alpha", "beta", "exponent")
    return [(name, getattr(law.fit.law, name), law.interval(operator.attrgetter(name))) for name in names]


def _words(interval: Interval | None) -> str:
    return f" [{interval.low:.4g}, {interval.high:.4g}]" if interval else ""


def as_json(fit: StudyFit) -> dict[str, Any]:
    """The fits for a program."""
    isoflops, law, held = fit.isoflops, fit.law, fit.held_back
    return {
        "study": fit.gathered.record.study,
        "fingerprint": fit.gathered.record.fingerprint,
        "runs": [row.planned.label for row in fit.gathered.rows],
        "left_out": list(fit.gathered.left_out),
        "params_counted": fit.counted,
        "isoflops": None
        if isoflops is None
        else {
            "parabolas": [parabola._asdict() for parabola in isoflops.parabolas],
            "params": isoflops.params and isoflops.params._asdict(),
            "tokens": isoflops.tokens and isoflops.tokens._asdict(),
            "params_exponent_interval": isoflops.interval("params"),
            "tokens_exponent_interval": isoflops.interval("tokens"),
            "spread": isoflops.spread,
        },
        "law": None
        if law is None
        else {
            **{name: {"value": value, "interval": interval} for name, value, interval in _coefficients(law)},
            "objective": law.fit.objective,
            "spread": law.fit.spread,
        },
        "held_back": held and {**held._asdict(), "miss": held.miss, "reach": held.reach},
        "best_rates": {
            series: {
                str(width): {"rate": best.rate, "interval": best.interval, "inside": best.inside}
                for width, best in bests.items()
            }
            for series, bests in fit.bests.items()
        },
        "shifts": {series: moved._asdict() for series, moved in fit.shifts.items()},
        "notes": list(fit.notes),
    }


def write_fit(folder: Path, fit: StudyFit) -> None:
    """Writes fit.json."""
    write_atomically(folder / "fit.json", json.dumps(as_json(fit), indent=1) + "\n")
