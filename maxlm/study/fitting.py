"""What the runs of a study say together: the fits, and how well they foretell the largest budget."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.files import write_atomically
from maxlm.study.curve import Beyond, Curve, TooFewRuns, fit_curve
from maxlm.study.gathered import COUNTS, Gathered, Row, gather, points_of, slices_of
from maxlm.study.isoflop import IsoflopFit, fit_isoflops, forecast
from maxlm.study.law import Bootstrap, Interval, TooFewPoints, bootstrap, check_points, fit_law
from maxlm.study.spec import StudyError
from maxlm.study.sweep import Setting, Swept, Trend, settings_of, swept, varied

WAYS = {"law": "the parametric law", "isoflops": "the isoflop fit", "curve": "the curve through the rungs"}
"""What foretells a loss, by the name of its fit, and in words."""
SAME_BUDGET = 0.95  # of the largest compute: a run of more is left out with it


class Foretold(NamedTuple):
    """A loss before it is found. interval: of one run."""

    loss: float
    interval: Interval
    how: str


class HeldBack(NamedTuple):
    """The largest budget foretold from the smaller ones.

    by: the fit that foretold it, a key of WAYS.
    found: from slices, the best loss of that budget, of which `interval` is; from the parametric law, the loss of that
      run of it which the law expects to be best, and from rungs that of the largest, and `interval` is of one run.
    """

    by: str
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
    def inside(self) -> bool:
        """Whether what was found lies in the interval."""
        return self.found in self.interval

    @property
    def reach(self) -> float:
        """Half the interval's width, as a part of the prediction."""
        return (self.interval.high - self.interval.low) / 2 / self.predicted


class StudyFit(NamedTuple):
    """All fits of a study. What could not be had is None, and `notes` say why.

    curve: of rungs.
    swept, settings: of a sweep; () for other designs.
    """

    gathered: Gathered
    counted: str
    isoflops: IsoflopFit | None
    law: Bootstrap | None
    curve: Curve | None
    held_back: HeldBack | None
    swept: tuple[Swept, ...]
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]

    @property
    def way(self) -> str:
        """What `foretell` goes by, a key of WAYS; "": nothing."""
        return next((name for name in WAYS if getattr(self, name)), "")


def fit_study(folder: Path, *, counted: str = "besides embeddings") -> StudyFit:
    """Fits everything that the runs allow: laws of sizes and tokens, or what a sweep says of its settings.

    Args:
      counted: how N is counted, a key of COUNTS.

    Raises:
      StudyError: see `gather`, or `counted` is not known.
    """
    if counted not in COUNTS:
        raise StudyError(f"parameters are counted {counted!r}; it can be {' or '.join(map(repr, COUNTS))}")
    gathered = gather(folder)
    notes: list[str] = []
    if gathered.record.design == "sweep":
        found = swept(gathered.rows, gathered.diverged, notes)
        settings = settings_of(gathered.rows, gathered.diverged)
        return StudyFit(gathered, counted, None, None, None, None, found, settings, tuple(notes))
    if gathered.record.design == "rungs":
        return _fit_rungs(gathered, counted)
    slices = slices_of(gathered.rows, counted)
    isoflops = fit_isoflops(slices) if slices else None
    notes += isoflops.left_out if isoflops else ()
    law, held_back = None, None
    try:
        law = _law(gathered.rows, counted)
    except TooFewPoints as error:
        offered = "only the isoflop fit is offered" if isoflops else "the losses are reported without a fit"
        notes.append(f"{error}: {offered}")
    if law or isoflops:
        try:
            held_back = hold_back(gathered.rows, counted, isoflops)
        except (TooFewRuns, TooFewPoints) as error:
            notes.append(f"the largest budget is not foretold from the others: {error}")
    return StudyFit(gathered, counted, isoflops, law, None, held_back, (), (), tuple(notes))


def _fit_rungs(gathered: Gathered, counted: str) -> StudyFit:
    """Tokens follow from the size: no law of both can be had, but the loss has one curve, against compute."""
    curve, held_back, notes = None, None, []
    try:
        curve = _curve(gathered.rows)
        held_back = _hold_back_rung(gathered.rows)
    except TooFewRuns as error:
        what = "the largest rung is not foretold from the others" if curve else "no curve goes through the rungs"
        notes.append(f"{what}: {error}")
    return StudyFit(gathered, counted, None, None, curve, held_back, (), (), tuple(notes))


def foretell(fit: StudyFit, *, params: float, tokens: float, flops: float) -> Foretold:
    """The loss of a run: by the parametric law where there is one, else by the isoflop fit, of the best size, or by the
    curve through the rungs, of the next one.

    Raises:
      TooFewRuns: there is none of them, or the slices allow no forecast.
    """
    if fit.law:
        interval = fit.law.prediction(params, tokens)
        how = f"parametric law of {len(fit.gathered.rows)} runs"
        return Foretold(float(fit.law.fit.law.loss(params, tokens)), interval, how)
    if fit.curve:
        beyond = fit.curve.run(flops)
        return Foretold(beyond.loss, beyond.interval, _rungs_words(fit.curve, beyond))
    if not fit.isoflops:
        raise TooFewRuns(no_forecast(fit))
    found = forecast(fit.isoflops, flops, of_a_run=True)
    return Foretold(found.loss, found.interval, found.how)


