"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta, fitted robustly, with intervals.

N are parameters, D tokens, L nats a token. The fit is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, section
3.3): a Huber loss with delta 1e-3 on log L, L-BFGS from many starts. Besiroglu et al. 2024 (arXiv 2404.10102) found
what had stopped the published fit too soon: the mean of the Huber losses is so small that the optimiser's tolerance
ends the search far from the minimum. Here it is their sum, in units of delta^2, with an analytic gradient.

Shapes: n points, g starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from maxlm.errors import UserError

DELTA = 1e-3  # of the Huber loss, on log L (Hoffmann et al. 2022)
MIN_POINTS = 30  # below, five coefficients and their intervals say more about the noise than about the law
MIN_VALUES = 4  # distinct N, and distinct D, that tell a power from a power and a floor
MIN_SPAN = 2.0  # largest over smallest N, and D: over less the power is a straight line
MOST_TOGETHER = 0.98  # correlation of log N and log D beyond which what one does cannot be told from the other's
EXPONENTS = np.geomspace(0.04, 2.0, 24)  # of the starts, for alpha and beta each
REFINED = 12  # starts that L-BFGS goes on from, those of the lowest loss
REPLICATES = 400  # of a bootstrap
SCATTERED = 20  # runs drawn about each of them
LEVEL = 0.9  # of the intervals
STEPS = 150  # of the descents of a fit, at most
RESTEPS = 40  # of those of a bootstrap, which begin near their ends
SETTLED = 1e-6  # a descent ends when a step lowers the loss by less than this part
_FLOOR = 1e-6  # least share of the loss that a term of a start is given


class TooFewPoints(UserError):
    """There are not enough runs to tell the five coefficients apart."""


class Points(NamedTuple):
    """Runs: params (n,), tokens (n,) and losses (n,) in nats a token."""

    params: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray

    def take(self, index: np.ndarray) -> Points:
        """The points of an index or mask."""
        return Points(self.params[index], self.tokens[index], self.losses[index])


class Optimum(NamedTuple):
    """The best split of a budget between parameters and tokens, and the loss there."""

    params: float
    tokens: float
    loss: float


