"""The picture in the report: training loss, and held-out bits per byte beside what compressors reach."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxlm.eval.baselines import Baselines

POINTS = 2000  # drawn of a curve at most
SMOOTHING = 1 / 40  # of the curve that a smoothed point is the mean of
TRAIN, HELDOUT, REFUSED, QUIET = "#1f5fa8", "#d1571b", "#b3202a", "#6b6b6b"


def draw_loss(
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    *,
    baselines: Baselines | None,
) -> bytes:
    """A PNG file.

    Args:
      steps: "step" records.
      evaluations: "evaluation" records.
      baselines: drawn as levels beside the held-out figure.
    """
    # Imported here: it takes a second, and only the end of a run needs it. The figure is drawn without a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, width_ratios=(3, 2))
    _draw_training(left, steps, evaluations)
    _draw_heldout(right, evaluations, baselines)
    for axes in (left, right):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw_training(axes: Any, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("Loss", loc="left")
    axes.set_ylabel("nats a token")
    accepted = [record for record in steps if record["accepted"] and np.isfinite(record["loss"])]
    refused = [record["step"] for record in steps if not record["accepted"]]
    if accepted:
        at = np.array([record["step"] for record in accepted])
        loss = np.array([record["loss"] for record in accepted])
        smooth = _smoothed(loss)
        thin = slice(None, None, -(-len(at) // POINTS))
        axes.plot(at[thin], loss[thin], color=TRAIN, alpha=0.25, linewidth=0.8, label="training, every step")
        axes.plot(at[thin], smooth[thin], color=TRAIN, linewidth=1.8, label="training, smoothed")
    for number, store in enumerate(sorted({record["store"] for record in evaluations})):
        points = [record for record in evaluations if record["store"] == store]
        axes.plot(
            [record["step"] for record in points],
            [record["nats_per_token"] for record in points],
            marker="os^Dv"[number % 5],
            color=HELDOUT,
            linewidth=1.2,
            label=f"held out, {store}",
        )
    if refused:
        base = axes.get_xaxis_transform()  # x in steps, y as a part of the axes
        axes.plot(refused, [0.02] * len(refused), "|", color=REFUSED, transform=base, label="update refused")
    if accepted or evaluations:
        axes.legend(frameon=False)


def _draw_heldout(axes: Any, evaluations: Sequence[Mapping[str, Any]], baselines: Baselines | None) -> None:
    axes.set_title("Held-out text", loc="left")
    axes.set_ylabel("bits per byte")
    for number, store in enumerate(sorted({record["store"] for record in evaluations})):
        points = [record for record in evaluations if record["store"] == store]
        axes.plot(
            [record["step"] for record in points],
            [record["bits_per_byte"] for record in points],
            marker="os^Dv"[number % 5],
            color=HELDOUT,
            linewidth=1.2,
        )
        last = points[-1]
        axes.annotate(
            f"{last['bits_per_byte']:.3f}",
            (last["step"], last["bits_per_byte"]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=HELDOUT,
            fontweight="bold",
            annotation_clip=False,
        )
    if baselines is not None:
        levels = {
            "zlib -9": baselines.zlib,
            "xz -9": baselines.xz,
            "xz -9, joined": baselines.xz_joined,
        }
        base = axes.get_yaxis_transform()  # x as a part of the axes, y in bits per byte
        for name, level in levels.items():
            axes.axhline(level, color=QUIET, linewidth=0.9, linestyle="--" if "joined" in name else "-")
            axes.text(0.01, level, f"{name}  {level:.3f}", transform=base, va="bottom", fontsize=8, color=QUIET)
    axes.margins(y=0.15)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a fixed share of the curve, centred but for its end. Shape (n,)."""
    index = np.arange(len(values))
    # At the start, as many on either side as there are before, or its steep fall would be drawn too low.
    reach = np.minimum(int(len(values) * SMOOTHING / 2), index)
    first, last = index - reach, np.minimum(index + reach, len(values) - 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last + 1] - total[first]) / (last + 1 - first)
