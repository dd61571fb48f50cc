"""The page that a study leaves behind: report/index.html with its pictures, and runs.csv."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxlm.configfile import flat
from maxlm.files import write_atomically
from maxlm.study import plots
from maxlm.study.coordinates import Check, check_coordinates
from maxlm.study.fitting import StudyFit, describe
from maxlm.study.predict import predictions
from maxlm.study.results import StudyRecord, read_result
from maxlm.study.spec import Study
from maxlm.study.sweep import varied

COLUMNS = (
    *("label", "name", "status", "params_besides_embeddings", "params_total", "layers", "width", "batch", "length"),
    *("rate", "seed", "tokens", "flops", "steps", "loss", "bits_per_byte", "train_loss", "seconds_of_steps"),
    *("predicted_seconds_in_all", "commit", "fingerprint", "finished_at", "why"),
)
SETTINGS = {
    "layers": "model.num_layers",
    "width": "model.embed_dim",
    "batch": "data.batch_size",
    "length": "data.sequence_length",
    "rate": "optim.peak_lr",
    "seed": "seed",
}
"""Columns that are settings of a run, as its own config.json has them."""
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 10px;border-bottom:1px solid #e6e6e6;"
    "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#f4f4f4}"
)


def write_report(study: Study, folder: Path, fit: StudyFit, *, checks: Sequence[Check] = ()) -> Path:
    """Writes the page; returns its path."""
    place = folder / "report"
    place.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(fit, checks)
    for name, content in pictures.items():
        write_atomically(place / f"{name}.png", content)
    table = rows_of(folder, fit.gathered.record)
    write_atomically(place / "runs.csv", _csv(table))
    write_atomically(place / "index.html", _page(study, folder, fit, checks, list(pictures), table))
    return place / "index.html"


def coordinate_checks(study: Study) -> list[Check]:
    """The check under both rules, at the widths that the study names."""
    if not study.coordinate_widths:
        return []
    return [
        check_coordinates(study.base, dataclasses.replace(study.rules, rule=rule), widths=study.coordinate_widths)
        for rule in ("standard", "transfer")
    ]


def rows_of(folder: Path, record: StudyRecord) -> list[dict[str, Any]]:
    """All planned runs with what became of them, a column for each of COLUMNS and for what the design varies."""
    varied = sorted({name for planned in record.runs for name in planned.facts})
    rows = []
    for planned in record.runs:
        result = read_result(folder / "runs" / planned.name)
        recorded = folder / "runs" / planned.name / "config.json"
        settings = flat(json.loads(recorded.read_text())) if recorded.exists() else {}
        row: dict[str, Any] = {
            "label": planned.label,
            "name": planned.name,
            "status": result.status if result else "missing",
            "params_besides_embeddings": planned.params_nonembedding,
            "params_total": planned.params_total,
            "tokens": result.tokens if result else planned.tokens,
            "flops": planned.flops,
            "seconds_of_steps": result.seconds if result else "",
            "predicted_seconds_in_all": round(planned.seconds, 1),
        }
        for name in ("steps", "loss", "bits_per_byte", "train_loss", "commit", "fingerprint", "finished_at"):
            row[name] = getattr(result, name) if result else ""
        row |= {name: settings.get(path, "") for name, path in SETTINGS.items()}
        row["why"] = result.why if result else ""
        rows.append(row | {name: planned.facts.get(name, "") for name in varied})
    return rows


def _pictures(fit: StudyFit, checks: Sequence[Check]) -> dict[str, bytes]:
    found = {}
    if fit.isoflops and fit.isoflops.parabolas:
        found["isoflops"] = plots.draw_isoflops(fit)
    if fit.isoflops and fit.isoflops.used:
        found["optima"] = plots.draw_optima(fit)
    if fit.law:
        found["law"] = plots.draw_law(fit)
    if not {"optima", "law"} & set(found):  # which have it among their panels
        found["compute"] = plots.draw_compute(fit)
    for swept in fit.swept:
        if swept.bests:
            found[swept.dial.words] = plots.draw_swept(swept)
    if checks:
        found["coordinates"] = plots.draw_coordinates(checks)
    return found


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    columns = dict.fromkeys([*COLUMNS, *rows[0]])
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _page(
    study: Study,
    folder: Path,
    fit: StudyFit,
    checks: Sequence[Check],
    pictures: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> str:
    shown = ("label", "status", "params_besides_embeddings", "params_total", "tokens", "flops", "loss", "bits_per_byte")
    lines = [*describe(fit), *(check.sentence() for check in checks)]
    parts = [
        f"<h1>{html.escape(study.name)}</h1>",
        f"<p>{len(rows)} runs planned, {len(fit.gathered.rows)} count. N counts parameters {html.escape(fit.counted)}, "
        "C causal-exact training FLOPs; losses are nats a token on held-out documents; intervals are of 90%.</p>",
        "<h2>Findings</h2>",
        _list(lines),
        *(f'<p><img src="{name}.png" alt="{name}"></p>' for name in pictures),
    ]
    if made := predictions(folder):
        parts += ["<h2>Predictions</h2>", _list([_told(item) for item in made])]
    if fit.settings:
        parts += ["<h2>Settings</h2>", _table(*_settings(fit))]
    parts += ["<h2>Runs</h2>", _table(shown, rows), '<p>Everything: <a href="runs.csv">runs.csv</a>.</p>']
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(study.name)}</title>\n'
        f"<style>{STYLE}</style>\n<body>\n{body}\n</body></html>\n"
    )


def _settings(fit: StudyFit) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of a sweep's settings, the best first."""
    names = varied([setting.facts for setting in fit.settings])
    rows = [
        {name: _word(setting.facts.get(name)) for name in names}
        | {"loss": setting.loss, "spread": "one seed" if setting.spread is None else setting.spread}
        | {"runs": setting.runs, "diverged": setting.diverged}
        for setting in fit.settings
    ]
    return [*names, "loss", "spread", "runs", "diverged"], rows


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _told(item: dict[str, Any]) -> str:
    if item["judgements"]:
        return "; then, ".join(f"{each['verdict']} ({each['workdir']})" for each in item["judgements"])
    low, high = item["interval"]
    return (
        f"{item['flops']:.3g} FLOPs, {item['params_nonembedding']:,} parameters besides embeddings, {item['tokens']:,} "
        f"tokens: {item['loss']:.4f} [{low:.4f}, {high:.4f}], written on {item['date']}, not yet judged"
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{html.escape(line)}</li>" for line in lines) + "\n</ul>"


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(_figure(row[name]))}</td>" for name in columns) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}\n</table>"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1e6 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "")
