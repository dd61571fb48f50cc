"""The pictures of a study's report. Each function returns a PNG file's bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm.study.coordinates import LARGEST_SLOPE, Check
from maxlm.study.fitting import StudyFit
from maxlm.study.gathered import COUNTS, slices_of
from maxlm.study.isoflop import IsoflopFit
from maxlm.study.law import LEVEL
from maxlm.study.sweep import Swept

COLOURS = ("#1f5fa8", "#d1571b", "#2c8a4b", "#7a4fa3", "#b3202a", "#00838f", "#8d6e00", "#6b6b6b")
QUIET = "#6b6b6b"


def draw_isoflops(fit: StudyFit) -> bytes:
    """Loss against size at each budget, with the parabolas and their minima."""
    assert fit.isoflops is not None
    figure, (axes,) = _figure(1)
    slices = slices_of(fit.gathered.rows, fit.counted)
    parabolas = {parabola.flops: parabola for parabola in fit.isoflops.parabolas}
    for number, item in enumerate(slices):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(item.points.params, item.points.losses, "o", color=colour, label=f"{item.flops:.2g} FLOPs")
        if parabola := parabolas.get(item.flops):
            sizes = np.geomspace(item.points.params.min() / 1.1, item.points.params.max() * 1.1, 100)
            curve = parabola.loss + parabola.curvature * np.log(sizes / parabola.params) ** 2
            axes.plot(sizes, curve, color=colour, linewidth=1.2)
            if parabola.inside:
                axes.plot(parabola.params, parabola.loss, "*", color=colour, markersize=13, markeredgecolor="white")
    _logarithmic(axes, "x")
    axes.set(title="Slices of equal compute (star: the minimum)", xlabel=f"parameters, {fit.counted}", ylabel=_NATS)
    axes.legend(frameon=False)
    return _png(figure)


def draw_optima(fit: StudyFit) -> bytes:
    """The best N and D against compute with their power laws, and the loss there, each with a band."""
    assert fit.isoflops is not None
    figure, (left, middle, right) = _figure(3)
    _draw_power(left, fit.isoflops, "params", f"best N, parameters {fit.counted}")
    _draw_power(middle, fit.isoflops, "tokens", "best D, tokens")
    _draw_compute(right, fit)
    return _png(figure)


def draw_compute(fit: StudyFit) -> bytes:
    """Loss against compute: all runs, the best of each budget or the curve through rungs, and what was foretold."""
    figure, (axes,) = _figure(1)
    _draw_compute(axes, fit)
    return _png(figure)


def draw_law(fit: StudyFit) -> bytes:
    """Losses as found against those of the parametric law, with its band."""
    assert fit.law is not None
    rows = fit.gathered.rows
    params = np.array([getattr(row.planned, COUNTS[fit.counted]) for row in rows], float)
    tokens, found = np.array([row.result.tokens for row in rows], float), np.array([row.loss for row in rows])
    figure, (left, right) = _figure(2)
    law = fit.law.fit.law
    low, high = _ends(np.stack([item.loss(params, tokens) for item in fit.law.laws]))
    value = law.loss(params, tokens)
    left.errorbar(
        value, found, xerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)], fmt="o", color=COLOURS[0]
    )
    ends = [min(value.min(), found.min()), max(value.max(), found.max())]
    left.plot(ends, ends, color=QUIET, linewidth=1)
    left.set(title="Parametric law", xlabel="loss by the law", ylabel=f"loss found, {_NATS}")
    budgets = np.geomspace(min(row.planned.flops for row in rows), 10 * max(row.planned.flops for row in rows), 60)
    drawn = np.array([[item.optimum(budget).loss for budget in budgets] for item in fit.law.laws])
    right.plot(budgets, [law.optimum(budget).loss for budget in budgets], color=COLOURS[0], label="law, C = 6 N D")
    right.fill_between(budgets, *_ends(drawn), color=COLOURS[0], alpha=0.2, linewidth=0, label=f"{LEVEL:.0%} band")
    right.plot([row.planned.flops for row in rows], found, ".", color=QUIET, label="runs")
    _logarithmic(right, "x")
    right.set(title="Loss of the best split", xlabel="training FLOPs", ylabel=_NATS)
    right.legend(frameon=False)
    return _png(figure)


def draw_swept(found: Swept) -> bytes:
    """Loss against a dial by width, a panel for each series (see `sweep`)."""
    figure, panels = _figure(len(found.bests))
    for axes, (series, by_width) in zip(panels, sorted(found.bests.items()), strict=True):
        for number, (width, best) in enumerate(sorted(by_width.items())):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(*best.tried, "o-", color=colour, label=f"width {width:g}", linewidth=1.2, markersize=4)
            axes.plot(best.value, best.loss, "*", color=colour, markersize=13, markeredgecolor="white")
            if best.interval:
                axes.plot(best.interval, [best.loss] * 2, color=colour, linewidth=3, alpha=0.4)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{series} (star: the best {found.dial.word})", xlabel=found.dial.setting, ylabel=_NATS)
        axes.legend(frameon=False)
    return _png(figure)


def draw_coordinates(checks: Sequence[Check]) -> bytes:
    """Scale against width after the last step, a panel for each rule."""
    figure, panels = _figure(len(checks))
    for axes, check in zip(panels, checks, strict=True):
        for number, coordinate in enumerate(check.coordinates):
            label = f"{coordinate.name}: slope {coordinate.slope:+.2f}"
            axes.plot(check.widths, coordinate.scales[:, -1], "o-", color=COLOURS[number % len(COLOURS)], label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        verdict = "passed" if check.passed else "failed"
        axes.set(title=f"{check.rule} rule: {verdict} (slopes up to {LARGEST_SLOPE})", xlabel="width", ylabel="RMS")
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


_NATS = "held-out loss, nats a token"


def _draw_compute(axes: Any, fit: StudyFit) -> None:
    rows = fit.gathered.rows
    if fit.gathered.record.design == "trunks":  # a line for each size
        for number, params in enumerate(sorted({row.planned.params_nonembedding for row in rows})):
            one = sorted((row.planned.flops, row.loss) for row in rows if row.planned.params_nonembedding == params)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(*np.array(one).T, ".-", color=colour, linewidth=1, label=f"{params:.2g} parameters")
    else:
        axes.plot(*np.array([(row.planned.flops, row.loss) for row in rows]).T, ".", color=QUIET, label="runs")
    if fit.isoflops and (used := fit.isoflops.used):
        budgets = np.array([p.flops for p in used])
        axes.plot(budgets, [p.loss for p in used], "*-", color=COLOURS[0], markersize=11, label="best at a budget")
        if fit.isoflops.replicates:
            drawn = np.stack([draw.losses for draw in fit.isoflops.replicates])
            axes.fill_between(budgets, *_ends(drawn), color=COLOURS[0], alpha=0.2, linewidth=0)
    if fit.curve:
        span = np.geomspace(fit.curve.flops[0], 4 * fit.curve.flops[-1], 40)
        found = [fit.curve.best(flops) for flops in span]
        axes.plot(span, [each.loss for each in found], color=COLOURS[0], linewidth=1.2, label="curve through the rungs")
        band = np.array([each.interval for each in found]).T
        axes.fill_between(span, *band, color=COLOURS[0], alpha=0.2, linewidth=0, label=f"{LEVEL:.0%} band")
    if held := fit.held_back:
        reach = [[held.predicted - held.interval.low], [held.interval.high - held.predicted]]
        axes.errorbar(
            held.flops, held.predicted, reach, fmt="D", color=COLOURS[1], capsize=4, label="foretold from the others"
        )
    _logarithmic(axes, "x")
    axes.set(title="Loss against compute", xlabel="training FLOPs", ylabel=_NATS)
    axes.legend(frameon=False)


def _draw_power(axes: Any, fit: IsoflopFit, name: str, title: str) -> None:
    budgets = np.array([p.flops for p in fit.used])
    axes.plot(budgets, [getattr(p, name) for p in fit.used], "*", color=COLOURS[0], markersize=11)
    law = getattr(fit, name)
    if law is not None:
        span = np.geomspace(budgets.min(), 4 * budgets.max(), 50)
        axes.plot(span, law(span), color=COLOURS[0], label=f"C^{law.exponent:.3f}")
        if fit.replicates:
            drawn = np.stack([getattr(draw, name)(span) for draw in fit.replicates])
            axes.fill_between(span, *_ends(drawn), color=COLOURS[0], alpha=0.2, linewidth=0, label=f"{LEVEL:.0%} band")
        axes.legend(frameon=False)
    _logarithmic(axes, "xy")
    axes.set(title=title, xlabel="training FLOPs")


def _logarithmic(axes: Any, directions: str) -> None:
    """Logarithmic axes with so few numbers that they do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for direction in directions:
        getattr(axes, f"set_{direction}scale")("log")
        axis = getattr(axes, f"{direction}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e").replace("e0", "e")))
        axis.set_minor_locator(NullLocator())


def _ends(drawn: np.ndarray) -> np.ndarray:
    """Ends of the interval over replicates (r, x): (2, x)."""
    return np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 5.2 * panels), 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    found = list(np.atleast_1d(figure.subplots(1, panels)))
    for axes in found:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer)
    return buffer.getvalue()