def no_forecast(fit: StudyFit) -> str:
    """Why a study foretells nothing, in a sentence."""
    sweep = fit.gathered.record.design == "sweep"
    return f"no forecast can be made: {'a sweep says nothing of larger runs' if sweep else '; '.join(fit.notes)}"


def hold_back(rows: Sequence[Row], counted: str, whole: IsoflopFit | None) -> HeldBack:
    """Leaves the largest budget out, foretells it as `foretell` would without it, and looks.

    Raises:
      TooFewRuns, TooFewPoints: what is left allows no forecast, or the largest budget has no minimum.
    """
    largest = max(map(_budget, rows))
    rest = [row for row in rows if _budget(row) < SAME_BUDGET * largest]
    try:
        law = _law(rest, counted)
    except TooFewPoints as error:
        if whole is None:
            raise TooFewPoints(f"without it, {error}") from error
        found = [parabola for parabola in whole.used if parabola.flops == largest]
        if not found:
            raise TooFewRuns("its minimum was not found") from error
        predicted = forecast(fit_isoflops(slices_of(rest, counted)), largest)
        return HeldBack("isoflops", largest, predicted.loss, predicted.interval, found[0].loss, predicted.how)
    points = points_of([row for row in rows if _budget(row) >= SAME_BUDGET * largest], counted)
    expected = law.fit.law.loss(points.params, points.tokens)
    best = int(np.argmin(expected))  # by what is expected: the lowest found would be the luckiest
    interval = law.prediction(float(points.params[best]), float(points.tokens[best]))
    how = f"parametric law of {len(rest)} runs"
    return HeldBack("law", largest, float(expected[best]), interval, float(points.losses[best]), how)


def _hold_back_rung(rows: Sequence[Row]) -> HeldBack:
    """The largest rung, foretold from the others."""
    largest = max(rows, key=lambda row: row.planned.flops)
    curve = _curve([row for row in rows if row.planned.flops < SAME_BUDGET * largest.planned.flops])
    beyond = curve.run(largest.planned.flops)
    return HeldBack(
        "curve", largest.planned.flops, beyond.loss, beyond.interval, largest.loss, _rungs_words(curve, beyond)
    )


def _curve(rows: Sequence[Row]) -> Curve:
    return fit_curve(np.array([row.planned.flops for row in rows]), np.array([row.loss for row in rows]))


def _rungs_words(curve: Curve, beyond: Beyond) -> str:
    return (
        f"curve through {len(curve.losses)} rungs; power law {beyond.power:.4f}, with a floor {beyond.floored:.4f}, "
        "interval over both"
    )


def _law(rows: Sequence[Row], counted: str) -> Bootstrap:
    points = points_of(rows, counted)
    check_points(points)
    return bootstrap(points, fit_law(points))


def _budget(row: Row) -> float:
    return row.planned.facts.get("budget", row.planned.flops)


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
    if fit.curve:
        lines.append(
            f"through {len(rows)} rungs the loss falls as C^{fit.curve.exponent:.4f}; they scatter by "
            f"{fit.curve.spread:.2g} about their curve"
        )
    if fit.gathered.record.design != "sweep" and not (fit.isoflops or fit.law):
        lines += [_run_words(row, fit.counted) for row in sorted(rows, key=lambda row: row.planned.flops)]
    for found in fit.swept:
        lines += _swept_words(found)
    lines += _settings_words(fit)
    if fit.held_back:
        lines.append(_held_words(fit.held_back, fit.way))
    return lines + [f"note: {note}" for note in fit.notes]


def _run_words(row: Row, counted: str) -> str:
    planned = row.planned
    return (
        f"{planned.label}: N {getattr(planned, COUNTS[counted]):,}, D {row.result.tokens:,}, C {planned.flops:.3g}, "
        f"loss {row.loss:.4f}"
    )


def _held_words(held: HeldBack, way: str) -> str:
    missed = not (abs(held.miss) < 0.02 and held.reach < 0.03)  # what is not a number has not held either
    verdict = "the prediction failed" if missed else "the prediction held"
    return (
        f"largest budget left out: predicted {held.predicted:.4f}{_words(held.interval)}, found {held.found:.4f}; "
        f"missed by {held.miss:+.2%}, half-width {held.reach:.2%}, found {'inside' if held.inside else 'outside'} the "
        f"interval: {verdict} (bounds: 2% and 3%; {held.how})"
        + ("" if held.by == way else f"; `predict` goes by {WAYS[way]}, for which the others are too few: untested")
    )


