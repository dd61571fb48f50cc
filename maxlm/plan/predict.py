"""How long a compiled step takes, from the compiler's own estimates and stated rules for what it leaves out.

The schedule is walked in its order. An instruction takes the compiler's estimate of its cycles at the chip's clock;
where there is none (GPUs, CPUs, programs that were not compiled to the end) it takes the longer of its FLOPs at
`PRODUCTS` of the peak and its bytes at the memory's bandwidth. Kernels that the compiler cannot look into are priced by
`KERNELS`, collectives by `network.seconds`: a synchronous one stops the device, an asynchronous one only where it is
not done when its result is asked for. Collectives queue for the links. A loop takes its body's time as often as it
turns; of a conditional's branches the dearest counts, where it is not known how often each runs (`plan/uneven.py`).
In a pipeline a tick lasts as long as its slowest stage (`plan/stages.py`): seconds are of the stages that the others
wait for, FLOPs and runs of an average stage.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from maxlm.config import Config
from maxlm.model.flops import ledger, positions_seen
from maxlm.plan.collectives import Collective
from maxlm.plan.compile import Step
from maxlm.plan.hlo import Instruction, Module, bytes_of, dims, fused_flops, trips
from maxlm.plan.memory import readable
from maxlm.plan.network import seconds as network_seconds
from maxlm.plan.network import span
from maxlm.plan.stages import Choice, Part, Place, choices, parts, table_of
from maxlm.plan.topology import Topology
from maxlm.plan.uneven import even_rows

PRODUCTS = 0.8
"""Share of the peak that products are taken to reach where the compiler has no estimate; by its own estimates the
products of an 8B step on v5p reach 0.79."""
KERNELS = {"attention": 0.5, "grouped product": 0.7}
"""Share of the peak that kernels are taken to reach; of others nobody knows the FLOPs, and their bytes count."""
_ATTENTION = (
    ("SoftmaxBackward", (3, 2)),
    ("fmha", (1, 1)),
    ("dkv", (2, 2)),
    ("dq", (2, 1)),
    ("mha_backward", (4, 3)),
    ("mha_forward", (1, 1)),
    ("fwd", (1, 1)),
)
"""Products of an attention kernel with a head's dim of queries and keys, and with that of values: scores and values
forward; backward it computes the scores again; splash in both of its kernels, Triton in both of
its loops."""
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "iota")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A hand-written kernel: runs and seconds in a step, and by which rule."""

    name: str
    runs: float
    flops: float
    seconds: float
    rule: str


