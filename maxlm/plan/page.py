"""A plan as a page for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from maxlm.plan.collectives import Traffic
from maxlm.plan.plan import Plan
from maxlm.train.progress import format_duration

GIB = 2**30
WIDTH = 130  # of a log, which has no width of its own


def gib(size: float) -> str:
    """Bytes as "12.34 GiB"; what is below a hundredth of that in MiB, and below a tenth of one in KiB."""
    if abs(size) >= GIB / 100:
        return f"{size / GIB:,.2f} GiB"
    return f"{size / 2**20:,.1f} MiB" if abs(size) >= 2**20 / 10 else f"{size / 2**10:,.1f} KiB"


def headlines(plan: Plan) -> list[str]:
    """What a plan says in a few lines, the answer to "does it fit" first."""
    ahead = plan.forecast
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"{plan.name} on {plan.hardware}: {mesh}; {plan.rows:,} rows of {plan.positions:,} tokens a step"
        f"{f' ({plan.phase})' if plan.phase else ''}, "
        f"{plan.parameters / 1e9:,.3g}B parameters, {plan.attention} attention",
    ]
    if plan.fits and not plan.usable:
        lines.append(f"it takes {gib(plan.memory.total)} a device")
    elif plan.fits:
        share = plan.memory.total / plan.usable
        lines.append(
            f"it fits: {gib(plan.memory.total)} of {gib(plan.usable)} a device ({share:.0%}), "
            f"{gib(plan.spare)} to spare"
        )
    else:
        has = f", which has {gib(plan.usable)}" if plan.usable else ""
        over = f"; {gib(-plan.spare)} too much" if plan.usable and plan.spare < 0 else ""
        refused = f"; the compiler says: {plan.refused}" if plan.refused else ""
        lines.append(f"it does not fit: it needs {gib(plan.memory.total)} a device{has}{over}{refused}")
    if ahead.seconds:
        lines.append(
            f"a step takes {ahead.seconds:.3g} s: {ahead.tokens_per_second:,.0f} tokens/s, "
            f"{ahead.tokens_per_second / plan.devices:,.0f} a device{mfu(ahead.mfu_causal, ahead.mfu_6n)}; "
            f"FLOPs compiled over the model's: {ahead.compiled_flops / ahead.model_flops:.2f}"
        )
        money = f", {plan.dollars:,.0f} dollars at {plan.price:g} a device and hour" if plan.price else ""
        phased = ", its phases by their FLOPs" if plan.phase else ""
        lines.append(f"the run's {plan.run_tokens:,} tokens: {format_duration(plan.days * 86_400)}{money}{phased}")
    return lines


def mfu(causal: float | None, six_n: float | None) -> str:
    """Both, for the middle of a line; "" where the peak is not known (of a CPU the table of chips has none)."""
    if causal is None or six_n is None:
        return ""
    return f", MFU {causal:.1%} causal-exact, {six_n:.1%} by 6N"


def written(row: Traffic) -> str:
    """The kind that is emitted, and what the instructions are called where that is another."""
    return row.kind + (f" (written as {', '.join(row.asked)})" if row.asked else "")


def print_plan(plan: Plan, console: Console) -> None:
    """The whole page."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for line in headlines(plan):
        console.print(line, highlight=False)
    for table in (_memory(plan), _largest(plan), _time(plan), _kernels(plan), _busiest(plan), _traffic(plan)):
        if table.row_count:
            console.print("", table)
    console.print()
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)
    seconds, size = plan.compiler["seconds"], plan.compiler["bytes"]
    known = ", ".join(f"{name} {version}" for name, version in plan.compiler["versions"].items())
    came = "from the cache" if plan.compiler["cached"] else f"in {format_duration(sum(seconds))}"
    console.print(f"compiled {came}, {gib(size)} of this machine's memory; {known}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if not i else "right")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("memory of a device at the fullest moment", "component", "size", "share")
    for name, size in plan.memory.components.items():
        if size:
            table.add_row(name, gib(size), f"{size / plan.memory.total:.1%}")
    table.add_row("in all", gib(plan.memory.total), "")
    return table


def _largest(plan: Plan) -> Table:
    table = Table(title="the ten largest arrays of that moment", title_justify="left", box=None, pad_edge=False)
    for name in ("size", "component", "shape", "made by"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for buffer in plan.memory.largest:
        table.add_row(gib(buffer.size), buffer.component, buffer.shape.split("{")[0], buffer.made_by)
    return table


def _time(plan: Plan) -> Table:
    table = _table("time of a step", "part", "seconds", "share")
    if not plan.forecast.seconds:  # of a CPU the table of chips knows no rates
        return table
    for name, seconds in sorted(plan.forecast.parts.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:.4g}", f"{seconds / plan.forecast.seconds:.1%}")
    if plan.forecast.hidden:
        table.add_row("(communication behind other work)", f"{plan.forecast.hidden:.4g}", "")
    return table


def _kernels(plan: Plan) -> Table:
    table = _table("kernels, priced by rule", "kernel", "runs", "TFLOPs", "seconds", "rule")
    for kernel in plan.forecast.kernels:
        cells = (f"{kernel.runs:,.0f}", f"{kernel.flops / 1e12:,.4g}", f"{kernel.seconds:.4g}", kernel.rule)
        table.add_row(kernel.name, *cells)
    return table


def _busiest(plan: Plan) -> Table:
    table = Table(title="the ten pieces of code that take most", title_justify="left", box=None, pad_edge=False)
    for name in ("seconds", "kind", "made by"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for busy in plan.forecast.busiest:
        table.add_row(f"{busy.seconds:.4g}", busy.kind, busy.made_by)
    return table


def _traffic(plan: Plan) -> Table:
    table = _table(
        "what a device takes part in sending, a step", "kind", "over", "runs", "whole arrays", "on the wire", "exposed"
    )
    for row in plan.traffic:
        table.add_row(
            written(row),
            " + ".join(row.axes),
            f"{row.count:,.0f}",
            f"{row.payload / 1e9:,.3f} GB",
            f"{row.wire / 1e9:,.3f} GB",
            f"{row.exposed / row.payload:.0%}" if row.payload else "",
        )
    return table
