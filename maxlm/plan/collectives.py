"""What a compiled step sends between devices: kind, mesh axes, bytes, and what is computed meanwhile.

The kind is what the compiler emits, which is not always what the instruction is called: over a whole TPU slice an
all-gather or a reduce-scatter may be emitted as an all-reduce, and a fusion may hold a reduce-scatter. Where the
instruction's `backend_config` names its emitter, that decides.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from maxlm.plan.hlo import Instruction, Module, bytes_of, dims, elements

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_EMITTED = (
    ("ReduceScatter", "reduce-scatter"),
    ("AllGather", "all-gather"),
    ("AllToAll", "all-to-all"),
    ("Pincer", "all-reduce"),  # a ring in both directions that sums and hands on
    ("AllReduce", "all-reduce"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that sends.

    kind: one of `KINDS`, as emitted.
    asked: what the instruction is called, where that is something else.
    axes: mesh axes that a group spans, outermost first.
    group: devices of a group.
    payload: bytes of the whole array that is gathered, summed or exchanged, in one run.
    times: runs in a step.
    asynchronous: whether other work is issued between its start and its end.
    members: devices of the first group, by their place in the mesh.
    """

    name: str
    kind: str
    asked: str
    axes: tuple[str, ...]
    group: int
    payload: float
    times: float
    asynchronous: bool
    emitter: str
    op_name: str
    members: tuple[int, ...]

    @property
    def wire(self) -> float:
        """Bytes that a device sends in one run, at least: of each kind what a ring would."""
        share = (self.group - 1) / self.group
        return self.payload * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


def find(module: Module, mesh: Mapping[str, int], *, rows_sent: float = math.inf) -> list[Collective]:
    """The collectives of a step with more than one device in a group, in no order.

    Args:
      mesh: size of every mesh axis, outermost first.
      rows_sent: that a ragged-all-to-all sends of its buffer, which has room for the worst case; infinite: all of it.
    """
    found: list[Collective] = []
    started = {name for i, _, _ in module.scheduled() if i.opcode == "async-start" for name in i.called}
    for computation, times in module.runs.items():
        if computation in started:  # what it sends is the start's
            continue
        instructions = module.computations[computation]
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for place, outer in enumerate(instructions):
            inner = _sending(module, outer)
            if inner is None:
                continue
            members = first_group(inner, math.prod(mesh.values()))
            if len(members) < 2:
                continue
            asked = _asked(inner.opcode)
            emitter = (
                re.search(r'"emitter":"(\w+)"', outer.rest) or re.search(r'"emitter":"(\w+)"', inner.rest) or [""] * 2
            )[1]
            holder = shapes if inner is outer else _shapes_around(module, outer, inner)
            kind = emitted_kind(asked, emitter)
            end = _end(instructions, place) if outer.opcode.endswith("-start") else place
            found.append(
                Collective(
                    name=outer.name,
                    kind=kind,
                    asked=asked,
                    axes=spanned(members, mesh),
                    group=len(members),
                    payload=_payload(inner, asked, holder) * (_used(inner, rows_sent) if "ragged" in asked else 1.0),
                    times=times,
                    asynchronous=end > place + 1,
                    emitter=emitter,
                    op_name=inner.op_name or outer.op_name,
                    members=members,
                )
            )
    return found


def emitted_kind(asked: str, emitter: str) -> str:
    """The kind that an emitter of the TPU compiler sends; that of the instruction where it is not known."""
    return next((kind for part, kind in _EMITTED if part in emitter), asked)


def _asked(opcode: str) -> str:
    return opcode.removesuffix("-start")


def _sending(module: Module, instruction: Instruction) -> Instruction | None:
    """The collective that an instruction is or holds; None of what does not send, and of the end of what does."""
    if _asked(instruction.opcode) in KINDS:
        return instruction
    if instruction.opcode in ("fusion", "async-start"):
        return next((inner for inner in module.inside(instruction) if _asked(inner.opcode) in KINDS), None)
    return None


def _shapes_around(module: Module, outer: Instruction, inner: Instruction) -> dict[str, str]:
    for name in outer.called:
        instructions = module.computations.get(name, [])
        if any(i is inner for i in instructions):
            return {i.name: i.shape for i in instructions}
        for nested in instructions:
            if nested.opcode == "fusion" and (shapes := _shapes_around(module, nested, inner)):
                return shapes
    return {}