@dataclasses.dataclass(frozen=True)
class Busy:
    """Time of all instructions that one piece of code became, in a step."""

    made_by: str
    kind: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A step in seconds, and what follows from it.

    parts: products, kernels, other work (elementwise, copies), and `waiting for <axes>`.
    hidden: seconds of communication that other work covers.
    busiest: the ten pieces of code that take most.
    by_cycles: whether the compiler estimated the cycles.
    compiled_flops: of a device in a step; kernels are within it.
    model_flops: what the model asks of a device (causal-exact, without any recomputation).
    mfu_causal, mfu_6n: share of the peak in both conventions; None where the peak is not known.
    """

    seconds: float
    parts: Mapping[str, float]
    hidden: float
    kernels: tuple[Kernel, ...]
    busiest: tuple[Busy, ...]
    by_cycles: bool
    compiled_flops: float
    model_flops: float
    tokens: int
    tokens_per_second: float
    mfu_causal: float | None
    mfu_6n: float | None


def forecast(config: Config, topology: Topology, step: Step, module: Module, sent: list[Collective]) -> Forecast:
    """The forecast of a step.

    Args:
      sent: the step's collectives.
    """
    walk = _Walk(config, topology, step, module, sent)
    walk.run(module.entry, _ONCE)
    total = sum(walk.parts.values())
    counts = ledger(config.model, sequence_length=config.data.sequence_length)
    tokens = config.data.batch_size * config.data.sequence_length
    peak = topology.chip.peak(config.train.precision) * topology.devices
    rate = tokens / total if total else 0.0
    return Forecast(
        seconds=total,
        parts=dict(walk.parts),
        hidden=walk.hidden,
        kernels=tuple(Kernel(name, *walk.kernels[name]) for name in walk.kernels),
        busiest=tuple(
            Busy(*key, seconds) for key, seconds in heapq.nlargest(10, walk.busy.items(), key=lambda item: item[1])
        ),
        by_cycles=walk.by_cycles,
        compiled_flops=walk.flops,
        model_flops=counts.causal_exact * tokens / topology.devices,
        tokens=tokens,
        tokens_per_second=rate,
        mfu_causal=counts.causal_exact * rate / peak if peak else None,
        mfu_6n=counts.six_n * rate / peak if peak else None,
    )


class _Times(NamedTuple):
    """How often something is run in a step: as it is waited for, which counts for seconds; and by an average device."""

    waited: float
    run: float

    def by(self, waited: float, run: float | None = None) -> _Times:
        """So many times as often."""
        return _Times(self.waited * waited, self.run * (waited if run is None else run))


_ONCE, _NEVER = _Times(1.0, 1.0), _Times(0.0, 0.0)


class _Walk:
    """One pass over the schedule."""

    def __init__(self, config: Config, topology: Topology, step: Step, module: Module, sent: list[Collective]) -> None:
        self.config, self.chip, self.module = config, topology.chip, module
        self.parts: dict[str, float] = collections.defaultdict(float)
        self.busy: dict[tuple[str, str], float] = collections.defaultdict(float)
        self.kernels: dict[str, tuple[float, float, float, str]] = {}
        self.hidden, self.flops = 0.0, 0.0
        # Before its memory is laid out the compiler has estimated a few instructions, or none.
        self.by_cycles = step.whole and any(i.cycles for i, _, _ in module.scheduled())
        self.place: Place | None = None
        self.ticks: dict[Place, Part] = {}
        self.sent = {
            c.name: (
                "waiting for " + "+".join(c.axes),
                network_seconds(
                    c.kind, c.payload, span(topology, [step.places[place] for place in c.members]), topology
                ),
            )
            for c in sent
        }
        table = table_of(config)
        self.choices = choices(module) if table else {}
        if table:
            self.ticks = parts(table, self._unit_seconds)

    def _unit_seconds(self, place: Place) -> float:
        return sum(
            self._at(place, choice, _NEVER)
            for choice in self.choices.values()
            if not choice.chunk and place.does(choice)
        )

    def run(self, computation: str, times: _Times) -> float:
        """Seconds of one run of a computation; adds `times` of it to the sums."""
        instructions = self.module.computations[computation]
        shapes = {i.name: i.shape for i in instructions}
        clock, links_free = 0.0, 0.0
        due: dict[str, tuple[float, str]] = {}  # of what was started: when it is done, and what to call waiting for it
        for instruction in instructions:
            waited = next((name for name in instruction.operands if name in due), None)
            if waited is not None and instruction.opcode.endswith("-update"):
                due[instruction.name] = due.pop(waited)
            elif waited is not None and instruction.opcode.endswith("-done"):
                done, name = due.pop(waited)
                wait = max(0.0, done - clock)
                self.parts[name] += wait * times.waited
                self.hidden -= wait * times.waited
                clock += wait
            elif instruction.name in self.sent:
                name, cost = self.sent[instruction.name]
                links_free = max(clock, links_free) + cost
                if instruction.opcode.endswith("-start"):
                    due[instruction.name] = links_free, name
                    self.hidden += cost * times.waited
                else:
                    self.parts[name] += (links_free - clock) * times.waited
                    clock = links_free
                    clock += self._work(instruction, shapes, computation, times, fused=True)
            elif instruction.opcode == "while":
                turns = trips(self.module, instruction)
                clock += turns * self.run(instruction.attribute("body").lstrip("%"), times.by(turns))
            elif instruction.opcode == "conditional":
                choice = self.choices.get(instruction.name)
                if choice:
                    clock += self._chosen(choice, times)
                elif all(branch in self.module.shares for branch in instruction.called):
                    clock += sum(self._share(branch, times) for branch in instruction.called)
                else:
                    clock += self._dearest(instruction, times)
            elif instruction.opcode == "call":
                clock += self.run(instruction.called[0], times)
            else:
                clock += self._work(instruction, shapes, computation, times)
        return clock

    def _chosen(self, choice: Choice, times: _Times) -> float:
        """Of a conditional of the pipeline's executor; seconds of a tick, over all ticks."""
        if choice.chunk and self.place is not None:
            return self.run(choice.taken if self.place.does(choice) else choice.left, times)
        seconds, left = 0.0, Part(1.0, 1.0)
        for place, part in self.ticks.items():
            if place.does(choice):
                seconds += part.slowest * self._at(place, choice, times.by(*part))
                left = Part(left.slowest - part.slowest, left.average - part.average)
        return seconds + left.slowest * self.run(choice.left, times.by(*left))

    def _at(self, place: Place, choice: Choice, times: _Times) -> float:
        self.place = place
        seconds = self.run(choice.taken, times)
        self.place = None
        return seconds

    def _share(self, branch: str, times: _Times) -> float:
        """Of a branch that runs in a known part of its conditional's turns: seconds of one turn, on average."""
        share = self.module.shares[branch]
        return share * self.run(branch, times.by(share))

    def _dearest(self, instruction: Instruction, times: _Times) -> float:
        before = (self.parts, self.busy, self.kernels, self.hidden, self.flops)
        results = []
        for branch in instruction.called:
            self.parts, self.busy, self.kernels = before[0].copy(), before[1].copy(), dict(before[2])
            self.hidden, self.flops = before[3:]
            cost = self.run(branch, times)
            results.append((cost, (self.parts, self.busy, self.kernels, self.hidden, self.flops)))
        cost, after = max(results, key=lambda result: result[0])
        self.parts, self.busy, self.kernels, self.hidden, self.flops = after
        return cost

    def _work(
        self,
        instruction: Instruction,
        shapes: Mapping[str, str],
        computation: str,
        times: _Times,
        *,
        fused: bool = False,
    ) -> float:
        """Of an instruction on its own device; `fused` with a collective, whose bytes are not counted again."""
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-start", "-done", "-update")):
            return 0.0
        if instruction.opcode == "custom-call" and (kernel := self._kernel(instruction, shapes)):
            name, flops, cost, rule = kernel
            runs, all_flops, all_seconds, _ = self.kernels.get(name, (0.0, 0.0, 0.0, ""))
            self.kernels[name] = (
                runs + times.run,
                all_flops + flops * times.run,
                all_seconds + cost * times.waited,
                rule,
            )
            kind = "kernels"
        else:
            flops = fused_flops(self.module, computation, instruction)
            kind = "products" if flops else "other work"
            if self.by_cycles:
                cost = instruction.cycles / self.chip.clock
            else:
                moved = 0.0 if fused else _moved(instruction, shapes, self.module)
                cost = max(
                    flops / (PRODUCTS * self.chip.peak(self.config.train.precision) or float("inf")),
                    moved / (self.chip.hbm_bandwidth or float("inf")),
                )
        self.flops += flops * times.run
        if cost:
            self.parts[kind] += cost * times.waited
            self.busy[readable(instruction.op_name) or instruction.opcode, kind] += cost * times.waited
        return cost

    def _kernel(self, instruction: Instruction, shapes: Mapping[str, str]) -> tuple[str, float, float, str] | None:
        """(name, FLOPs, seconds, rule) of a hand-written kernel; None for another call."""
        target = instruction.attribute("custom_call_target").strip('"')
        if target.startswith("__cudnn$fmha"):
            name = target.removeprefix("__")
        elif target in ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"):
            name = re.sub(r"[.\d]+$", "", instruction.name)
        else:
            return None
        kind, flops = _kernel_flops(name, instruction, shapes, self.config)
        peak = self.chip.peak(self.config.train.precision)
        moved = bytes_of(instruction.shape) + sum(bytes_of(shapes.get(operand, "")) for operand in instruction.operands)
        moving, share = moved / self.chip.hbm_bandwidth, KERNELS.get(kind, 0.0)
        multiplying = flops / (share * peak) if share else 0.0
        if multiplying > moving:
            return name, flops, multiplying, f"{kind}, {share:.0%} of the peak"
        return name, flops, moving, f"{kind}, bytes at the memory's bandwidth"


