"""Slices of equal compute: a parabola at each budget, and power laws through their minima.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2): at a budget the loss is a parabola of log N, whose
vertex is the best size; through the vertices go power laws of the budget. It holds with few runs, where the five
coefficients of `law` could not be told apart.

Intervals come from a parametric bootstrap: the spread of the losses about the parabolas, pooled over all budgets, is
itself uncertain with few runs, so each replicate draws it anew from its chi-squared distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maxlm.study.curve import TooFewRuns, draw_spreads, extrapolate
from maxlm.study.law import LEVEL, Interval, Points

MIN_SIZES = 3  # of a slice: a parabola's coefficients
MIN_BUDGETS = 3  # of a prediction
REPLICATES = 600


class Slice(NamedTuple):
    """The runs of one budget, in FLOPs."""

    flops: float
    points: Points


class Parabola(NamedTuple):
    """loss = loss_min + curvature (log N - log params)^2 at a budget.

    inside: whether the vertex lies between the smallest and the largest size that was run. Where it does not, the slice
      is shown and takes no part in the laws.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    curvature: float
    inside: bool


class PowerLaw(NamedTuple):
    """y = scale * x^exponent."""

    scale: float
    exponent: float

    def __call__(self, x: float) -> float:
        return self.scale * x**self.exponent


class Replicate(NamedTuple):
    """What one draw of the losses leads to."""

    params: PowerLaw
    tokens: PowerLaw
    losses: np.ndarray  # at the budgets used, (k,)
    spread: float  # of the losses about the parabolas, which few runs leave uncertain


class IsoflopFit(NamedTuple):
    """Parabolas of all slices, and what follows from those that have their minimum inside.

    params, tokens: the laws of the best N and D by budget; None with fewer than two budgets used.
    spread: standard deviation of the losses about the parabolas, None with no run to spare for it.
    """

    parabolas: tuple[Parabola, ...]
    used: tuple[Parabola, ...]
    params: PowerLaw | None
    tokens: PowerLaw | None
    spread: float | None
    replicates: tuple[Replicate, ...]
    left_out: tuple[str, ...]

    def interval(self, name: str, *, level: float = LEVEL) -> Interval | None:
        """Of the exponent of the law `params` or `tokens`."""
        if not self.replicates:
            return None
        low, high = np.quantile(
            [getattr(draw, name).exponent for draw in self.replicates], [(1 - level) / 2, (1 + level) / 2]
        )
        return Interval(float(low), float(high))


def fit_isoflops(slices: Sequence[Slice], *, seed: int = 0, replicates: int = REPLICATES) -> IsoflopFit:
    """Parabolas and laws of the slices; what cannot be used is named in `left_out`."""
    left_out, parabolas, designs = [], [], []
    for item in sorted(slices):
        sizes = len(np.unique(item.points.params))
        if sizes < MIN_SIZES:
            left_out.append(f"budget {item.flops:.3g}: {sizes} sizes, but a parabola takes {MIN_SIZES}")
            continue
        design = _Design(item)
        parabola = design.parabola(item.points.losses)
        if parabola is None:
            left_out.append(f"budget {item.flops:.3g}: the losses have no minimum, the parabola opens downwards")
            continue
        parabolas.append(parabola)
        if parabola.inside:
            designs.append(design)
        else:
            left_out.append(
                f"budget {item.flops:.3g}: the minimum, at {parabola.params:.3g} parameters, lies outside of the sizes "
                f"run ({item.points.params.min():.3g} to {item.points.params.max():.3g})"
            )
    used = tuple(parabola for parabola in parabolas if parabola.inside)
    spread, freedom = _pooled(designs)
    params = tokens = None
    draws: tuple[Replicate, ...] = ()
    if len(used) >= 2:
        params, tokens = _laws(used)
        if spread is not None:
            draws = _draw(designs, spread, freedom, seed=seed, replicates=replicates)
    return IsoflopFit(tuple(parabolas), used, params, tokens, spread, draws, tuple(left_out))


class Forecast(NamedTuple):
    """A loss at a budget that is not in the fit, and its interval."""

    params: float
    tokens: float
    loss: float
    interval: Interval
    how: str