def _swept_words(found: Swept) -> list[str]:
    word, lines = found.dial.word, []
    for series, bests in found.bests.items():
        for width, best in sorted(bests.items()):
            edge = "" if best.inside else f" (at the end of the {found.dial.words} that count: the best may lie beyond)"
            lines.append(f"{series}, width {width:g}: best {word} {best.value:.3g}{_seeded(best.interval)}{edge}")
        if trend := found.trends.get(series):
            law = trend.law
            lines.append(
                f"{series}: best {word} = {law.scale:.3g} width^{law.exponent:.2f}{_seeded(trend.interval)} (an "
                f"exponent of 0: it stays){_ends_words(trend, found.dial.words)}"
            )
    for series, moved in found.shifts.items():
        least = "" if moved.inside else "at least "
        lines.append(
            f"{series}: the best {word} moves by a factor of {least}{moved.factor:.2f}{_seeded(moved.interval)}"
        )
    return lines


def _ends_words(trend: Trend, words: str) -> str:
    """From which widths an exponent is, where not from all, and what the others say of it."""
    if not trend.ends:
        return ""
    used, others = (", ".join(f"{width:g}" for width in widths) for widths in (trend.widths, trend.ends))
    bound = trend.bound
    said = f"over all widths the exponent is {bound.exponent:.2f}{_words(bound.interval)} {bound.side}" if bound else ""
    return (
        f", from {len(trend.widths)} of {len(trend.widths + trend.ends)} widths ({used}); that of {others} is at an "
        f"end of the {words} or beyond: {said or 'over all widths the exponent may be more or less'}"
    )


def _settings_words(fit: StudyFit) -> list[str]:
    """The best setting of each model; and all of them, where no curve was drawn through them."""
    names = varied([setting.facts for setting in fit.settings])
    shape = ("rule", "width", "layers")
    chosen = [name for name in names if name not in shape]
    if not chosen:
        return []
    lines, seen = [], set()
    curves = any(found.bests for found in fit.swept)
    for setting in fit.settings:  # the best first
        model = tuple(setting.facts.get(name) for name in shape)
        words = f"{_model(setting.facts)}: {_facts(setting.facts, chosen)}, {_loss(setting)}"
        if model not in seen:
            seen.add(model)
            lines.append(f"best setting of {words}")
        elif not curves:
            lines.append(f"then, of {words}")
    return lines


def _model(facts: dict[str, Any]) -> str:
    return f"{facts.get('rule')}, {facts.get('layers', '?')} layers of width {facts.get('width', '?')}"


def _facts(facts: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts)


def _loss(setting: Setting) -> str:
    spread = "one seed" if setting.spread is None else f"spread {setting.spread:.4f} over {setting.runs} seeds"
    lost = f", {setting.diverged} diverged" if setting.diverged else ""
    return f"loss {setting.loss:.4f}, {spread}{lost}"


def _coefficients(law: Bootstrap) -> list[tuple[str, float, Interval]]:
    """The coefficients by name, and the exponent of the best size, with their intervals."""
    names = ("E", "A", "B", "alpha", "beta", "exponent")
    return [(name, getattr(law.fit.law, name), law.interval(operator.attrgetter(name))) for name in names]


def _words(interval: Interval | None) -> str:
    return f" [{interval.low:.4g}, {interval.high:.4g}]" if interval else ""


def _seeded(interval: Interval | None) -> str:
    return _words(interval) or " (one seed: no interval)"


def as_json(fit: StudyFit) -> dict[str, Any]:
    """The fits for a program."""
    isoflops, law, held = fit.isoflops, fit.law, fit.held_back
    return {
        "study": fit.gathered.record.study,
        "design": fit.gathered.record.design,
        "fingerprint": fit.gathered.record.fingerprint,
        "runs": [row.planned.label for row in fit.gathered.rows],
        "losses": [
            {name: getattr(row.planned, name) for name in ("label", "params_nonembedding", "params_total", "flops")}
            | {"tokens": row.result.tokens, "loss": row.loss}
            for row in fit.gathered.rows
        ],
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
        "curve": fit.curve and {"exponent": fit.curve.exponent, "spread": fit.curve.spread},
        "held_back": held and {**held._asdict(), "miss": held.miss, "reach": held.reach, "inside": held.inside},
        "swept": {found.dial.word: _swept_json(found) for found in fit.swept},
        "settings": [setting._asdict() for setting in fit.settings],
        "notes": list(fit.notes),
    }


def _swept_json(found: Swept) -> dict[str, Any]:
    return {
        "setting": found.dial.setting,
        "best": {
            series: {
                str(width): {"value": best.value, "interval": best.interval, "inside": best.inside}
                for width, best in bests.items()
            }
            for series, bests in found.bests.items()
        },
        "shifts": {series: moved._asdict() for series, moved in found.shifts.items()},
        "exponents": {
            series: {"value": trend.law.exponent, "scale": trend.law.scale, "interval": trend.interval}
            | {"widths": trend.widths, "widths_at_an_end": trend.ends}
            | {"over_all_widths": trend.bound and trend.bound._asdict()}
            for series, trend in found.trends.items()
        },
    }


def write_fit(folder: Path, fit: StudyFit) -> None:
    """Writes fit.json."""
    write_atomically(folder / "fit.json", json.dumps(as_json(fit), indent=1) + "\n")
