"""What a sweep says: where the best learning rate or batch is at each width, how far it moves, how settings compare.

Runs are averaged over seeds alone. Intervals come from losses drawn anew with the spread from seed to seed, for each
curve by itself: what two widths have in common must not be their noise. The spread is that of the runs which the
parabolas go through: far above the best rate runs are unstable, and scatter by many times as much. Few runs leave it
uncertain, so each replicate draws it anew, as in `curve`; it is one for all curves, and so are these draws.

Where a seed diverged, the mean of the others says how the lucky do: such a value is on no curve, and no such setting is
called better than one that all seeds survived. Else the edge of instability, which takes the worst away, could win.

Shapes: n values tried, r replicates.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from maxlm.study.curve import draw_spreads
from maxlm.study.gathered import Row
from maxlm.study.isoflop import PowerLaw, fit_power
from maxlm.study.law import LEVEL, Interval
from maxlm.study.results import Planned

NEAR = 2  # values on either side of the lowest loss that the parabola goes through
REPLICATES = 2000


class Dial(NamedTuple):
    """A setting whose best value is looked for, and what one and several of its values are called."""

    setting: str
    word: str
    words: str


DIALS = (Dial("optim.peak_lr", "rate", "rates"), Dial("data.batch_size", "batch", "batches"))


class Spread(NamedTuple):
    """Standard deviation from seed to seed, and how many degrees of freedom it was found with."""

    deviation: float
    freedom: int

    def draws(self, seed: int) -> np.ndarray:
        """What it may be in truth, (r,)."""
        return draw_spreads(np.random.default_rng(seed), self.deviation, self.freedom, REPLICATES)


class Try(NamedTuple):
    """A run of a sweep: the value of its dial, and its loss."""

    value: float
    loss: float


class Best(NamedTuple):
    """The best value of a group of runs.

    interval, replicates (r,): None without a spread from seed to seed.
    end: -1 where the lowest loss is at the lowest value, 1 at the highest: the best is `value`, which is that one, or
      lies beyond it; 0 between them.
    tried: values and mean losses, (n,) each, ascending.
    """

    value: float
    loss: float
    interval: Interval | None
    end: int
    tried: tuple[np.ndarray, np.ndarray]
    replicates: np.ndarray | None

    @property
    def inside(self) -> bool:
        return self.end == 0


class Shift(NamedTuple):
    """How far the best value moves over the widths: the largest over the smallest, and its interval.

    It is 1 or more by its making, and so is the low end of the interval: whether the best moves at all, `Trend` says.
    inside: False where a best is at an end of the values, so that it moves by this much at least.
    """

    factor: float
    interval: Interval | None
    inside: bool


class Bound(NamedTuple):
    """What an exponent is at most or at least. side: "or less" or "or more"."""

    exponent: float
    interval: Interval | None
    side: str


class Trend(NamedTuple):
    """The power law of the best value by width, and the interval of its exponent.

    widths: those that both are from, where the best is inside.
    ends: the others.
    bound: on the exponent over all widths; None without `ends`, and where these leave open on which side it lies.
    """

    law: PowerLaw
    interval: Interval | None
    widths: tuple[float, ...]
    ends: tuple[float, ...]
    bound: Bound | None


class Swept(NamedTuple):
    """What was found of one dial. bests: by series (`_series`) and width; shifts and trends: by series."""

    dial: Dial
    bests: dict[str, dict[float, Best]]
    shifts: dict[str, Shift]
    trends: dict[str, Trend]


class Setting(NamedTuple):
    """Runs that differ in their seed alone.

    facts: what the design says of them, without the seed.
    loss: their mean.
    spread: standard deviation from seed to seed; None with one.
    runs, diverged: how many the mean is of, and how many have none.
    """

    facts: dict[str, Any]
    loss: float
    spread: float | None
    runs: int
    diverged: int


def swept(rows: Sequence[Row], diverged: Sequence[Planned], notes: list[str]) -> tuple[Swept, ...]:
    """The best values of each dial that has several; `notes` say what could not be had.

    Args:
      diverged: runs that have, whose values are left out.
    """
    found, lost = [], {_but_seed(planned.facts) for planned in diverged}
    for dial in DIALS:
        if len({row.planned.facts.get(dial.setting) for row in rows}) < 2:
            continue
        bests = _bests(dial, _series(rows, dial), lost, notes)
        if any(best.interval is None for each in bests.values() for best in each.values()):
            notes.append(f"one seed: no interval of the best {dial.word}; two seeds at least tell noise from effect")
        shifts = {words: shift(each) for words, each in bests.items() if len(each) > 1}
        trends = {words: law for words, each in bests.items() if (law := trend(each))}
        for words in sorted(set(shifts) - set(trends)):
            told = sum(best.inside for best in bests[words].values())
            notes.append(
                f"{words}: {told} of {len(bests[words])} widths have their best {dial.word} between others: no exponent"
            )
        found.append(Swept(dial, bests, shifts, trends))
    return tuple(found)


def settings_of(rows: Sequence[Row], diverged: Sequence[Planned]) -> tuple[Setting, ...]:
    """All combinations of settings that were run, the best first, and behind them those of which a seed diverged."""
    found, lost = [], Counter(_but_seed(planned.facts) for planned in diverged)
    for alike, group in _alike(rows).items():
        losses = [row.loss for row in group]
        facts = {name: value for name, value in group[0].planned.facts.items() if name != "seed"}
        spread = spread_between([losses])
        found.append(Setting(facts, float(np.mean(losses)), spread and spread.deviation, len(losses), lost[alike]))
    return tuple(sorted(found, key=lambda setting: (setting.diverged > 0, setting.loss)))


def best_of(tries: Sequence[Try], *, spreads: np.ndarray | None, seed: int) -> Best:
    """The vertex of a parabola of the loss in the logarithm of the dial around the lowest mean loss.

    Args:
      spreads: standard deviation of a run's loss from seed to seed, in each replicate (`Spread.draws`): (r,).
      seed: of the interval's draws; one of its own for each curve.

    Raises:
      ValueError: fewer than three values.
    """
    groups = _by_value(tries)
    values = np.array(list(groups))
    if len(values) < 3:
        raise ValueError(f"{len(values)} values make no parabola; give three at least")
    losses = np.array([np.mean(group) for group in groups.values()])
    low, x = int(np.argmin(losses)), np.log(values)
    interval = replicates = None
    if spreads is not None:
        errors = spreads[:, None] / np.sqrt([len(group) for group in groups.values()])
        noise = np.random.default_rng(seed).normal(size=errors.shape)
        replicates = np.exp(_vertices(x, losses + errors * noise))
        interval = _interval(replicates)
    return Best(
        value=math.exp(_vertices(x, losses[None])[0]),
        loss=float(losses[low]),
        interval=interval,
        end=-1 if low == 0 else int(low == len(values) - 1),
        tried=(values, losses),
        replicates=replicates,
    )


def near_best(tries: Sequence[Try]) -> list[list[float]]:
    """Losses of the values that the parabola goes through, those of one value together."""
    groups = list(_by_value(tries).values())
    low = int(np.argmin([np.mean(group) for group in groups]))
    return groups[max(low - NEAR, 0) : low + NEAR + 1]


def _by_value(tries: Sequence[Try]) -> dict[float, list[float]]:
    """Losses by value, ascending."""
    found: dict[float, list[float]] = {}
    for item in sorted(tries):
        found.setdefault(item.value, []).append(item.loss)
    return found


def spread_between(groups: Sequence[Sequence[float]]) -> Spread | None:
    """Standard deviation within groups of runs that differ in their seed alone, pooled; None without any such group."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.sum((np.array(group) - np.mean(group)) ** 2)) for group in groups)
    return Spread(math.sqrt(squares / freedom), freedom) if freedom else None