def _payload(instruction: Instruction, asked: str, shapes: Mapping[str, str]) -> float:
    if asked == "reduce-scatter":
        return sum(bytes_of(shapes[name]) for name in instruction.operands)
    parts = elements(instruction.shape)
    # A start has operands, results and on some platforms a context, each a tuple where several arrays go together;
    # that of an all-reduce has results alone, unless it is written as one of the general kind.
    if instruction.opcode.endswith("-start") and len(parts) > 1 and (asked != "all-reduce" or parts[0].startswith("(")):
        return bytes_of(parts[1])
    return bytes_of(instruction.shape)


def _used(exchange: Instruction, rows: float) -> float:
    """The part of the buffer that so many rows take."""
    parts = elements(exchange.shape)
    buffer = dims(parts[1] if exchange.opcode.endswith("-start") and len(parts) > 1 else exchange.shape)
    return min(rows / buffer[0], 1.0) if buffer else 1.0


def _end(instructions: list[Instruction], start: int) -> int:
    """Where the instruction that waits for a start stands; the end of the computation if it is in none."""
    waiting = {instructions[start].name}
    for place in range(start + 1, len(instructions)):
        instruction = instructions[place]
        if waiting.intersection(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return place
            if instruction.opcode.endswith("-update"):
                waiting.add(instruction.name)
    return len(instructions)


# --- groups ----------------------------------------------------------------------------------------------------------


def first_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The devices of the first group of a collective, by their place in the mesh.

    Of a permute those of the first cycle between different devices; () where each device keeps what it has.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.rest):
        both = [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        targets = {source: target for source, target in both if source != target}
        if not targets:
            return ()
        chain = [min(targets)]
        while (following := targets.get(chain[-1])) is not None and following not in chain:
            chain.append(following)
        return tuple(chain)
    text = instruction.rest
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    ):
        return _named_group(*named.groups(), devices=devices)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        order = _iota(iota[2], iota[3])
        return tuple(int(x) for x in order.reshape(_numbers(iota[1]))[0])
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return tuple(_numbers(re.findall(r"\{([\d,]*)\}", listed[1])[0]))
    return tuple(range(devices))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _iota(shape: str, transposed: str | None) -> np.ndarray:
    order = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return order.transpose(_numbers(transposed)) if transposed else order


def _named_group(axes: str, shape: str | None, transposed: str | None, chosen: str, *, devices: int) -> tuple[int, ...]:
    """Of `mesh['a'=16,'b'=4], device_ids=([4,16]T(1,0)) {'a'}`; a part of an axis is written `'a':(2)4`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = _iota(shape, transposed) if shape else np.arange(devices)
    order = order.reshape(list(sizes.values()))
    index: list[slice | int] = [0] * len(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        place = list(sizes).index(name)
        if not part:
            index[place] = slice(None)
            continue
        stride = sizes[name] // (int(before) * int(part))
        index[place] = slice(0, stride * int(part), stride)
    return tuple(int(x) for x in order[tuple(index)].ravel())


def spanned(members: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.array(np.unravel_index(np.array(members), tuple(mesh.values())))
    return tuple(axis for axis, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1)


# --- sums ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a kind over the same axes, in a step. Bytes are a device's."""

    kind: str
    axes: tuple[str, ...]
    count: float
    payload: float
    wire: float
    exposed: float  # of the payload: what no other work was issued beside
    asked: tuple[str, ...]  # what the instructions are called, where the compiler emits another kind


def by_kind_and_axes(collectives: list[Collective]) -> list[Traffic]:
    """The sums, the largest on the wire first."""
    rows = []
    for (kind, axes), items in itertools.groupby(
        sorted(collectives, key=lambda c: (c.kind, c.axes)), key=lambda c: (c.kind, c.axes)
    ):
        same = list(items)
        rows.append(
            Traffic(
                kind=kind,
                axes=axes,
                count=sum(c.times for c in same),
                payload=sum(c.times * c.payload for c in same),
                wire=sum(c.times * c.wire for c in same),
                exposed=sum(c.times * c.payload for c in same if not c.asynchronous),
                asked=tuple(sorted({c.asked for c in same if c.asked != kind})),
            )
        )
    return sorted(rows, key=lambda row: -row.wire)
