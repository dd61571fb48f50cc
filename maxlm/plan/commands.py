"""`maxlm plan` and `maxlm explain`: read the flags and call the parts that do the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
from absl import flags
from ml_collections import ConfigDict

from maxlm.chips import CHIPS, load_chips
from maxlm.config import MESH_AXES, Config
from maxlm.errors import UserError
from maxlm.files import check_asked, write_asked
from maxlm.parallel.mesh import check_spreads
from maxlm.plan import searching
from maxlm.plan.plan import phase_planned
from maxlm.plan.topology import Topology, parse_topology
from maxlm.resolve import ConfigError, resolve
from maxlm.train.progress import plain_console

Log = Callable[[str], None]
OF_ONE_PLAN = ("html", "price", "memory_only", "mtbf", "stall_seconds", "write_seconds")
"""Flags that say something of one plan, and nothing of a search."""
OF_A_SEARCH = ("winner", "budget_minutes")
"""And the other way round."""
OF_FAILURES = ("stall_seconds", "write_seconds")
"""And what says something to `--mtbf` alone."""


def define_flags(values: flags.FlagValues) -> None:
    """The flags of `plan`."""
    define_hardware(values)
    flags.DEFINE_string("html", None, "also write a page with charts to this file", flag_values=values)
    flags.DEFINE_float("price", None, "dollars an hour of a device; the table's", flag_values=values, lower_bound=0.0)
    flags.DEFINE_bool(
        "memory_only", False, "stop compiling when the memory is laid out: minutes sooner", flag_values=values
    )
    flags.DEFINE_float(
        "limit_gib", 24.0, "memory that the compiler may take, in GiB", flag_values=values, lower_bound=1.0
    )
    flags.DEFINE_string(
        "options", None, "the compiler's, as name=value,...; none: its defaults; those of the chip", flag_values=values
    )
    flags.DEFINE_string(
        "plan_cache", "~/.cache/maxlm/plans", "folder of compiled plans; empty: none", flag_values=values
    )
    searching.define_flags(values)


def define_hardware(values: flags.FlagValues) -> None:
    """The flags that `plan` and `explain` have in common."""
    flags.DEFINE_string("topology", None, "hardware: v5p-128, 2*v6e-256, h100x8x16, cpu-8", flag_values=values)
    flags.DEFINE_string("chips", None, "JSON file of chips to add to the table", flag_values=values)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=values)


def plan(values: flags.FlagValues, *, log: Log) -> int:
    """Compiles the step and prints the page; returns the exit code: 1 where the step does not fit."""
    _check_flags(values)
    check_asked(values.json, values.html, values.winner if values.search else None)
    options = _options(values.options)
    if values.search:
        topology = _topology(values)
        config = _for_any_mesh(values.config, topology, log=log)
    else:
        config, topology = planned(values)
        check_spreads(config.parallel, devices=topology.devices, slices=topology.slices)
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with something else
    if values.search:
        if phase := phase_planned(config):
            log(f"judged are {phase}")
        return searching.run_search(values, config, topology, options=options, log=log)
    from maxlm.plan.compile import NotHere, check_installed, compile_step, is_kept
    from maxlm.plan.html import render
    from maxlm.plan.page import print_plan
    from maxlm.plan.plan import as_json, make_plan

    try:
        check_installed(config, topology)
    except NotHere as error:
        log(f"{error}")
        return _uncompiled(values, config, topology, log=log)
    whole = not values.memory_only
    if not whole and topology.chip.platform == "tpu" and values.plan_cache:
        whole = is_kept(config, topology, cache=values.plan_cache, options=options)
        if whole:
            log("it was compiled to the end before: that is read, and times are by the compiler's cycles")
    step = compile_step(
        config,
        topology,
        whole=whole,
        cache=values.plan_cache or None,
        limit=int(values.limit_gib * 2**30),
        options=options,
        log=log,
    )
    made = make_plan(config, topology, step, price=values.price)
    if topology.chip.platform == "cpu":
        from maxlm.plan.forecast import on_this_machine

        made = on_this_machine(made, config)
    write_asked(values.json, as_json(made))
    write_asked(values.html, render(made))
    print_plan(made, plain_console())
    if not made.fits:
        needs = max(float(made.memory.total), made.usable if made.refused else 0.0)
        searching.print_changes(needs, config, topology, log=log)
    if values.mtbf:
        searching.print_failures(values, config, topology, log=log)
    return 0 if made.fits else 1


def _uncompiled(values: flags.FlagValues, config: Config, topology: Topology, *, log: Log) -> int:
    """The plan of the analytical model alone; the exit code."""
    from maxlm.plan.analytic import estimate
    from maxlm.plan.uncompiled import as_json, figures, print_figures

    found = figures(config, topology, estimate(config, topology), price=values.price)
    write_asked(values.json, as_json(found))
    print_figures(found, plain_console())
    if not found["fits"]:
        searching.print_changes(found["memory"]["total"], config, topology, log=log)
    if values.html:
        log(f"--html={values.html} is not written: its charts are of what the compiler says")
    if values.mtbf:
        searching.print_failures(values, config, topology, log=log)
    return 0 if found["fits"] else 1


def explain(values: flags.FlagValues, *, log: Log) -> int:
    """Prints the resolved sharding table; returns the exit code."""
    config, topology = planned(values)
    from maxlm.plan.explain import as_json, explanation, print_explanation

    told = explanation(config)
    write_asked(values.json, as_json(told))
    print_explanation(told, topology, plain_console())
    return 0


def planned(values: flags.FlagValues) -> tuple[Config, Topology]:
    """The run that a command is about, and its hardware; the config's mesh has as many devices.

    Raises:
      UserError: one of them is not known, or they do not go together.
    """
    topology = _topology(values)
    return resolve(values.config, devices=topology.devices), topology


def _topology(values: flags.FlagValues) -> Topology:
    return parse_topology(values.topology, load_chips(values.chips) if values.chips else CHIPS)


def _for_any_mesh(given: ConfigDict, topology: Topology, *, log: Log) -> Config:
    """The run that a search is about. Its mesh, which is what is looked for, may be for other hardware.

    Raises:
      ConfigError: naming the problems that another mesh does not mend.
    """
    try:
        return resolve(given, devices=topology.devices)
    except ConfigError as error:
        raw, one = given.to_dict(), dict.fromkeys((*MESH_AXES, "virtual_stages"), 1)
        if not isinstance(raw.get("parallel"), Mapping):
            raise
        config = resolve(raw | {"parallel": raw["parallel"] | one})
        log(f"the config's own mesh is no candidate: {'; '.join(error.problems)}")
    own = {name: size for name, size in raw["parallel"].items() if name in one}
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **own))


def _check_flags(values: flags.FlagValues) -> None:
    given = _given(values, OF_ONE_PLAN if values.search else OF_A_SEARCH)
    if given and not values.search:
        raise UserError(
            f"{' and '.join(given)} {'are' if len(given) > 1 else 'is'} of a search; type --search besides, or plan "
            "without"
        )
    if given:
        raise UserError(
            f"--search compares many plans, and {' and '.join(given)} {'are' if len(given) > 1 else 'is'} of one; "
            f"search first, then plan with {' '.join(given)} and the winner's flags"
        )
    if not values.mtbf and (given := _given(values, OF_FAILURES)):
        raise UserError(f"{' and '.join(given)} say what a failure costs, to --mtbf alone; type --mtbf=HOURS besides")


def _given(values: flags.FlagValues, names: tuple[str, ...]) -> list[str]:
    """Those that are not as they are without being typed."""
    return [f"--{name}" for name in names if values[name].value != values[name].default]


def _options(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",") if part and text != "none"]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise UserError(f"--options has {wrong[0]!r}; write name=value,name=value, or none")
    return {name: value for name, _, value in pairs}
