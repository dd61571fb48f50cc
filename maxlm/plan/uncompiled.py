"""A plan without a compiler: what the analytical model says alone, as a page and as figures."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from maxlm.config import Config
from maxlm.model.flops import ledger
from maxlm.plan.analytic import Estimate
from maxlm.plan.page import WIDTH, gib, mfu
from maxlm.plan.plan import DAY, phase_planned
from maxlm.plan.topology import Topology
from maxlm.train.outlook import at_heaviest, equal_steps, run_tokens
from maxlm.train.progress import format_duration

ALONE = (
    "the analytical model answers alone: within 3% of the compiler's memory on five dense recipes for TPUs, 6% on "
    "three mixtures, not compared on GPUs; no time of it was ever measured on such hardware"
)


def figures(config: Config, topology: Topology, estimate: Estimate, *, price: float | None) -> dict[str, Any]:
    """What a plan says, as far as the model knows it, by the names that `plan.as_json` has for it.

    Args:
      estimate: of the config on the hardware.
      price: dollars an hour of a device; None: the table's.
    """
    run, config = config, at_heaviest(config)
    data, rate, seconds = config.data, estimate.tokens_per_second, estimate.time.total
    counts = ledger(config.model, sequence_length=data.sequence_length)
    peak = topology.chip.peak(config.train.precision) * topology.devices
    price = topology.chip.price if price is None else price
    days = equal_steps(run) * seconds / DAY
    return {
        "name": config.name,
        "topology": topology.name,
        "hardware": topology.describe(),
        "devices": topology.devices,
        "mesh": dict(config.parallel.sizes),
        "rows": data.batch_size,
        "positions": data.sequence_length,
        "phase": phase_planned(run),
        "parameters": counts.params_total,
        "usable": topology.chip.usable_bytes,
        "memory": {"total": estimate.memory.total, "components": dict(estimate.memory.parts)},
        "forecast": {
            "seconds": seconds,
            "parts": dict(estimate.time.parts),
            "tokens": data.batch_size * data.sequence_length,
            "tokens_per_second": rate,
            "mfu_causal": counts.causal_exact * rate / peak if peak else None,
            "mfu_6n": counts.six_n * rate / peak if peak else None,
        },
        "notes": [ALONE],
        "price": price,
        "run_tokens": run_tokens(run),
        "run_steps": equal_steps(run),
        "fits": estimate.fits,
        "spare": estimate.room,
        "days": days,
        "dollars": days * 24 * topology.devices * price,
        "compiled": False,
    }


def print_figures(found: dict[str, Any], console: Console) -> None:
    """The page."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    held, usable, ahead = found["memory"]["total"], found["usable"], found["forecast"]
    verdict = "it fits" if found["fits"] else "it does not fit"
    phase = f" ({found['phase']}; the run's days count the others by their FLOPs)" if found["phase"] else ""
    console.print(f"{found['name']} on {found['hardware']}; {found['notes'][0]}", highlight=False)
    console.print(f"{found['rows']:,} rows of {found['positions']:,} tokens a step{phase}", highlight=False)
    console.print(f"{verdict}: {gib(held)} of {gib(usable)} a device", highlight=False)
    console.print(
        f"a step takes {ahead['seconds']:.3g} s: {ahead['tokens_per_second']:,.0f} tokens/s"
        f"{mfu(ahead['mfu_causal'], ahead['mfu_6n'])}; the run takes {format_duration(found['days'] * DAY)}"
        + (f" and {found['dollars']:,.0f} dollars" if found["dollars"] else ""),
        highlight=False,
    )
    for title, parts, form in (
        ("memory of a device", found["memory"]["components"], gib),
        ("seconds of a step", ahead["parts"], "{:.4g}".format),
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
