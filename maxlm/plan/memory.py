"""What a device holds at the fullest moment of a compiled step, by component and by the code that made it.

Read from two reports that XLA dumps when it has laid out a program's memory: the buffer assignment (every array's place
and size) and the live ranges (from which instruction to which it is needed). A place that several arrays take in turn
counts once. State is there all the time; temporaries share one region, whose size is that of the fullest moment plus
what could not be packed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from maxlm.plan.hlo import Instruction, Module, dims

COMPONENTS = (
    "parameters",
    "optimizer",
    "moving average",
    "batch and counters",
    "gradients",
    "weights in the compute dtype",
    "gathered weights",
    "kept activations",
    "loss",
    "temporaries",
    "gaps",
)
"""In the order of the page. Gaps are what could not be packed, and outputs that take no input's place."""

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(?:, (.*?))?:?$")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)(\{[\d,]*\})?( \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\): (.*)$")
_RANGE = re.compile(r"^\s+(\S+?)(\{[\d,]*\}):(\d+)-(\d+)$")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array at its place in the region of temporaries, or an input of the program.

    component: one of `COMPONENTS`.
    made_by: the path of the code that made it.
    """

    name: str
    size: int
    shape: str
    component: str
    made_by: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device. `components` add up to `total`; `largest` are the ten largest arrays of the moment."""

    total: int
    components: Mapping[str, int]
    largest: tuple[Buffer, ...]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Arrays that take the same place one after another and hand their content on: a loop's input, state and result."""

    names: list[str]
    size: int
    shape: str
    start: int
    end: int


def read_memory(module: Module, buffers: str, ranges: str) -> Memory:
    """The fullest moment.

    Args:
      module: the program.
      buffers, ranges: the texts of the dumped `...-buffer-assignment.txt` and `...-live-range.txt`.
    """
    inputs, region, values, other = _allocations(buffers)
    made = {i.name: i for instructions in module.computations.values() for i in instructions}
    sources = {i.operands[0]: i for i in module.computations[module.entry] if i.opcode == "parameter"}
    held: list[Buffer] = []
    for number, size in inputs.items():
        source = sources[number]
        held.append(
            Buffer(source.name, size, source.shape, _component_of_input(source.op_name), readable(source.op_name))
        )
    weights = {tuple(dims(buffer.shape)) for buffer in held if buffer.component == "parameters"}
    backward = _first_backward(module, ranges)
    temporaries = [
        _describe(slot, made, weights=weights, backward=backward) for slot in _fullest(_slots(values, _ranges(ranges)))
    ]
    every = held + temporaries
    components = dict.fromkeys(COMPONENTS, 0)
    for buffer in every:
        components[buffer.component] += buffer.size
    components["gaps"] = region + other - sum(buffer.size for buffer in temporaries)
    largest = sorted(every, key=lambda buffer: -buffer.size)[:10]
    return Memory(sum(components.values()), components, tuple(largest))


def _allocations(text: str) -> tuple[dict[str, int], int, list[tuple[str, int, int, str]], int]:
    """Of device memory (colour 0): parameter number -> size; size of the region; its values; what else there is."""
    inputs: dict[str, int] = {}
    region, other = 0, 0
    values: list[tuple[str, int, int, str]] = []
    inside = False
    for line in text.splitlines():
        if found := _ALLOCATION.match(line):
            size, kind = int(found[2]), found[3] or ""
            inside = False
            if "color" in kind:  # vector memory, scalars, flags
                continue
            if number := re.match(r"parameter (\d+)", kind):
                inputs[number[1]] = size
            elif "preallocated-temp" in kind:
                region, inside = region + size, True
            elif "thread-local" not in kind:
                other += size
        elif inside and (found := _VALUE.match(line)):
            name = found[1] + (found[2] or "{}")
            values.append((name, int(found[5]), int(found[6]), found[7].strip()))
    return inputs, region, values, other


def _ranges(text: str) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        if line.strip().startswith("Live ranges at"):
            break
        if match := _RANGE.match(line):
            found[match[1] + match[2]] = (int(match[3]), int(match[4]))
    return found


def _first_backward(module: Module, ranges: str) -> int:
    """The place in the schedule where the backward pass through the layers begins; past the end if there is none.

    What a loop of that pass needs once, such as weights that are cast, may stand far ahead of it, so its body counts.
    """
    order = {name: int(place) for place, name in re.findall(r"^    (\d+):(\S+)$", ranges, re.MULTILINE)}
    backward = [
        instruction.name
        for loop in (i for instructions in module.computations.values() for i in instructions if i.opcode == "while")
        if "transpose(jvp(" in loop.op_name
        for instruction in module.computations[loop.attribute("body").lstrip("%")]
    ]
    return min((order[name] for name in backward if name in order), default=len(order))