def shift(bests: Mapping[float, Best]) -> Shift:
    """How far the best values of several widths lie apart."""
    values = [best.value for best in bests.values()]
    drawn = _drawn(bests)
    interval = None if drawn is None else _interval(drawn.max(0) / drawn.min(0))
    return Shift(max(values) / min(values), interval, all(best.inside for best in bests.values()))


def trend(bests: Mapping[float, Best]) -> Trend | None:
    """The power law of the best value by width; None with fewer than two widths that have it inside."""
    inside = {width: best for width, best in sorted(bests.items()) if best.inside}
    if len(inside) < 2:
        return None
    ends = tuple(sorted(set(bests) - set(inside)))
    return Trend(*_by_width(inside), tuple(inside), ends, _bound(bests) if ends else None)


def _by_width(bests: Mapping[float, Best]) -> tuple[PowerLaw, Interval | None]:
    """Through the values as they are, whether inside or not."""
    drawn = _drawn(bests)
    slopes = None if drawn is None else np.polyfit(np.log(list(bests)), np.log(drawn), 1)[0]
    law = fit_power(list(bests), [best.value for best in bests.values()])
    return law, None if slopes is None else _interval(slopes)


def _bound(bests: Mapping[float, Best]) -> Bound | None:
    """On the exponent over all widths, of which some have their best at an end or beyond.

    The exponent through the ends themselves is the bound where all that lies beyond them would move it to one side: it
    falls with a lower best of a wide model, and with a higher one of a narrow model.
    """
    widths = np.log(list(bests))
    arms = (widths - widths.mean()).round(9)  # none for a width in the middle, which moves no slope
    moves = set(np.sign(arms * [best.end for best in bests.values()])) - {0.0}
    if len(moves) != 1:
        return None
    law, interval = _by_width(bests)
    return Bound(law.exponent, interval, "or less" if moves == {-1.0} else "or more")


