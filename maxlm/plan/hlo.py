"""Reads the text of a compiled program: its computations, how often each runs, what its products and loops are.

The text is what `jax.stages.Compiled.as_text()` gives: scheduled, so that the order of a computation's instructions is
the order they are issued in, and for one device, so that all shapes are that device's part.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.errors import UserError

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f8e4m3": 1, "f8e8m0fnu": 1, "f4e2m1fn": 0.5,
}  # fmt: skip
_ARRAY = re.compile(r"\b(" + "|".join(sorted(ITEM_BYTES, key=len, reverse=True)) + r")\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_END = re.compile(r"^\}(?:, |$)")  # a kernel's metadata may end with two of these at the begin of a line
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class HloError(UserError):
    """The text has a form that this module does not know."""

    def __init__(self, found: str):
        super().__init__(
            f"the compiled program cannot be read: {found}; take the versions of jax and of the compiler that "
            "pyproject.toml names"
        )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `shape` is the text of its result's type, `rest` what stands behind the operands."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @functools.cached_property
    def op_name(self) -> str:
        """The path of the code that made it: "jit(train_step)/loss_and_gradients/.../dot_general"; "" if not known."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @functools.cached_property
    def backend(self) -> Mapping[str, Any]:
        """`backend_config` where it is JSON."""
        at = self.rest.find("backend_config={")
        if at < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.rest, at + len("backend_config="))[0]
        except ValueError:
            return {}

    @property
    def cycles(self) -> float:
        """The compiler's estimate for one run; 0 where it has none."""
        return float((self.backend.get("window_config") or {}).get("estimated_cycles", 0))

    @property
    def called(self) -> list[str]:
        """Names of the computations that it refers to, a conditional's branches in their order."""
        names = _CALLED.findall(self.rest)
        if branches := _BRANCHES.search(self.rest):
            names += [name.strip().lstrip("%") for name in branches[1].split(",")]
        return names

    def attribute(self, name: str) -> str:
        """The text of an attribute up to the comma behind it; "" if there is none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program. `computations` holds instructions in their order; `entry` is the name of the first to run.

    shares: in what part of its turns each branch of a conditional runs; one that is not there is taken to run in all.
    turns: by its name, how often a loop turns where the program does not say; one that is not there turns once.
    """

    computations: Mapping[str, list[Instruction]]
    entry: str
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    turns: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def runs(self) -> Mapping[str, float]:
        """How often a computation runs in a step: a loop's body as often as the loop turns, branches by their shares.

        Computations within a fusion, a reduction or a kernel are not there: the instruction that holds them stands for
        them.
        """
        counts: dict[str, float] = {}

        def walk(name: str, times: float) -> None:
            counts[name] = counts.get(name, 0.0) + times
            for instruction in self.computations[name]:
                if instruction.opcode == "while":
                    body, turns = instruction.attribute("body").lstrip("%"), trips(self, instruction)
                    walk(body, times * turns)
                elif instruction.opcode in ("conditional", "call") or (
                    instruction.opcode == "async-start" and instruction.called
                ):
                    for called in instruction.called:
                        walk(called, times * self.shares.get(called, 1.0))

        walk(self.entry, 1.0)
        return counts

    def scheduled(self) -> Iterator[tuple[Instruction, str, float]]:
        """(instruction, its computation, times it runs in a step) of all that is issued, computation by computation."""
        for name, times in self.runs.items():
            for instruction in self.computations[name]:
                yield instruction, name, times

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of the computations that a fusion holds, those of fusions within it too."""
        for name in instruction.called:
            for inner in self.computations.get(name, ()):
                yield inner
                if inner.opcode == "fusion":
                    yield from self.inside(inner)


def trips(module: Module, loop: Instruction) -> float:
    """How often a loop turns: as the program says, or else as `Module.turns` does."""
    said = counted(module, loop)
    return module.turns.get(loop.name, 1.0) if said is None else said


def counted(module: Module, loop: Instruction) -> int | None:
    """How often a loop turns, as XLA says, or as a counter from 0 that is compared with a constant; None: neither."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = module.computations[loop.attribute("condition").lstrip("%")]
    root = next(instruction for instruction in condition if instruction.root)
    if root.opcode == "fusion":
        inner = module.computations[root.called[0]]
        bounds = [c for c in (*condition, *inner) if c.opcode == "constant" and c.shape.startswith("s32[]")]
        direction = next((i.attribute("direction") for i in inner if i.opcode == "compare"), "")
    else:
        by_name = {instruction.name: instruction for instruction in condition}
        bounds = [by_name[name] for name in root.operands if by_name[name].opcode == "constant"]
        direction = root.attribute("direction")
    if len(bounds) != 1 or direction not in ("LT", "GT"):
        return None
    return int(bounds[0].operands[0])


def arrays(shape: str) -> list[tuple[str, int]]:
    """(dtype, elements) of every array of a type: "(f32[2,3]{1,0}, s32[])" -> [("f32", 6), ("s32", 1)]."""
    return [(kind, math.prod(_dims(dims))) for kind, dims in _ARRAY.findall(shape)]


def bytes_of(shape: str) -> float:
    """Of all arrays of a type."""
    return sum(size * ITEM_BYTES[kind] for kind, size in arrays(shape))


def elements(shape: str) -> list[str]:
    """The types that a tuple's type holds, tuples within it whole; [] for an array's."""
    if not shape.startswith("("):
        return []
    found, depth = [""], 0
    for letter in shape[1 : _closing(shape, 0)]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def dims(shape: str) -> list[int]:
    """The dims of an array's type, or of the first of a tuple."""
    found = _ARRAY.search(shape)
    return _dims(found[2]) if found else []


