"""Where the best learning rate is, at each width and under each rule, and how far it moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from maxlm.study.law import LEVEL, Interval

NEAR = 2  # rates on either side of the lowest loss that the parabola goes through
REPLICATES = 2000


class Try(NamedTuple):
    """A run of a sweep."""

    rate: float
    loss: float


class Best(NamedTuple):
    """The best rate of a group of runs.

    inside: whether the lowest loss is at neither end of the rates; where it is at one, `rate` is that end.
    tried: rates and mean losses, (n,) each, ascending.
    """

    rate: float
    loss: float
    interval: Interval
    inside: bool
    tried: tuple[np.ndarray, np.ndarray]
    replicates: np.ndarray


class Shift(NamedTuple):
    """How far the best rate moves over the widths: the largest over the smallest, and its interval."""

    factor: float
    interval: Interval
    inside: bool


def best_rate(tries: Sequence[Try], *, spread: float, seed: int = 0) -> Best:
    """The vertex of a parabola of the loss in log rate around the lowest mean loss.

    Args:
      spread: standard deviation of a run's loss from seed to seed (`spread_between`).

    Raises:
      ValueError: fewer than three rates.
    """
    rates = np.array(sorted({item.rate for item in tries}))
    if len(rates) < 3:
        raise ValueError(f"{len(rates)} rates make no parabola; give three at least")
    groups = [[item.loss for item in tries if item.rate == rate] for rate in rates]
    losses = np.array([np.mean(group) for group in groups])
    error = spread / np.sqrt([len(group) for group in groups])
    draws = losses + error * np.random.default_rng(seed).normal(size=(REPLICATES, len(rates)))
    found = np.array([_vertex(np.log(rates), drawn) for drawn in draws])
    x, low = _vertex(np.log(rates), losses), int(np.argmin(losses))
    ends = np.exp(np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Best(
        rate=math.exp(x),
        loss=float(losses[low]),
        interval=Interval(float(ends[0]), float(ends[1])),
        inside=0 < low < len(rates) - 1,
        tried=(rates, losses),
        replicates=np.exp(found),
    )


def spread_between(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation within groups of runs that differ in their seed alone, pooled; 0 without any such group."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.sum((np.array(group) - np.mean(group)) ** 2)) for group in groups)
    return math.sqrt(squares / freedom) if freedom else 0.0


def shift(bests: Mapping[float, Best]) -> Shift:
    """How far the best rates of several widths lie apart."""
    rates = [best.rate for best in bests.values()]
    drawn = np.stack([best.replicates for best in bests.values()])
    low, high = np.quantile(drawn.max(0) / drawn.min(0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Shift(
        max(rates) / min(rates), Interval(float(low), float(high)), all(best.inside for best in bests.values())
    )


def _vertex(x: np.ndarray, losses: np.ndarray) -> float:
    """Of the parabola through the points around the lowest; the lowest point itself where that opens downwards."""
    low = int(np.argmin(losses))
    near = slice(max(low - NEAR, 0), low + NEAR + 1)
    if low in (0, len(x) - 1):
        return float(x[low])
    curvature, slope, _ = np.polyfit(x[near] - x[low], losses[near], 2)
    if curvature <= 0:
        return float(x[low])
    return float(np.clip(x[low] - slope / (2 * curvature), x[near][0], x[near][-1]))