def _slots(values: list[tuple[str, int, int, str]], ranges: Mapping[str, tuple[int, int]]) -> list[_Slot]:
    """Arrays of one size, dtype and place whose ranges follow on each other are one."""
    by_place: dict[tuple[int, int, str], list[tuple[int, int, str, str]]] = {}
    for name, size, offset, shape in values:
        if name in ranges:
            start, end = ranges[name]
            key = (offset, size, shape.split("{")[0])
            by_place.setdefault(key, []).append((start, end, name, shape))
    slots: list[_Slot] = []
    for (_, size, _), items in by_place.items():
        items.sort()
        open_slot: _Slot | None = None
        for start, end, name, shape in items:
            if open_slot is not None and start <= open_slot.end + 1:
                open_slot = dataclasses.replace(open_slot, names=[*open_slot.names, name], end=max(open_slot.end, end))
                slots[-1] = open_slot
            else:
                open_slot = _Slot([name], size, shape, start, end)
                slots.append(open_slot)
    return slots


def _fullest(slots: list[_Slot]) -> list[_Slot]:
    """The slots in use at the moment when they take most."""
    changes = sorted([(slot.start, slot.size) for slot in slots] + [(slot.end + 1, -slot.size) for slot in slots])
    level, most, moment = 0, -1, 0
    for i, (time, change) in enumerate(changes):
        level += change
        if (i + 1 == len(changes) or changes[i + 1][0] != time) and level > most:
            most, moment = level, time
    return [slot for slot in slots if slot.start <= moment <= slot.end]


def _describe(slot: _Slot, made: Mapping[str, Instruction], *, weights: set[tuple[int, ...]], backward: int) -> Buffer:
    makers = [made[name.split("{")[0]] for name in slot.names if name.split("{")[0] in made]
    # A loop's state has the loop's name; what was put into it says more.
    own = [maker for maker in makers if maker.opcode not in ("while", "parameter")] or makers
    path = _telling(own)
    component = "temporaries"
    shape = tuple(dims(slot.shape))
    if "/optimizer/" in path or "/guard/" in path:
        component = "temporaries"
    elif "loss)" in path.replace("loss_and_gradients", "") or "/loss/" in path:
        component = "loss"
    elif any("all-gather" in maker.opcode for maker in own) or "all_gather" in path:
        component = "gathered weights"
    elif shape in weights or shape[1:] in weights:
        summed = slot.shape.startswith("f32") or path.endswith(("dot_general", "reduce_scatter", "psum"))
        component = "gradients" if summed else "weights in the compute dtype"
    elif "jvp(" in path and "transpose(" not in path and slot.start < backward <= slot.end:
        component = "kept activations"
    return Buffer(slot.names[0], slot.size, slot.shape.split("{")[0], component, readable(path))


def _telling(makers: list[Instruction]) -> str:
    """The path that says most of what an array is for.

    A place is often filled with zeros first; those, and what the compiler made itself, say nothing of the code.
    """
    paths = [maker.op_name for maker in makers if maker.op_name]
    work = [
        maker.op_name
        for maker in makers
        if maker.op_name.startswith("jit(")
        and maker.opcode != "broadcast"
        and not maker.op_name.endswith("broadcast_in_dim")
    ]
    return max(work or paths, key=lambda path: path.count("/"), default="")


def _component_of_input(path: str) -> str:
    for prefix, component in (
        ("state.params", "parameters"),
        ("state.opt_state", "optimizer"),
        ("state.average", "moving average"),
    ):
        if path.startswith(prefix):
            return component
    return "batch and counters"


def readable(op_name: str) -> str:
    """An `op_name` without what every one has: "layers/mlp/bsd,df->bsf", with "backward" or "recomputed" before it."""
    text = op_name.replace("\\'", "'")
    if text.startswith("state."):
        return text
    text = re.sub(r"^jit\(train_step\)/", "", text)
    again = "recomputed " if "rematted_computation" in text else ""
    direction = "backward " if "transpose(" in text and not again else again
    text = re.sub(r"\b(?:transpose|jvp|jit|vmap)\(([^()]*)\)", r"\1", re.sub(r"\bjvp\(([^()]*)\)", r"\1", text))
    skipped = (
        "while",
        "body",
        "closed_call",
        "checkpoint",
        "rematted_computation",
        "loss_and_gradients",
        "shard_map",
        "",
    )
    parts = [part for part in text.split("/") if part not in skipped]
    if parts and parts[-1] == "pallas_call":  # its name is there several times
        parts = [*parts[:2], parts[-2]]
    return direction + "/".join(parts)