def forecast(fit: IsoflopFit, flops: float, *, of_a_run: bool = False, level: float = LEVEL) -> Forecast:
    """The loss of a run of `flops` with the best split, beyond the budgets fitted, from the losses at the vertices.

    Args:
      of_a_run: whether the interval is to hold the loss of one run, which scatters about the law, and not the law's.
      level: as of `curve.extrapolate`.

    Raises:
      TooFewRuns: fewer than MIN_BUDGETS slices have their minimum inside, or none has a run to spare.
    """
    if fit.params is None or fit.tokens is None or len(fit.used) < MIN_BUDGETS:
        raise TooFewRuns(
            f"{len(fit.used)} budgets have a minimum between their sizes, but a forecast takes {MIN_BUDGETS}; see what "
            f"was left out: {'; '.join(fit.left_out) or 'nothing'}"
        )
    if fit.spread is None:
        raise TooFewRuns(
            f"no budget has more than {MIN_SIZES} sizes, which a parabola goes through whatever their losses: a "
            f"forecast's interval takes a budget of {MIN_SIZES + 1} or more"
        )
    if not fit.replicates:
        raise TooFewRuns(
            f"the losses scatter by {fit.spread:.3g} about their parabolas, so much that most draws of them have no "
            "minimum at some budget: run sizes further apart, or more of them"
        )
    budgets = np.array([parabola.flops for parabola in fit.used])
    losses, drawn = np.array([p.loss for p in fit.used]), np.stack([draw.losses for draw in fit.replicates])
    drawn = np.maximum(drawn, 1e-3 * losses)  # a parabola that is all but flat has its minimum anywhere below
    scatter = np.array([draw.spread for draw in fit.replicates]) if of_a_run else 0.0
    found = extrapolate(budgets, losses, drawn, flops, scatter=scatter, level=level)
    how = (
        f"isoflop fit of {len(fit.used)} budgets; power law {found.power:.4f}, with a floor {found.floored:.4f}, "
        "interval over both"
    )
    return Forecast(fit.params(flops), fit.tokens(flops), found.loss, found.interval, how)


def fit_power(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares in logarithms."""
    exponent, offset = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(math.exp(offset), float(exponent))


class _Design:
    """The parabola of one slice as a linear fit in (log N - centre)."""

    def __init__(self, item: Slice):
        self.flops, self.points = item.flops, item.points
        self.log_n = np.log(item.points.params)
        self.centre = float(self.log_n.mean())
        x = self.log_n - self.centre
        self.basis = np.stack([np.ones_like(x), x, x**2], axis=1)
        self.solver = np.linalg.pinv(self.basis)
        # Along a slice log D is close to linear in log N; what is not (attention, embeddings) a square covers.
        self.tokens = np.polyfit(x, np.log(item.points.tokens), min(2, len(np.unique(x)) - 1))

    @property
    def fitted(self) -> np.ndarray:
        return self.basis @ (self.solver @ self.points.losses)

    @property
    def spare(self) -> int:
        return len(self.log_n) - 3

    def parabola(self, losses: np.ndarray) -> Parabola | None:
        """None for one that opens downwards."""
        offset, slope, curvature = self.solver @ losses
        if curvature <= 0:
            return None
        x = -slope / (2 * curvature)
        inside = self.log_n.min() <= x + self.centre <= self.log_n.max()
        x_safe = float(np.clip(x, -20, 20))
        return Parabola(
            self.flops,
            math.exp(x_safe + self.centre),
            math.exp(float(np.polyval(self.tokens, x_safe))),
            float(offset - slope**2 / (4 * curvature)),
            float(curvature),
            bool(inside),
        )


def _pooled(designs: Sequence[_Design]) -> tuple[float | None, int]:
    """The spread about the parabolas and its degrees of freedom."""
    freedom = sum(design.spare for design in designs)
    if freedom < 1:
        return None, 0
    squares = sum(float(((design.points.losses - design.fitted) ** 2).sum()) for design in designs)
    return math.sqrt(squares / freedom), freedom


def _laws(parabolas: Sequence[Parabola]) -> tuple[PowerLaw, PowerLaw]:
    budgets = [parabola.flops for parabola in parabolas]
    return fit_power(budgets, [p.params for p in parabolas]), fit_power(budgets, [p.tokens for p in parabolas])


def _draw(
    designs: Sequence[_Design], spread: float, freedom: int, *, seed: int, replicates: int
) -> tuple[Replicate, ...]:
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(replicates):
        scale = float(draw_spreads(rng, spread, freedom, 1)[0])
        drawn = [d.parabola(d.fitted + scale * rng.normal(size=len(d.log_n))) for d in designs]
        found = [parabola for parabola in drawn if parabola is not None]
        if len(found) == len(drawn):  # a slice without a minimum says nothing of where it is
            draws.append(Replicate(*_laws(found), np.array([parabola.loss for parabola in found]), scale))
    return tuple(draws) if len(draws) > replicates / 2 else ()