class Law(NamedTuple):
    """The five coefficients of L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Nats a token."""
        terms = self.A * np.asarray(params, float) ** -self.alpha + self.B * np.asarray(tokens, float) ** -self.beta
        return self.E + terms

    @property
    def exponent(self) -> float:
        """a in N_opt = G (C / 6)^a, where C = 6 N D (Hoffmann et al. 2022, equation 4)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: float) -> Optimum:
        """The minimum of the law under C = 6 N D (Hoffmann et al. 2022, equation 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        params = ratio * (flops / 6) ** self.exponent
        tokens = flops / 6 / params
        return Optimum(params, tokens, float(self.loss(params, tokens)))


class Fit(NamedTuple):
    """A fitted law.

    objective: the sum of the Huber losses at it.
    spread: standard deviation of the residuals of log L, from their median absolute deviation.
    agreed: how many of the refined starts came to this minimum, of how many.
    """

    law: Law
    objective: float
    spread: float
    agreed: tuple[int, int]


class Interval(NamedTuple):
    """Ends of an interval."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


def fit_law(points: Points) -> Fit:
    """The law of least Huber loss over all starts.

    Raises:
      TooFewPoints: see `check_points`.
    """
    check_points(points)
    problem = _Problem(points)
    starts = problem.starts()
    thetas, values = problem.descend_all(starts, np.ones((len(starts), len(points.losses))), steps=STEPS)
    theta, value = problem.polish(thetas[np.argmin(values)])
    residual = problem.residuals(theta)
    # Five coefficients have been fitted to them: they are smaller than what a further run will scatter by.
    spare = len(residual) / (len(residual) - len(theta))
    spread = 1.4826 * math.sqrt(spare) * float(np.median(np.abs(residual - np.median(residual))))
    agreed = int((values <= value * (1 + 1e-3)).sum())
    return Fit(problem.law(theta), value * DELTA**2, spread, (agreed, len(starts)))


def check_points(points: Points) -> None:
    """Raises TooFewPoints where the runs cannot tell the law's five coefficients apart."""
    count = len(points.losses)
    distinct = {name: len(np.unique(getattr(points, name))) for name in ("params", "tokens")}
    if count < MIN_POINTS or min(distinct.values()) < MIN_VALUES:
        raise TooFewPoints(
            f"{count} runs with {distinct['params']} distinct sizes and {distinct['tokens']} distinct token counts are "
            f"too few to fit E, A, B, alpha and beta (at least {MIN_POINTS} runs, {MIN_VALUES} sizes and {MIN_VALUES} "
            "token counts)"
        )
    for name, what in (("params", "sizes"), ("tokens", "token counts")):
        values = getattr(points, name)
        if values.max() < MIN_SPAN * values.min():
            raise TooFewPoints(
                f"the {what} span a factor of {values.max() / values.min():.2f}, too little to fit E, A, B, alpha and "
                f"beta (at least {MIN_SPAN})"
            )
    together = float(np.corrcoef(np.log(points.params), np.log(points.tokens))[0, 1])
    if abs(together) > MOST_TOGETHER:
        raise TooFewPoints(
            f"sizes and token counts go together (their logarithms correlate by {together:+.3f}, at most "
            f"{MOST_TOGETHER} either way tells them apart), so that E, A, B, alpha and beta cannot be fitted"
        )


class Bootstrap(NamedTuple):
    """Laws fitted to resampled runs, from which the interval of any figure follows."""

    laws: tuple[Law, ...]
    fit: Fit

    def interval(self, figure: Callable[[Law], float], *, level: float = LEVEL) -> Interval:
        """The interval of a figure of the law, e.g. `lambda law: law.exponent`: the percentiles of its replicates."""
        values = np.array([figure(law) for law in self.laws])
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(low), float(high))

    def prediction(self, params: float, tokens: float, *, seed: int = 0, level: float = LEVEL) -> Interval:
        """Where the loss of one run comes to lie: the law is uncertain, and a run scatters about it by `fit.spread`."""
        values = np.array([float(law.loss(params, tokens)) for law in self.laws])
        scatter = np.random.default_rng(seed).normal(0.0, self.fit.spread, (SCATTERED, len(values)))
        low, high = np.quantile(values * np.exp(scatter), [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(low), float(high))


def bootstrap(points: Points, fit: Fit, *, seed: int = 0, replicates: int = REPLICATES) -> Bootstrap:
    """Fits the law again to runs drawn with replacement (Efron 1979), each from the fit itself as its start."""
    rng = np.random.default_rng(seed)
    count, problem = len(points.losses), _Problem(points)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=replicates).astype(float)  # how often each run
    start = np.tile(problem.theta(fit.law), (replicates, 1))
    thetas, _ = problem.descend_all(start, drawn, steps=RESTEPS)
    return Bootstrap(tuple(problem.law(theta) for theta in thetas), fit)