def _moved(instruction: Instruction, shapes: Mapping[str, str], module: Module) -> float:
    """Bytes that an instruction reads and writes; of a stack that a layer is taken from or put into, that layer."""
    if instruction.opcode == "fusion" and instruction.called:
        return _moved_inside(module.computations[instruction.called[0]], module)
    result = bytes_of(instruction.shape)
    taken = [bytes_of(shapes.get(name, "")) for name in instruction.operands]
    if "dynamic_update" in instruction.op_name or "dynamic-update" in instruction.name:
        return 2.0 * sum(size for size in taken if size < result)
    if "dynamic_slice" in instruction.op_name or "dynamic-slice" in instruction.name:
        taken = [min(size, result) for size in taken]
    return result + sum(taken)


def _moved_inside(fusion: Sequence[Instruction], module: Module) -> float:
    """`_moved` of what is fused into one: its inputs, and its results."""
    return sum(_read(fusion, module).values()) + _written(fusion, module)


def _origins(fusion: Sequence[Instruction]) -> Callable[[str], Instruction]:
    """What made an array of a fusion, by the array's name: bitcasts make none."""
    made = {i.name: i for i in fusion}

    def origin(name: str) -> Instruction:
        found = made[name]
        return origin(found.operands[0]) if found.opcode == "bitcast" else found

    return origin


