"""A plan as one static HTML file with charts, which needs nothing from anywhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from maxlm.plan.page import gib, headlines, written
from maxlm.plan.plan import Plan

COLOURS = (
    "#3b6fb6", "#7aa6dd", "#b9d0ee", "#8a8f98", "#c0504d", "#e8a33d", "#f3cf8b", "#4f9d69", "#9467bd", "#c8b3de",
    "#d9dce1",
)  # fmt: skip
WIDTH = 860
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; max-width: 920px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin-top: 2em; }
.answer { font-size: 1.15em; padding: .6em 1em; border-left: 5px solid #4f9d69; background: #f2f8f4; }
.answer.no { border-color: #c0504d; background: #fbf1f0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: .25em .8em .25em 0; border-bottom: 1px solid #e4e7ec; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.code { font-family: ui-monospace, monospace; font-size: 12.5px; }
.key { display: inline-block; margin: 0 1.2em .2em 0; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.note { color: #5a6372; font-size: 13.5px; }
"""


def render(plan: Plan) -> str:
    """The file's content."""
    lines = headlines(plan)
    ahead = plan.forecast
    parts = dict(sorted(ahead.parts.items(), key=lambda item: -item[1]))
    body = [
        f"<h1>{_text(plan.name)} on {_text(plan.topology)}</h1>",
        f"<p>{_text(lines[0])}</p>",
        f'<p class="answer{"" if plan.fits else " no"}">{_text(lines[1])}</p>',
        *(f"<p>{_text(line)}</p>" for line in lines[2:]),
        "<h2>Memory of a device at the fullest moment</h2>",
        _bar({n: s for n, s in plan.memory.components.items() if s}, mark=plan.usable or None, unit=gib),
        _table(
            ("size", "component", "array", "made by"),
            [(gib(b.size), b.component, b.shape.split("{")[0], b.made_by) for b in plan.memory.largest],
            numbers=(0,),
            code=(2, 3),
        ),
    ]
    if ahead.seconds:
        body += [
            "<h2>Time of a step</h2>",
            _bar(parts, mark=None, unit=lambda seconds: f"{seconds:.4g} s"),
            _rows([(f"{b.made_by}", b.seconds) for b in ahead.busiest]),
        ]
    if ahead.hidden:
        body += [f'<p class="note">{ahead.hidden:.4g} s of communication are covered by other work.</p>']
    if ahead.kernels:
        body += [
            "<h2>Kernels, priced by rule</h2>",
            _table(
                ("kernel", "runs", "TFLOPs", "seconds", "rule"),
                [
                    (k.name, f"{k.runs:,.0f}", f"{k.flops / 1e12:,.4g}", f"{k.seconds:.4g}", k.rule)
                    for k in ahead.kernels
                ],
                numbers=(1, 2, 3),
            ),
        ]
    if plan.traffic:
        body += [
            "<h2>What a device takes part in sending, a step</h2>",
            _table(
                ("kind", "over", "runs", "whole arrays", "on the wire", "exposed"),
                [
                    (
                        written(row),
                        " + ".join(row.axes),
                        f"{row.count:,.0f}",
                        f"{row.payload / 1e9:,.3f} GB",
                        f"{row.wire / 1e9:,.3f} GB",
                        f"{row.exposed / row.payload:.0%}" if row.payload else "",
                    )
                    for row in plan.traffic
                ],
                numbers=(2, 3, 4, 5),
            ),
        ]
    known = ", ".join(f"{name} {version}" for name, version in plan.compiler["versions"].items())
    body += [f'<p class="note">{_text(note)}</p>' for note in (*plan.notes, f"compiled with {known}")]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f"{_text(plan.name)} on {_text(plan.topology)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _bar(parts: Mapping[str, float], *, mark: float | None, unit: object) -> str:
    """One stacked bar with its legend; `mark` is drawn as a line across it (what a device has)."""
    assert callable(unit)
    total = sum(parts.values())
    scale = (WIDTH - 2) / (max(total, mark or 0.0) * 1.02 or 1.0)
    x, shapes, keys = 1.0, [], []
    for i, (name, size) in enumerate(parts.items()):
        colour = COLOURS[i % len(COLOURS)]
        label = f"{name}: {unit(size)} ({size / total:.1%})"
        shapes.append(
            f'<rect x="{x:.1f}" y="8" width="{size * scale:.1f}" height="40" fill="{colour}">'
            f"<title>{_text(label)}</title></rect>"
        )
        keys.append(f'<span class="key"><i style="background:{colour}"></i>{_text(label)}</span>')
        x += size * scale
    if mark:
        at = 1 + mark * scale
        shapes.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="56" stroke="#1d2430" stroke-width="2"/>')
        keys.append(f'<span class="key">| a device has {_text(unit(mark))}</span>')
    return (
        f'<svg viewBox="0 0 {WIDTH} 58" width="100%" role="img">' + "".join(shapes) + "</svg><div>" + "".join(keys)
    ) + "</div>"


def _rows(items: Sequence[tuple[str, float]]) -> str:
    """A bar a row, each with its label over it."""
    longest = max((size for _, size in items), default=1.0)
    shapes = []
    for i, (name, size) in enumerate(items):
        y = 34 * i
        shapes.append(
            f'<text x="0" y="{y + 12}" font-size="12.5" fill="#1d2430">{_text(name)}</text>'
            f'<rect x="0" y="{y + 16}" width="{(WIDTH - 90) * size / longest:.1f}" height="11" fill="#3b6fb6"/>'
            f'<text x="{(WIDTH - 90) * size / longest + 6:.1f}" y="{y + 26}" font-size="12" fill="#5a6372">'
            f"{size:.3g} s</text>"
        )
    return f'<svg viewBox="0 0 {WIDTH} {34 * len(items) + 4}" width="100%" role="img">' + "".join(shapes) + "</svg>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: tuple[int, ...] = (), code: tuple[int, ...] = ()
) -> str:
    def kind(i: int) -> str:
        return ' class="n"' if i in numbers else ' class="code"' if i in code else ""

    titles = "".join(f"<th{kind(i) if i in numbers else ''}>{_text(name)}</th>" for i, name in enumerate(head))
    lines = ["".join(f"<td{kind(i)}>{_text(cell)}</td>" for i, cell in enumerate(row)) for row in rows]
    return f"<table><tr>{titles}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