def _drawn(bests: Mapping[float, Best]) -> np.ndarray | None:
    """Replicates of all widths, (widths, r)."""
    found = [best.replicates for best in bests.values() if best.replicates is not None]
    return np.stack(found) if len(found) == len(bests) else None


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def _vertices(x: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Of parabolas through the points around the lowest of losses (r, n) at x (n,): (r,).

    Where the lowest is at an end, or the parabola opens downwards, the lowest point itself.
    """
    lowest = losses.argmin(1)
    found = x[lowest]
    for index in range(1, len(x) - 1):
        rows = lowest == index
        near = slice(max(index - NEAR, 0), index + NEAR + 1)
        offset = x[near] - x[index]
        basis = np.stack([offset**2, offset, np.ones_like(offset)], axis=1)
        curvature, slope, _ = np.linalg.pinv(basis) @ losses[rows, near].T
        upwards = curvature > 0
        vertex = x[index] - slope / (2 * np.where(upwards, curvature, 1.0))
        found[rows] = np.where(upwards, np.clip(vertex, x[near][0], x[near][-1]), x[index])
    return found


def _alike(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs that differ in their seed alone, together."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_but_seed(row.planned.facts), []).append(row)
    return found


def _but_seed(facts: Mapping[str, Any]) -> str:
    """What runs that differ in their seed alone have in common."""
    return json.dumps({name: value for name, value in facts.items() if name != "seed"}, sort_keys=True)


def varied(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names under which not all have the same."""
    values: dict[str, set[str]] = {}
    for each in facts:
        for name, value in each.items():
            values.setdefault(name, set()).add(json.dumps(value))
    return [name for name, seen in values.items() if len(seen) > 1]


def _series(rows: Sequence[Row], dial: Dial) -> dict[str, dict[float, list[Row]]]:
    """The runs by series, in words, and by width.

    A series is a rule and one value of every other setting of the sweep, the depth among them, so that its runs of one
    width differ in the dial and their seed alone. The words name the rule, and those settings that have several values.
    """
    names = varied([row.planned.facts for row in rows])
    told = [name for name in names if name not in ("rule", "width", dial.setting, "seed")]
    found: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        facts = row.planned.facts
        words = ", ".join([facts["rule"], *(f"{name} {facts.get(name)}" for name in told)])
        found.setdefault(words, {}).setdefault(facts["width"], []).append(row)
    return found


def _bests(
    dial: Dial, series: dict[str, dict[float, list[Row]]], lost: Set[str], notes: list[str]
) -> dict[str, dict[float, Best]]:
    """The best value of each series at each width; where there are too few values for one, `notes` say so.

    Args:
      lost: what runs have in common (`_but_seed`) of which one diverged.
    """
    curves: dict[tuple[str, float], list[Try]] = {}
    for words, widths in series.items():
        for width, rows in widths.items():
            whole = [row for row in rows if _but_seed(row.planned.facts) not in lost]
            tries = [Try(row.planned.facts[dial.setting], row.loss) for row in whole]
            parted = {row.planned.facts[dial.setting] for row in rows} - {item.value for item in tries}
            notes += [
                f"{words}, width {width:g}: a seed diverged at {dial.word} {value:.3g}, which is left out of the curve"
                for value in sorted(parted)
            ]
            if (values := len({item.value for item in tries})) < 3:
                notes.append(f"{words}, width {width:g}: {values} {dial.words} have no best; three at least do")
            else:
                curves[words, width] = tries
    spread = spread_between([group for tries in curves.values() for group in near_best(tries)])
    spreads = spread and spread.draws(zlib.crc32(dial.setting.encode()))
    found: dict[str, dict[float, Best]] = {}
    for (words, width), tries in curves.items():
        seed = zlib.crc32(f"{dial.setting}, {words}, width {width:g}".encode())
        found.setdefault(words, {})[width] = best_of(tries, spreads=spreads, seed=seed)
    return found
