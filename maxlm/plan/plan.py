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
from maxlm.train.outlook import run_tokens

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on some hardware. Bytes and FLOPs are those of a device, unless a name says otherwise.

    name: of the run.
    hardware: in words.
    mesh: size of every mesh axis.
    usable: bytes that a device leaves to programs; 0: not known.
    refused: what the compiler says against it; "" where nothing.
    notes: what a reader has to know to judge the figures.
    price: dollars an hour of a device; 0: not known.
    run_tokens: of the whole run.
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
    parameters: int
    usable: float
    memory: memory.Memory
    refused: str
    traffic: tuple[collectives.Traffic, ...]
    forecast: predict.Forecast
    notes: tuple[str, ...]
    price: float
    run_tokens: int
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
        """Of the whole run, were it never to stop."""
        rate = self.forecast.tokens_per_second
        return self.run_tokens / rate / DAY if rate else 0.0

    @property
    def dollars(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.devices * self.price


def make_plan(config: Config, topology: Topology, step: Step, *, price: float | None = None) -> Plan:
    """What a compiled step says.

    Args:
      price: dollars an hour of a device; None: the table's.
    """
    module = uneven.settled(stages.weighted(hlo.parse(step.program), config), config)
    sent = collectives.find(module, step.mesh)
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
        parameters=ledger(config.model, sequence_length=config.data.sequence_length).params_total,
        usable=topology.chip.usable_bytes,
        memory=memory.read_memory(module, step.buffers, step.ranges),
        refused=step.refused,
        traffic=tuple(collectives.by_kind_and_axes(sent)),
        forecast=forecast,
        notes=tuple(notes),
        price=topology.chip.price if price is None else price,
        run_tokens=run_tokens(config),
        compiler={
            "versions": dict(step.versions),
            "seconds": list(step.seconds),
            "bytes": step.compiler_bytes,
            "to the end": step.whole,
            "cached": step.cached,
            "analysis": dict(step.analysis),
        },
    )


def as_json(plan: Plan) -> str:
    """All figures of a plan, with what is derived from them."""
    derived = {name: getattr(plan, name) for name in ("fits", "spare", "days", "dollars")}
    return json.dumps({**dataclasses.asdict(plan), **derived}, indent=1) + "\n"