def _read(fusion: Sequence[Instruction], module: Module) -> dict[int, float]:
    """Bytes that a fusion reads of each of its inputs, by its number. Fusions within it are looked into."""
    origin, names = _origins(fusion), {i.name for i in fusion}
    uses: dict[str, list[tuple[Instruction, int]]] = {}
    for user in fusion:
        for place, name in enumerate(user.operands if user.opcode not in ("bitcast", "parameter", "tuple") else ()):
            if name in names:
                uses.setdefault(origin(name).name, []).append((user, place))

    def read(user: Instruction, place: int, whole: float) -> float:
        if user.opcode == "fusion" and user.called:
            return _read(module.computations[user.called[0]], module).get(place, whole)
        if user.opcode == "dynamic-slice" and not place:
            return min(bytes_of(user.shape), whole)
        return 0.0 if user.opcode == "dynamic-update-slice" and not place else whole

    found = {}
    for given in (i for i in fusion if i.opcode == "parameter"):
        whole = bytes_of(given.shape)
        found[int(given.operands[0])] = max((read(*use, whole) for use in uses.get(given.name, [])), default=0.0)
    return found


def _written(fusion: Sequence[Instruction], module: Module) -> float:
    """Bytes that a fusion writes; of a stack that a layer is put into, that layer."""
    origin = _origins(fusion)

    def written(result: Instruction) -> float:
        if result.opcode == "parameter":
            return 0.0
        if result.opcode == "fusion" and result.called:
            return _written(module.computations[result.called[0]], module)
        part = result.opcode == "dynamic-update-slice"
        return bytes_of(origin(result.operands[1]).shape if part else result.shape)

    root = next(i for i in fusion if i.root)
    results = [origin(name) for name in root.operands] if root.opcode == "tuple" else [origin(root.name)]
    return sum(map(written, results))


def _kernel_flops(name: str, instruction: Instruction, shapes: Mapping[str, str], config: Config) -> tuple[str, float]:
    operands = [dims(shapes.get(operand, "")) for operand in instruction.operands]
    called = f"{name} {instruction.op_name}"
    wide = [(1, *shape)[-4:] for shape in operands if len(shape) in (3, 4)]  # a device's only row has no dim
    products = next((counts for part, counts in _ATTENTION if part in called), None)
    if products and wide:  # queries are the largest: (B, H, S, h) or (B, S, H, h), and positions outnumber heads
        rows, *sides, _ = max(wide, key=math.prod)
        length, heads = max(sides), min(sides)
        attention = config.model.attention
        seen = sum(positions_seen(window, length) for window in attention.windows) / len(attention.windows)
        dims_of = products[0] * attention.head_dim + products[1] * attention.value_dim
        return "attention", 2.0 * rows * heads * length * seen * dims_of
    if "gmm" in name or "grouped" in instruction.op_name:
        arrays = [*operands, dims(instruction.shape)]
        matrices = [shape for shape in arrays if len(shape) == 3]
        flat = [shape for shape in arrays if len(shape) == 2]
        if matrices and flat:
            # A buffer has room for the worst case; the kernel passes over rows that are not there.
            sent = min(max(shape[0] for shape in flat), even_rows(config))
            return "grouped product", 2.0 * sent * matrices[0][1] * matrices[0][2]
    return "other", 0.0
