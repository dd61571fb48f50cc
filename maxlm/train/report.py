"""The one page that a run leaves behind: report.md with loss.png for a person, report.json for a program.

Everything about steps comes from metrics.jsonl, so that the report of a run in several pieces covers all of them:

- records of kind "step" with `loss`, `tokens`, `seconds` and `accepted`;
- "cost" records, each in force for the steps that follow it: the fields of `progress.Cost`, `peak_source` ("data
  sheet", "measured" or "") and `devices` in words;
- "checkpoint_failed" records, one for each save that failed;
- "evaluation" records, one for each store, with `store` and the fields of `eval.heldout.HeldOut`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.eval.baselines import Baselines
from maxlm.files import write_atomically
from maxlm.train.goodput import Summary
from maxlm.train.lossplot import draw_loss
from maxlm.train.metrics import FAILED_SAVE, read_metrics
from maxlm.train.progress import format_duration, utilisation


class Sample(NamedTuple):
    """A prompt and what the model made of it."""

    prompt: str
    text: str  # the continuation alone


class Foretold(NamedTuple):
    """A plan of the run, made before it.

    hardware: that it was made for.
    seconds: of a step.
    device_bytes: of a device; device_bytes_held: what steps did hold; None where nobody knows.
    """

    hardware: str
    seconds: float
    device_bytes: float
    device_bytes_held: float | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the report says that metrics.jsonl does not hold."""

    name: str
    parameters: int
    model: Mapping[str, str | int | float]  # rows of "What was trained"
    baselines: Baselines | None  # None: no held-out documents
    samples: Sequence[Sample]
    goodput: Summary
    train_command: str  # the same again continues
    generate_command: str
    extra: Mapping[str, str | int | float | None]  # further figures, such as compile_seconds
    foretold: Foretold | None = None  # None: no plan was made
    foretold_steps: range | None = None  # the records of the steps that a plan is of, the heaviest; None: of all


class Totals(NamedTuple):
    """Sums over the steps of the run."""

    steps: int
    updates: int
    tokens: int  # loss-bearing
    seconds: float  # on completed steps
    median_seconds: float | None  # of a step, of those that a plan is of
    last_loss: float | None  # of the last accepted step, nats a token
    tokens_per_second: float | None
    mfu_6n: float | None
    mfu_causal: float | None
    peak_flops: float | None  # of the devices last used
    peak_source: str
    devices: tuple[str, ...]  # that the run was on, in their order
    failed_saves: int