def _dims(text: str) -> list[int]:
    return [int(size.lstrip("<=")) for size in text.split(",") if size]


def parse(text: str) -> Module:
    """The program of a text.

    Raises:
      HloError: there is no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current, pending = "", list[Instruction](), ""
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        starts = _INSTRUCTION.match(line)
        if pending and (starts or header or _END.match(line)):
            current.append(_instruction(pending))
            pending = ""
        if starts:
            pending = line
        elif header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif pending:  # a kernel's metadata runs over several lines
            pending += line
    if not entry:
        raise HloError("it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    if head is None:
        raise HloError(f"not an instruction: {line[:200]}")
    shape_end = _end_of_type(line, head.end())
    opens = line.index("(", shape_end)
    closes = _closing(line, opens)
    operands = line[opens + 1 : closes]
    names = re.findall(r"%([\w.\-]+)", operands) or [part.strip() for part in operands.split(",") if part.strip()]
    return Instruction(
        name=head[1],
        opcode=line[shape_end:opens].strip(),
        shape=line[head.end() : shape_end].strip(),
        operands=tuple(names),
        rest=line[closes + 1 :],
        root=line.startswith("  ROOT"),
    )


def _end_of_type(line: str, at: int) -> int:
    """A type is a tuple in brackets, or runs up to the next space that is in no bracket."""
    if line[at] == "(":
        return _closing(line, at) + 1
    depth = 0
    for i in range(at, len(line)):
        depth += (line[i] in "{[(") - (line[i] in "}])")
        if line[i] == " " and not depth:
            return i
    raise HloError(f"a type without an end: {line[:200]}")


def _closing(line: str, at: int) -> int:
    depth = 0
    for i in range(at, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if not depth:
            return i
    raise HloError(f"a bracket without an end: {line[:200]}")


# --- products --------------------------------------------------------------------------------------------------------


def product_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    """FLOPs of a `dot`, a `convolution` (what TPUs make of a dot) or a call of cuBLAS; 0 for anything else.

    Positions of a window that lie in the padding or between spread-out elements do not count.

    Args:
      shapes: name -> type of the instructions of its computation.
    """
    if instruction.opcode == "dot":
        left = dims(shapes[instruction.operands[0]])
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        contracted = [left[int(axis)] for axis in axes[1].split(",") if axis] if axes else []
        return 2.0 * math.prod(dims(instruction.shape)) * math.prod(contracted)
    if instruction.opcode == "custom-call" and "__cublas$" in instruction.rest:
        numbers = instruction.backend["gemm_backend_config"]["dot_dimension_numbers"]
        left = dims(shapes[instruction.operands[0]])
        contracted = [left[int(axis)] for axis in numbers["lhs_contracting_dimensions"]]
        return 2.0 * math.prod(dims(instruction.shape)) * math.prod(contracted)
    if instruction.opcode != "convolution":
        return 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        raise HloError(f"a convolution without dim_labels: {instruction.rest[:200]}")
    left, kernel = (dims(shapes[name]) for name in instruction.operands[:2])
    out = dims(instruction.shape)
    window = _window(instruction, sum(label.isdigit() for label in labels[2]))
    flops = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    for label in (label for label in labels[3] if label.isdigit()):
        flops *= _met(
            left[labels[1].index(label)],
            kernel[labels[2].index(label)],
            out[labels[3].index(label)],
            **{name: values[int(label)] for name, values in window.items()},
        )
    return flops


def _window(instruction: Instruction, rank: int) -> dict[str, list[Any]]:
    text = instruction.attribute("window")
    found = dict(re.findall(r"(\w+)=([\w\-x]+)", text))

    def numbers(name: str, default: int) -> list[int]:
        return [int(value) for value in found[name].split("x")] if name in found else [default] * rank

    pads = [tuple(map(int, pad.split("_"))) for pad in found["pad"].split("x")] if "pad" in found else [(0, 0)] * rank
    return {
        "stride": numbers("stride", 1),
        "pad": pads,
        "spread": numbers("lhs_dilate", 1),
        "dilation": numbers("rhs_dilate", 1),
    }


def _met(size: int, kernel: int, out: int, *, stride: int, pad: tuple[int, int], spread: int, dilation: int) -> int:
    """Pairs of an output position and a kernel position that meet an element of the input."""
    if kernel == 1 and pad == (0, 0) and spread == 1:
        return out
    count = 0
    last = (size - 1) * spread
    for k in range(kernel):
        # out position o looks at o * stride + k * dilation - low, which has to be a multiple of spread in [0, last]
        shift = k * dilation - pad[0]
        if spread == 1:
            first = max(0, -(shift // stride)) if shift < 0 else 0
            final = min(out - 1, (last - shift) // stride)
            count += max(0, final - first + 1)
        else:
            count += sum(1 for o in range(out) if 0 <= (x := o * stride + shift) <= last and x % spread == 0)
    return count


def total_flops(module: Module) -> float:
    """FLOPs of all products of a step on one device, without those inside kernels."""
    total = 0.0
    for name, times in module.runs.items():
        total += times * sum(fused_flops(module, name, i) for i in module.computations[name])
    return total


def fused_flops(module: Module, computation: str, instruction: Instruction) -> float:
    """FLOPs of the products that an instruction of this computation is or holds."""
    if instruction.opcode == "fusion":
        called = instruction.called[0]
        return sum(fused_flops(module, called, inner) for inner in module.computations[called])
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    return product_flops(instruction, {i.name: i.shape for i in module.computations[computation]})
