"""A plan without a compiler: what the analytical model says alone, as a page and as figures."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from maxlm.config import Config
from maxlm.model.flops import ledger
from maxlm.plan.analytic import Estimate
from maxlm.plan.page import WIDTH, gib
from maxlm.plan.plan import DAY
from maxlm.plan.topology import Topology
from maxlm.train.outlook import run_tokens
from maxlm.train.progress import format_duration

ALONE = (
    "the analytical model answers alone: 1% off in memory for the one dense model compared with the compiler, not "
    "compared with experts, and no time of it was ever measured on such hardware"
)


def figures(config: Config, topology: Topology, estimate: Estimate, *, price: float | None) -> dict[str, Any]:
    """What a plan says, as far as the model knows it; bytes of a device, seconds of a step.

    Args:
      price: dollars an hour of a device; None: the table's.
    """
    rate, tokens = estimate.tokens_per_second, run_tokens(config)
    counts = ledger(config.model, sequence_length=config.data.sequence_length)
    peak = topology.chip.peak(config.train.precision) * topology.devices
    days = tokens / rate / DAY if rate else 0.0
    return {
        "name": config.name,
        "topology": topology.name,
        "compiled": False,
        "note": ALONE,
        "fits": estimate.fits,
        "usable": topology.chip.usable_bytes,
        "memory": {"total": estimate.memory.total, "components": dict(estimate.memory.parts)},
        "seconds": estimate.time.total,
        "parts": dict(estimate.time.parts),
        "tokens_per_second": rate,
        "mfu_causal": counts.causal_exact * rate / peak if peak else 0.0,
        "mfu_6n": counts.six_n * rate / peak if peak else 0.0,
        "days": days,
        "dollars": days * 24 * topology.devices * (topology.chip.price if price is None else price),
    }


def print_figures(found: dict[str, Any], topology: Topology, console: Console) -> None:
    """The page."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    held, usable = found["memory"]["total"], found["usable"]
    verdict = "it fits" if found["fits"] else "it does not fit"
    console.print(f"{found['name']} on {topology.describe()}; {found['note']}", highlight=False)
    console.print(f"{verdict}: {gib(held)} of {gib(usable)} a device", highlight=False)
    console.print(
        f"a step takes {found['seconds']:.3g} s: {found['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{found['mfu_causal']:.1%} causal-exact, {found['mfu_6n']:.1%} by 6N; the run takes "
        f"{format_duration(found['days'] * DAY)}"
        + (f" and {found['dollars']:,.0f} dollars" if found["dollars"] else ""),
        highlight=False,
    )
    for title, parts, form in (
        ("memory of a device", found["memory"]["components"], gib),
        ("seconds of a step", found["parts"], "{:.4g}".format),
    ):
        table = Table("", title=title, title_justify="left", box=None)
        table.add_column("", justify="right")
        for name, value in sorted(parts.items(), key=lambda item: -item[1]):
            if value:
                table.add_row(name, form(value))
        console.print(table)


def as_json(found: dict[str, Any]) -> str:
    """For `--json`."""
    return json.dumps(found, indent=1) + "\n"