def write_report(workdir: Path, facts: Facts) -> dict[str, Any]:
    """Writes loss.png, report.json and report.md, each whole or not at all; returns what report.json holds."""
    workdir = Path(workdir)
    records = list(read_metrics(workdir))
    totals = add_up(records, foretold=facts.foretold_steps)
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figures = _figures(facts, totals, evaluations)
    write_atomically(
        workdir / "loss.png",
        draw_loss([record for record in records if record["kind"] == "step"], evaluations, baselines=facts.baselines),
    )
    write_atomically(workdir / "report.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    write_atomically(workdir / "report.md", _page(facts, totals, figures))
    return figures


def add_up(records: Sequence[Mapping[str, Any]], *, foretold: range | None = None) -> Totals:
    """Sums over step records, each under the cost that was last recorded before it.

    A machine counts where it has made a step that was kept: the cost of a start that was killed before that stays in
    the records, too.

    MFU is the FLOPs of all tokens over what the devices could have done in the seconds of all steps; None when the peak
    was unknown for some of them, or is plainly too low.
    """
    steps = updates = 0
    tokens = seconds = six_n = causal = possible = 0.0
    known = True
    taken: list[float] = []
    last_loss: float | None = None
    cost: Mapping[str, Any] = {"peak_flops": None, "peak_source": "", "flops_6n": 0.0, "flops_causal": 0.0}
    used = cost
    devices: dict[str, None] = {}
    for record in records:
        if record["kind"] == "cost":
            cost = record
        elif record["kind"] == "step":
            steps += 1
            tokens += record["tokens"]
            seconds += record["seconds"]
            if foretold is None or record["step"] in foretold:
                taken.append(record["seconds"])
            used = cost
            if "devices" in cost:
                devices[cost["devices"]] = None
            if record["accepted"]:
                updates += 1
                last_loss = record["loss"]
            known = known and cost["peak_flops"] is not None
            six_n += record["tokens"] * cost["flops_6n"]
            causal += record["tokens"] * cost["flops_causal"]
            possible += record["seconds"] * (cost["peak_flops"] or 0.0)
    ceiling = possible if known and possible else None
    return Totals(
        steps=steps,
        updates=updates,
        tokens=round(tokens),
        seconds=seconds,
        median_seconds=sorted(taken)[len(taken) // 2] if taken else None,
        last_loss=last_loss,
        tokens_per_second=tokens / seconds if seconds else None,
        mfu_6n=utilisation(six_n, ceiling),
        mfu_causal=utilisation(causal, ceiling),
        peak_flops=used["peak_flops"],
        peak_source=used["peak_source"],
        devices=tuple(devices),
        failed_saves=sum(record["kind"] == FAILED_SAVE for record in records),
    )


def _figures(facts: Facts, totals: Totals, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What report.json holds; raises ValueError when `facts.extra` repeats a name."""
    # Of the last step that was evaluated: what another store had before, under other settings, is of another model.
    stores = {record["store"]: record for record in evaluations if record["step"] == evaluations[-1]["step"]}
    volume = sum(record["bytes"] for record in stores.values())
    heldout = sum(r["bits_per_byte"] * r["bytes"] for r in stores.values()) / volume if volume else None
    baselines = facts.baselines._asdict() if facts.baselines is not None else dict.fromkeys(Baselines._fields)
    figures = {
        "name": facts.name,
        "heldout_bits_per_byte": heldout,
        "heldout": {
            name: {key: value for key, value in record.items() if key not in ("kind", "store")}
            for name, record in stores.items()
        },
        "xz_bits_per_byte": baselines["xz"],
        "xz_joined_bits_per_byte": baselines["xz_joined"],
        "zlib_bits_per_byte": baselines["zlib"],
        "zlib_joined_bits_per_byte": baselines["zlib_joined"],
        "baseline_documents": baselines["documents"],
        "baseline_bytes": baselines["bytes"],
        "baseline_sampled": baselines["sampled"],
        "tokens_per_second": totals.tokens_per_second,
        "mfu_6n": totals.mfu_6n,
        "mfu_causal": totals.mfu_causal,
        "peak_flops": totals.peak_flops,
        "peak_source": totals.peak_source,
        "devices": list(totals.devices),
        "wall_seconds": facts.goodput.wall,
        "train_seconds": totals.seconds,
        "down_seconds": facts.goodput.down,
        "processes": facts.goodput.processes,
        "goodput": dict(facts.goodput.seconds),
        "failed_saves": totals.failed_saves,
        "steps": totals.steps,
        "updates": totals.updates,
        "tokens": totals.tokens,
        "parameters": facts.parameters,
        "train_loss": totals.last_loss,
        "model": dict(facts.model),
        "samples": [sample._asdict() for sample in facts.samples],
        "foretold": None
        if facts.foretold is None
        else facts.foretold._asdict() | {"seconds_taken": totals.median_seconds},
    }
    if repeated := figures.keys() & facts.extra.keys():
        raise ValueError(f"extra figures {sorted(repeated)} are in the report already; give them other names")
    return _finite({**figures, **facts.extra})


def _finite(value: Any) -> Any:
    """The value with None in place of nan and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(facts: Facts, totals: Totals, figures: Mapping[str, Any]) -> str:
    """report.md."""
    heldout = figures["heldout_bits_per_byte"]
    outcome = f" They reach **{heldout:.4f} bits per byte** on held-out text." if heldout is not None else ""
    machine = ", then ".join(totals.devices) or "an unknown machine"
    refused = totals.steps - totals.updates
    skipped = f" ({refused:,} refused)" if refused else ""
    sections = [
        f"# {facts.name}",
        f"{facts.parameters:,} parameters, trained on {machine} for {totals.steps:,} steps{skipped} and "
        f"{totals.tokens:,} tokens, in {format_duration(totals.seconds)} on steps.{outcome}",
        "![Loss while training, and held-out bits per byte beside general-purpose compressors](loss.png)",
        *_quality(facts, figures),
        *_speed(figures),
        *_foretold(figures["foretold"]),
        *_goodput(facts.goodput),
        *([f"**Saves that failed: {totals.failed_saves}** (metrics.jsonl says why)."] if totals.failed_saves else []),
        "## What was trained",
        _table(
            ("", ""), [(name.replace("_", " "), value) for name, value in (*facts.model.items(), *facts.extra.items())]
        ),
        *_samples(facts.samples),
        "## Go on",
        "The same command continues the run; the second one writes text with it.",
        _fenced(f"{facts.train_command}\n{facts.generate_command}", "sh"),
    ]
    return "\n\n".join(sections) + "\n"


def _quality(facts: Facts, figures: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[Any, ...]] = []
    for name, record in figures["heldout"].items():
        rows.append((f"**this model**, `{name}`", record["bits_per_byte"], "each document alone"))
    if len(rows) > 1:
        rows.append(("**this model**, all stores", figures["heldout_bits_per_byte"], "each document alone"))
    note = ""
    if facts.baselines is not None:
        b = facts.baselines
        rows += [
            ("`xz -9`", b.xz, "file by file"),
            ("`xz -9`", b.xz_joined, "all files joined"),
            ("`zlib -9`", b.zlib, "file by file"),
            ("`zlib -9`", b.zlib_joined, "all files joined"),
        ]
        sampled = ", a sample: the first ones by hash" if b.sampled else ""
        note = (
            f"The compressors read {b.documents:,} held-out documents of {b.bytes:,} bytes{sampled}. Lower is better."
        )
    if not rows:
        return []
    return ["## Held-out quality", _table(("", "bits per byte", "read"), rows), *([note] if note else [])]


def _speed(figures: Mapping[str, Any]) -> list[str]:
    peak = figures["peak_flops"]
    against = f"of {peak / 1e12:,.3g} TFLOP/s ({figures['peak_source']})" if peak else "the peak is not known"
    rows = [
        ("tokens/s", figures["tokens_per_second"], "loss-bearing, over the time on steps"),
        ("MFU, 6N", _percent(figures["mfu_6n"]), against),
        ("MFU, causal-exact", _percent(figures["mfu_causal"]), against),
    ]
    return ["## Speed", _table(("", "", ""), rows)]


def _foretold(figures: Mapping[str, Any] | None) -> list[str]:
    if figures is None:
        return []
    rows = []
    for name, said, found, unit in (
        ("a step", figures["seconds"], figures["seconds_taken"], 1.0),
        ("memory of a device, GiB", figures["device_bytes"], figures["device_bytes_held"], 2.0**30),
    ):
        ratio = f"{said / found:.2f}" if said and found else "–"
        rows.append((name, said / unit, None if found is None else found / unit, ratio))
    header = ("", "forecast", "actual", "forecast / actual")
    return ["## Forecast and actual", f"By the plan for {figures['hardware']}.", _table(header, rows)]


def _goodput(goodput: Summary) -> list[str]:
    rows: list[tuple[Any, ...]] = [
        (name.replace("_", " "), format_duration(seconds), _percent(goodput.fractions[name]))
        for name, seconds in goodput.seconds.items()
    ]
    rows.append(("**wall clock**", format_duration(goodput.wall), _percent(1.0)))
    pieces = f"in {goodput.processes} pieces" if goodput.processes > 1 else "in one piece"
    down = f", with {format_duration(goodput.down)} between them" if goodput.down else ""
    return ["## Where the time went", _table(("", "h:m:s", "share"), rows), f"The run went {pieces}{down}."]


def _samples(samples: Sequence[Sample]) -> list[str]:
    if not samples:
        return []
    blocks = [f"{_fenced(sample.prompt + sample.text)}" for sample in samples]
    return ["## Samples", "Each begins with its prompt.", *blocks]


def _fenced(text: str, language: str = "") -> str:
    """A code block, whatever backticks the text has (a fence has to be longer than any inside)."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    readable = text.encode("utf-8", "replace").decode("utf-8")  # a model may emit half a surrogate pair
    return f"{fence}{language}\n{readable}\n{fence}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_cell(cell) for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _percent(fraction: float | None) -> str:
    return f"{100 * fraction:.1f}%" if fraction is not None else "–"
