"""All that is known of a run before its hardware is rented, in one record: memory, traffic, time, tokens and money."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from maxlm.config import Config
from maxlm.model.flops import ledger
from maxlm.plan import collectives, hlo, memory, predict, stages, uneven
from maxlm.plan.compile import Step
from maxlm.plan.topology import Topology
from maxlm.train.outlook import at_heaviest, equal_steps, heaviest, run_stretches, run_tokens

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on some hardware. Bytes and FLOPs are those of a device, unless a name says otherwise.

    name: of the run.
    hardware: in words.
    mesh: size of every mesh axis.
    usable: bytes that a device leaves to programs; 0: not known.
    refused: what the compiler says against it; "" where nothing.
    phase: which steps of a run with phases the figures are of, the heaviest ones; "" where all are alike.
    notes: what a reader has to know to judge the figures.
    price: dollars an hour of a device; 0: not known.
    run_tokens: of the whole run. run_steps: as many of the steps planned as take the FLOPs of the whole run.
    compiler: facts of the compilation: versions, options, seconds, bytes.
    """

    name: str
    topology: str
    hardware: str
    devices: int
    mesh: Mapping[str, int]
    attention: str
    rows: int
    positions: int
    phase: str
    parameters: int
    usable: float
    memory: memory.Memory
    refused: str
    traffic: tuple[collectives.Traffic, ...]
    forecast: predict.Forecast
    notes: tuple[str, ...]
    price: float
    run_tokens: int
    run_steps: float
    compiler: Mapping[str, Any]

    @property
    def spare(self) -> float:
        """Bytes that are left; below 0: that are missing."""
        return self.usable - self.memory.total

    @property
    def fits(self) -> bool:
        """Whether a device can hold the step."""
        return not self.refused and (self.spare >= 0 or not self.usable)

    @property
    def days(self) -> float:
        """Of the whole run, were it never to stop. Phases go by their FLOPs."""
        return self.run_steps * self.forecast.seconds / DAY

    @property
    def dollars(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.devices * self.price


def make_plan(config: Config, topology: Topology, step: Step, *, price: float | None = None) -> Plan:
    """What a compiled step says: of a run with phases the heaviest.

    Args:
      price: dollars an hour of a device; None: the table's.
    """
    run, config = config, at_heaviest(config)
    module = uneven.settled(stages.weighted(hlo.parse(step.program), config), config)
    sent = collectives.find(module, step.mesh, rows_sent=uneven.even_rows(config))
    notes = []
    if not step.whole:
        notes.append(
            "compiled until its memory was laid out: times are by FLOPs and bytes, and reductions that the compiler "
            "will still turn into reduce-scatters are counted as all-reduces"
        )
    elif topology.chip.platform != "tpu":
        notes.append("this platform's compiler estimates no cycles: times are by FLOPs and bytes")
    forecast = predict.forecast(config, topology, step, module, sent)
    if loops := uneven.once(module):
        made_by = ", ".join(sorted({memory.readable(loop.op_name) or loop.name for loop in loops}))
        notes.append(f"how often these loops turn depends on the data, and they are counted as if once: {made_by}")
    if forecast.kernels or sent:
        notes.append(
            "kernels and collectives, which the compiler does not estimate, are priced by the rules in docs/plan.md"
        )
    return Plan(
        name=config.name,
        topology=topology.name,
        hardware=topology.describe(),
        devices=topology.devices,
        mesh=step.mesh,
        attention=step.attention,
        rows=config.data.batch_size,
        positions=config.data.sequence_length,
        phase=phase_planned(run),
        parameters=ledger(config.model, sequence_length=config.data.sequence_length).params_total,
        usable=topology.chip.usable_bytes,
        memory=memory.read_memory(module, step.buffers, step.ranges),
        refused=step.refused,
        traffic=tuple(collectives.by_kind_and_axes(sent)),
        forecast=forecast,
        notes=tuple(notes),
        price=topology.chip.price if price is None else price,
        run_tokens=run_tokens(run),
        run_steps=equal_steps(run),
        compiler={
            "versions": dict(step.versions),
            "seconds": list(step.seconds),
            "bytes": step.compiler_bytes,
            "to the end": step.whole,
            "cached": step.cached,
            "analysis": dict(step.analysis),
        },
    )


def phase_planned(config: Config) -> str:
    """Which steps of a run with phases are planned and judged, in words; "" where all are alike."""
    stretches, most = run_stretches(config), heaviest(config)
    if len({stretch.shape for stretch in stretches}) < 2:
        return ""
    last = most.from_step + most.steps - 1
    return f"steps {most.from_step:,} to {last:,}, the heaviest of the run's {len(stretches)} phases"


def as_json(plan: Plan) -> str:
    """All figures of a plan, with what is derived from them; `uncompiled.figures` has the same names for its own."""
    derived = {name: getattr(plan, name) for name in ("fits", "spare", "days", "dollars")} | {"compiled": True}
    return json.dumps({**dataclasses.asdict(plan), **derived}, indent=1) + "\n"
