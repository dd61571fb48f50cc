"""`maxlm plan --search`: the search with its table, and the winner as overrides that `maxlm train` takes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from maxlm.config import Config
from maxlm.files import write_asked
from maxlm.plan.analytic.memory import state_bytes, state_leaves
from maxlm.plan.candidates import overrides
from maxlm.plan.changes import cheapest, sentences
from maxlm.plan.compile import NotHere, check_installed, compile_step
from maxlm.plan.mtbf import costs_of, lines, outlooks
from maxlm.plan.plan import make_plan
from maxlm.plan.search import Found, Judge, Ranked, Verdict, against_own, search, why
from maxlm.plan.topology import Topology
from maxlm.plan.uncompiled import ALONE
from maxlm.train.outlook import at_heaviest
from maxlm.train.progress import plain_console

Log = Callable[[str], None]
GIB = 2**30


def define_flags(values: flags.FlagValues) -> None:
    """The flags of a search."""
    flags.DEFINE_bool(
        "search", False, "look for the fastest mesh, remat, microbatches and schedule", flag_values=values
    )
    flags.DEFINE_float(
        "budget_minutes",
        10.0,
        "of a search; 0: judge by the model, compile nothing",
        flag_values=values,
        lower_bound=0.0,
    )
    _define_failures(values)
    flags.DEFINE_string(
        "winner", "winner.flags", "file for the winner's overrides, one a line, of a search", flag_values=values
    )


def _define_failures(values: flags.FlagValues) -> None:
    flags.DEFINE_float(
        "mtbf",
        0.0,
        "hours between failures of one chip: also simulate the goodput",
        flag_values=values,
        lower_bound=0.0,
    )
    for name, meaning in (("stall", "a save holds up the steps"), ("write", "a save takes until it is committed")):
        flags.DEFINE_float(
            f"{name}_seconds", 0.0, f"that {meaning}, as measured; 0: by size", flag_values=values, lower_bound=0.0
        )


def print_changes(needs: float, config: Config, topology: Topology, *, log: Log) -> None:
    """For a plan that needs more bytes than a device has: the cheapest changes that would make it fit."""
    found = cheapest(config, topology, needs=needs)
    if not found:
        log("no single change would make it fit; --search looks over all meshes, and names a slice that can hold it")
        return
    log("by the analytical model these changes would make it fit, the cheapest first:")
    for place, line in enumerate(sentences(found), start=1):
        log(f"  {place}. {line}")


def print_failures(values: flags.FlagValues, config: Config, topology: Topology, *, log: Log) -> None:
    """What failures cost the run on more and more chips."""
    held = sum(state_bytes(config, state_leaves(config.model, config.optim)).values())
    costs = costs_of(
        held,
        devices_per_host=topology.chip.devices_per_host,
        stall=values.stall_seconds,
        write=values.write_seconds,
    )
    for line in lines(costs, outlooks(costs, chip_mtbf_hours=values.mtbf)):
        log(line)


def run_search(
    values: flags.FlagValues, config: Config, topology: Topology, *, options: Mapping[str, str] | None, log: Log
) -> int:
    """Searches, prints the ranked table and writes the winner; the exit code.

    Args:
      options: of the compiler, as of `compile_step`.
    """
    judge = compiling(values, options, log=log) if values.budget_minutes else None
    if judge is not None:
        try:
            check_installed(config, topology)
        except NotHere as error:
            log(f"{error}")
            log(ALONE)
            judge = None
    found = search(config, topology, judge, budget_seconds=60 * values.budget_minutes, log=log)
    words = overrides(config, found.winner.config)
    write_asked(values.winner, "".join(f"{word}\n" for word in words))
    write_asked(values.json, json.dumps(as_json(found, config, topology), indent=1) + "\n")
    print_found(found, topology, plain_console())
    log(f"why: {why(found, topology)}")
    if said := against_own(found, topology):
        log(said)
    if found.ended:
        log(
            f"compiled to the end the winner takes {found.ended.seconds:.3f} s a step and "
            f"{found.ended.bytes / GIB:.1f} GiB"
        )
    log("add to maxlm train: " + (shlex.join(words) or "nothing: the config is the winner"))
    log(f"with it: maxlm train --config=... --workdir=... $(cat {shlex.quote(values.winner)})")
    return 0


def compiling(values: flags.FlagValues, options: Mapping[str, str] | None, *, log: Log) -> Judge:
    """Compiles a candidate, or takes what was compiled of the same content before."""

    def judge(config: Config, topology: Topology, *, seconds: float, whole: bool) -> Verdict:
        step = compile_step(
            config,
            topology,
            whole=whole,
            cache=values.plan_cache or None,
            limit=int(values.limit_gib * GIB),
            options=options,
            seconds=seconds,
            log=log,
        )
        plan = make_plan(config, topology, step)
        bytes_ = max(float(plan.memory.total), topology.chip.usable_bytes + 1 if step.refused else 0.0)
        return Verdict(bytes_, plan.forecast.seconds, plan.forecast.parts, step.whole)

    return judge


def print_found(found: Found, topology: Topology, console: Console) -> None:
    """The ranked table."""
    table = Table("", "mesh", "remat", "micro", "schedule", "s a step", "tok/s", "GiB", "free", "parts", box=None)
    rows = [(f"{place}{' config' if ranked.own else ''}", ranked) for place, ranked in enumerate(found.best, start=1)]
    if found.own and not any(ranked.own for ranked in found.best):
        rows.append(("config", found.own))
    for place, ranked in rows:
        table.add_row(place, *_cells(ranked, topology))
    console.width = max(console.width, 150)  # a log has no width of its own
    console.print(table)
    compiled = [ranked.verdict for _, ranked in rows if ranked.verdict]
    if found.late:
        console.print(
            f"the time was over after {len(compiled)} of these were compiled, before one more was: give more "
            "--budget_minutes, and the search takes up where this one stopped"
        )
    if any(not verdict.whole for verdict in compiled):
        console.print("compiled until the memory is laid out: times are by FLOPs and bytes, all by one rule")
    if uncompiled := len(rows) - len(compiled):
        console.print(f"~: not compiled ({uncompiled} of them), by the analytical model alone")


def _cells(ranked: Ranked, topology: Topology) -> list[str]:
    parallel, train = ranked.config.parallel, ranked.config.train
    mesh = " x ".join(f"{axis} {size}" for axis, size in parallel.sizes.items() if size > 1) or "one device"
    schedule = parallel.pipeline_schedule if parallel.pipeline > 1 else ""
    parts = ranked.verdict.parts if ranked.verdict else ranked.estimate.time.parts
    largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
    mark = "" if ranked.verdict else "~"
    judged = at_heaviest(ranked.config).data
    return [
        mesh,
        train.remat,
        str(train.accumulation),
        schedule + (f" x{parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""),
        f"{mark}{ranked.seconds:.3f}",
        f"{judged.batch_size * judged.sequence_length / ranked.seconds:,.0f}",
        f"{mark}{ranked.bytes / GIB:.1f}",
        f"{(topology.chip.usable_bytes - ranked.bytes) / GIB:.1f}",
        ", ".join(f"{name} {seconds:.2f}" for name, seconds in largest if seconds > 0.005),
    ]


def as_json(found: Found, config: Config, topology: Topology) -> dict[str, Any]:
    """All of the table, with the overrides of each."""

    def one(ranked: Ranked) -> dict[str, Any]:
        return {
            "overrides": overrides(config, ranked.config),
            "seconds": ranked.seconds,
            "bytes": ranked.bytes,
            "own": ranked.own,
            "compiled": ranked.verdict._asdict() if ranked.verdict else None,
            "model": {
                "seconds": ranked.estimate.time.total,
                "parts": dict(ranked.estimate.time.parts),
                "bytes": ranked.estimate.memory.total,
                "components": dict(ranked.estimate.memory.parts),
            },
        }

    facts = {name: getattr(found, name) for name in ("judged", "fitting", "seconds", "late", "over_own")}
    return {
        "topology": topology.name,
        **facts,
        "own": one(found.own) if found.own else None,
        "ended": found.ended._asdict() if found.ended else None,
        "best": [one(ranked) for ranked in found.best],
    }
