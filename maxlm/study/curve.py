"""The loss against compute: as far as it was run, and beyond.

Two forms go through the best losses at some budgets: a power law, and one with a floor, E + k C^-c. The first falls too
far, the second knows little of its floor from few budgets: what lies beyond is their middle, and its interval holds
those of both.

Rungs, whose sizes and tokens follow from one dial, are such losses by themselves. Their intervals come from a
parametric bootstrap: how far rungs scatter about the curve with a floor is itself uncertain with few of them, so each
replicate draws it anew from its chi-squared distribution.

Shapes: k budgets, r replicates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from maxlm.errors import UserError
from maxlm.study.law import LEVEL, Interval

MIN_RUNGS = 5  # the curve with a floor has three numbers, and two rungs are to spare for the scatter
REPLICATES = 600
_DECAYS = np.geomspace(0.01, 1.0, 60)  # exponents tried for the loss against compute


class TooFewRuns(UserError):
    """The runs do not make a slice, a law or a curve."""


class Beyond(NamedTuple):
    """A loss at a budget that is not among those fitted. power, floored: what each form says."""

    loss: float
    interval: Interval
    power: float
    floored: float


class Curve(NamedTuple):
    """Rungs, (k,) each, ascending, and what was drawn about the curve through them.

    spread: standard deviation of the losses about the curve with a floor.
    drawn, spreads: losses (r, k) and the spread of each replicate (r,).
    exponent: of the power law through all rungs.
    """

    flops: np.ndarray
    losses: np.ndarray
    spread: float
    drawn: np.ndarray
    spreads: np.ndarray
    exponent: float

    def best(self, flops: float) -> Beyond:
        """The loss that the rungs lead to."""
        return extrapolate(self.flops, self.losses, self.drawn, flops)

    def run(self, flops: float) -> Beyond:
        """The same, with the interval of one run."""
        return extrapolate(self.flops, self.losses, self.drawn, flops, scatter=self.spreads)


def fit_curve(flops: np.ndarray, losses: np.ndarray, *, seed: int = 0, replicates: int = REPLICATES) -> Curve:
    """The curve through rungs: their training FLOPs and losses, (k,) each.

    Raises:
      TooFewRuns: fewer than MIN_RUNGS.
    """
    order = np.argsort(flops)
    flops, losses = np.asarray(flops, float)[order], np.asarray(losses, float)[order]
    if len(losses) < MIN_RUNGS:
        raise TooFewRuns(f"{len(losses)} rungs, but a curve through them and its interval take {MIN_RUNGS}")
    fitted = np.array([_floored(flops, losses[None], value)[0] for value in flops])
    freedom = len(losses) - 3
    spread = math.sqrt(float(((losses - fitted) ** 2).sum()) / freedom)
    rng = np.random.default_rng(seed)
    spreads = draw_spreads(rng, spread, freedom, replicates)
    drawn = fitted + spreads[:, None] * rng.normal(size=(replicates, len(losses)))
    exponent = float(np.polyfit(np.log(flops), np.log(losses), 1)[0])
    return Curve(flops, losses, spread, np.maximum(drawn, 1e-3 * losses), spreads, exponent)


def draw_spreads(rng: np.random.Generator, spread: float, freedom: int, replicates: int) -> np.ndarray:
    """What the true standard deviation may be where one of `freedom` degrees of freedom was found: (r,).

    Args:
      spread: as found. Few runs leave it uncertain: intervals that take it as exactly known are too narrow.
    """
    return spread * np.sqrt(freedom / rng.chisquare(freedom, size=replicates))


def extrapolate(
    budgets: np.ndarray,
    losses: np.ndarray,
    drawn: np.ndarray,
    flops: float,
    *,
    scatter: np.ndarray | float = 0.0,
    level: float = LEVEL,
) -> Beyond:
    """The loss at `flops` from losses (k,) at budgets (k,), and its interval from replicates (r, k) of them.

    Args:
      scatter: standard deviation of one run about the loss, one number or (r,), which its interval is to hold; 0: the
        interval is that of the loss itself.
    """
    power, floored = (float(form(budgets, losses[None], flops)[0]) for form in (_line, _floored))
    noise = scatter * np.random.default_rng(0).normal(size=len(drawn))
    ends = [
        np.quantile(form(budgets, drawn, flops) + noise, [(1 - level) / 2, (1 + level) / 2])
        for form in (_line, _floored)
    ]
    interval = Interval(float(min(low for low, _ in ends)), float(max(high for _, high in ends)))
    return Beyond((power + floored) / 2, interval, power, floored)


def _line(budgets: np.ndarray, losses: np.ndarray, flops: float) -> np.ndarray:
    """Power laws through losses (r, k) at budgets (k,), at `flops`: (r,)."""
    x = np.log(budgets / flops)
    basis = np.stack([np.ones_like(x), x], axis=1)
    return np.exp((np.linalg.pinv(basis) @ np.log(losses).T)[0])


def _floored(budgets: np.ndarray, losses: np.ndarray, flops: float) -> np.ndarray:
    """As `_line`, for E + k C^-c with E of 0 or more: the best of a grid of c, for which E and k are linear."""
    best, value = np.full(len(losses), np.inf), np.full(len(losses), np.nan)
    for decay in _DECAYS:
        x = (budgets / flops) ** -decay
        basis = np.stack([np.ones_like(x), x], axis=1)
        solved = np.linalg.pinv(basis) @ losses.T  # (2, r)
        bare = (x @ losses.T) / (x @ x)
        floored = solved[0] < 0
        solved = np.where(floored, np.stack([np.zeros_like(bare), bare]), solved)
        error = ((losses.T - basis @ solved) ** 2).sum(0)
        better = error < best
        best, value = np.where(better, error, best), np.where(better, solved.sum(0), value)
    return value