class _Problem:
    """The minimisation over theta = (log of the three terms E, A, B at the points' centre, alpha, beta).

    Centred, the coefficients of a term and its exponent hardly hang together, which a plain descent needs.
    """

    def __init__(self, points: Points):
        self.log_loss = np.log(points.losses)
        log_n, log_d = np.log(points.params), np.log(points.tokens)
        self.centre_n, self.centre_d = float(log_n.mean()), float(log_d.mean())
        self.x, self.y = log_n - self.centre_n, log_d - self.centre_d

    def law(self, theta: np.ndarray) -> Law:
        e, a, b, alpha, beta = (float(value) for value in theta)
        return Law(math.exp(e), math.exp(a + alpha * self.centre_n), math.exp(b + beta * self.centre_d), alpha, beta)

    def theta(self, law: Law) -> np.ndarray:
        return np.array(
            [
                math.log(law.E),
                math.log(law.A) - law.alpha * self.centre_n,
                math.log(law.B) - law.beta * self.centre_d,
                law.alpha,
                law.beta,
            ]
        )

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Of log L (g, n) for theta (g, 5), or (n,) for (5,)."""
        return np.log(self.terms(theta).sum(-2)) - self.log_loss

    def terms(self, theta: np.ndarray) -> np.ndarray:
        """(g, 3, n): what E, N and D each add to the loss."""
        e, a, b, alpha, beta = (theta[..., i, None] for i in range(5))
        with np.errstate(over="ignore"):
            return np.exp(np.stack([e + 0 * self.x, a - alpha * self.x, b - beta * self.y], axis=-2))

    def value_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of the Huber losses over DELTA^2, and its gradient (5,)."""
        terms = self.terms(theta)
        total = terms.sum(0)
        residual = (np.log(total) - self.log_loss) / DELTA
        e, a, b = terms * (np.clip(residual, -1, 1) / total / DELTA)
        return float(_huber(residual).sum()), np.array([e.sum(), a.sum(), b.sum(), -(a @ self.x), -(b @ self.y)])

    def polish(self, start: np.ndarray) -> tuple[np.ndarray, float]:
        """The minimum that L-BFGS comes to, begun again where it ends until it finds nothing lower."""
        theta, value = start, self.value_and_gradient(start)[0]
        for _ in range(10):
            found = minimize(
                self.value_and_gradient,
                theta,
                jac=True,
                method="L-BFGS-B",
                bounds=_BOUNDS,
                options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-8, "maxcor": 20},
            )
            gained, theta, value = value - found.fun, found.x, float(found.fun)
            if gained <= 1e-7 * abs(value):
                break
        return theta, value

    def descend_all(self, thetas: np.ndarray, weights: np.ndarray, *, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Minimises from many starts (g, 5) at once; `weights` (g, n) say how often each point counts.

        Least squares reweighted by the Huber loss (Holland & Welsch 1977), damped (Levenberg 1944, Marquardt 1963): a
        step that does not lower the loss is not taken. Near a minimum this loss is almost one of absolute values, on
        which L-BFGS takes hundreds of steps, one start at a time.
        """
        low, high = np.array(_BOUNDS).T
        thetas = np.clip(thetas, low, high)
        damping = np.full(len(thetas), 1e-3)
        residual = self.residuals(thetas) / DELTA
        values = (weights * _huber(residual)).sum(1)
        for _ in range(steps):
            terms = self.terms(thetas)
            e, a, b = np.moveaxis(terms / terms.sum(1, keepdims=True) / DELTA, 1, 0)
            slope = np.stack([e, a, b, -a * self.x, -b * self.y], axis=1)  # (g, 5, n)
            weighed = slope * (weights / np.maximum(np.abs(residual), 1.0))[:, None]
            normal = weighed @ slope.swapaxes(1, 2)
            diagonal = np.einsum("gii->gi", normal)
            diagonal *= 1 + damping[:, None]
            diagonal += 1e-12 * diagonal.max(1, keepdims=True)
            move = np.linalg.solve(normal, weighed @ residual[..., None])[..., 0]
            tried = np.clip(thetas - move, low, high)
            fresh = self.residuals(tried) / DELTA
            with np.errstate(invalid="ignore"):
                reached = (weights * _huber(fresh)).sum(1)
            better = reached < values
            settled = ~better | (values - reached < SETTLED * values)
            thetas = np.where(better[:, None], tried, thetas)
            residual = np.where(better[:, None], fresh, residual)
            done = settled.all() and (better | (damping > 1e3)).all()
            values = np.where(better, reached, values)
            damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-7, 1e6)
            if done:
                break
        return thetas, values

    def starts(self) -> np.ndarray:
        """The best of a grid (g, 5): for given exponents the law is linear in E, A and B, which least squares give.

        The grid of Hoffmann et al. is over all five; solving for three of them leaves a denser one over the exponents
        that is cheap enough to be searched whole.
        """
        alpha, beta = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS))
        loss = np.exp(self.log_loss)
        shape = (alpha.size, self.x.size)
        basis = np.stack(
            [np.ones(shape), np.exp(-alpha[:, None] * self.x), np.exp(-beta[:, None] * self.y)], axis=-1
        )  # (g, n, 3)
        relative = basis / loss[:, None]
        gram = np.einsum("gni,gnj->gij", relative, relative)
        gram += 1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(3)
        solved = np.linalg.solve(gram, relative.sum(1)[..., None])[..., 0]
        solved = np.maximum(solved, _FLOOR * np.median(loss))
        residual = np.log(np.einsum("gni,gi->gn", basis, solved)) - self.log_loss
        value = _huber(residual / DELTA).sum(1)
        thetas = np.column_stack([np.log(solved), alpha, beta])
        grid = value.reshape(len(EXPONENTS), len(EXPONENTS))
        padded = np.pad(grid, 1, constant_values=np.inf)
        around = [
            padded[1 + i : 1 + i + len(grid), 1 + j : 1 + j + len(grid)]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if (i, j) != (0, 0)
        ]
        valleys = np.flatnonzero((grid <= np.min(around, axis=0)).ravel())  # all of them, however poor
        order = np.argsort(value)[:REFINED]
        return thetas[list(dict.fromkeys([*order.tolist(), *valleys.tolist()]))]


def _huber(residual: np.ndarray) -> np.ndarray:
    """Of residuals in units of DELTA (Huber 1964)."""
    size = np.abs(residual)
    return np.where(size <= 1, 0.5 * size**2, size - 0.5)


_BOUNDS = [(-30, 10), (-30, 10), (-30, 10), (0.0, 4.0), (0.0, 4.0)]
