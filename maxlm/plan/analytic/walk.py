"""The walk over a traced step that finds what is alive when, and what is done; see `plan/anatomy.py` for its rules."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from maxlm.plan.analytic.symbols import PLACE, Size, size_of
from maxlm.plan.analytic.trace import Node, Program

VIEWS = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "slice", "rev"})
REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"})
PRODUCTS = frozenset({"dot_general", "grouped_product", "grouped_outer", "ragged_dot_general"})
KERNELS = frozenset({"attention_forward", "attention_backward"})
LOOPS = frozenset({"scan", "while", "cond"})
MOVES = frozenset({"gather", "scatter", "scatter-add", "scatter_add", "sort", "cumsum", "top_k"})
HEAVY = PRODUCTS | KERNELS | LOOPS | MOVES

KINDS = (
    "product",
    "attention_forward",
    "attention_backward",
    "operands",
    "traffic",
    "gather_weights",
    "reduce_weights",
    "gather_stream",
    "reduce_stream",
    "experts",
)
ROLES = ("activations", "gradients", "gathered weights", "loss", "temporaries")
"""Of what a step holds beyond the state."""


class Held(NamedTuple):
    """A kind of array that is alive at some moment."""

    size: Size
    role: str


class Work(NamedTuple):
    """Something that a step does.

    kind: `product` (amount in FLOPs), `attention_forward` or `attention_backward` (in layers), `operands` (bytes of
      memory that products and kernels read and write), `traffic` (the same of elementwise work), `gather_weights`,
      `reduce_weights`, `gather_stream`, `reduce_stream` or `experts` (bytes of a whole array that a device holds after
      the gather, or before the reduction).
    size: how much in a trip, on a device.
    trips: how often, a size of one byte.
    """

    kind: str
    size: Size
    trips: Size


TOKENS = ("rows", "chunks", "chunk")
"""Symbols of which what there is for each token, or row, has one."""
Moments = list[tuple[str, "Counter[Held]"]]
ONE = size_of((), 1, {})


@dataclasses.dataclass
class _Value:
    """A value of the program.

    size: of an array of it on a device, without what gathers add. whole: bytes of it between a gather and its use, or
      a product and its reduction; None where there is no difference.
    roots: the arrays that it is made of, while it is none itself.
    outer: it is alive outside of the program, whatever happens here.
    """

    shape: tuple[int, ...]
    size: Size
    role: str = "temporaries"
    whole: Size | None = None
    roots: frozenset[int] = frozenset()
    outer: bool = False
    view: bool = False
    array: bool = False
    made: int = 0
    last: int = -1
    partial: bool = False  # a sum over `tensor` is still to be taken
    maker: str = ""


class Walker:
    """Walks programs, nested ones included; `work` collects what is done."""

    def __init__(self, primes: Mapping[str, int], *, accumulation: int, reduced: int, micros: bool = False):
        """Of a step with so many microbatches, whose gradients are added up over the mesh in so many bytes each.

        Args:
          micros: of the body of the loop over microbatches.
        """
        self.primes, self.accumulation, self.reduced, self.micros = primes, accumulation, reduced, micros
        self.row = primes["chunks"] * primes["chunk"]
        self.outer = False
        self.sums: set[int] = set()  # which of a body's results are sums of weights' gradients
        self.work: list[Work] = []

    # --- sizes

    def size(self, shape: tuple[int, ...], itemsize: int) -> Size:
        """Of an array on a device, a weight whole."""
        size = size_of(shape, itemsize, self.primes)
        if not self.of_tokens(size):
            return size.times(cut_experts=1) if size.has("experts") else size
        choices = any(
            axis % (self.row * self.primes["rows"]) == 0 and axis > self.row * self.primes["rows"] for axis in shape
        )
        return size.times(regions=1) if choices else size

    def of_tokens(self, size: Size) -> bool:
        """Whether there is some of it for each token, or row."""
        return any(size.exponents[PLACE[name]] for name in TOKENS)

    def is_weight(self, size: Size) -> bool:
        """Whether it is a parameter, or a gradient of one, that `fsdp` spreads."""
        spread = any(size.has(name) for name in ("embed", "query_latent", "kv_latent"))
        return spread and not self.of_tokens(size)

    def is_stream(self, shape: tuple[int, ...]) -> bool:
        """Whether it is (..., S, D)."""
        return shape[-2:] == (self.row, self.primes["embed"])

    def bulk(self, size: Size) -> float:
        """For comparing sizes: symbols are all of one order."""
        return size.number * 400.0 ** sum(size.exponents)

    # --- the walk

    def walk(self, program: Program, trips: Size, *, outer: bool, node: Node | None = None) -> Moments:
        """The moments of a program.

        Args:
          trips: how often it runs in a step, as bytes.
          outer: whether it is the step itself, whose results take the place of what it was given.
          node: the loop that it is the body of.
        """
        self.outer = outer
        values: dict[int, _Value] = {-1: _Value((), size_of((), 0, {}), outer=True)}
        ready = _used_whole(node, program) if node else set()
        for place, i in enumerate(program.ins):
            shape, itemsize = program.shapes[i]
            values[i] = _Value(shape, self.size(shape, itemsize), outer=True)
            values[i].whole = values[i].size if place in ready else None
        uses = Counter(i for n in program.nodes for i in n.ins)
        uses.update(program.outs)
        carried = node.params["carried"] if node else 0
        handed = set(program.outs[:carried])
        nested: dict[int, Moments] = {}
        for at, current in enumerate(program.nodes):
            # A pipeline does this for each microbatch, and the rest once a step.
            often = trips.times(units=1) if outer and "loss_and_gradients" in current.scope else trips
            if current.name in LOOPS:
                self.loop(at, current, values, often, nested)
            elif current.name in HEAVY:
                self.heavy(at, current, values, often)
                self.added_up(current, values, program, handed)
            elif current.name in REDUCTIONS:
                self.reduction(at, current, values, often)
            else:
                self.light(at, current, values, uses, often)
        end = len(program.nodes)
        for i, out in enumerate(program.outs):
            value = values[out]
            if node and i < carried:
                self.as_array(value, values, end, trips)
            elif not value.array:
                self.keep(value.roots, values, value.made)
        return self.moments(program, values, nested)

    def keep(self, roots: Iterable[int], values: dict[int, _Value], at: int) -> None:
        for root in roots:
            values[root].last = max(values[root].last, at)

    def as_array(self, value: _Value, values: dict[int, _Value], at: int, trips: Size) -> None:
        """Sees to it that the value is an array at the operation `at`."""
        if value.outer:
            return
        if not value.array:
            if value.view:
                self.keep(value.roots, values, at)
                return
            value.array = True
            self.keep(value.roots, values, value.made)
            self.note("traffic", value.size, trips)
            for root in value.roots:
                self.note("traffic", values[root].size, trips)
        value.last = max(value.last, at)

    def note(self, kind: str, size: Size, trips: Size) -> None:
        if size.number:
            self.work.append(Work(kind, size, trips))

    def light(self, at: int, node: Node, values: dict[int, _Value], uses: Counter[int], trips: Size) -> None:
        """An elementwise operation, or one that only arranges."""
        operands = [values[i] for i in node.ins]
        roots = frozenset(
            root for i, v in zip(node.ins, operands, strict=True) for root in ((i,) if v.array else v.roots)
        )
        for out, (shape, itemsize) in zip(node.outs, node.shapes, strict=True):
            size = self.size(shape, itemsize)
            value = _Value(shape, size, self.role(node, size), roots=roots, made=at, maker=node.name)
            if self.is_stream(shape):
                value.size = size.times(cut_stream=1)
            elif self.is_weight(size) and self.outer:
                value.size = size.times(cut_embed=1)
            first = operands[0] if operands else None
            if node.name in VIEWS and first is not None and not first.array:
                value.view, value.outer, value.whole = first.view or first.outer, first.outer, first.whole
            elif node.name in VIEWS:
                value.view = True
            if first is not None and node.name == "convert_element_type" and self.narrowed(node, values, uses, value):
                pass
            elif uses[out] > 1 and sum(self.bulk(values[r].size) for r in roots) > 1.5 * self.bulk(value.size):
                self.as_array(value, values, at, trips)
            if node.name in ("add_any", "add"):
                value.partial = all(v.partial for v in operands)
                if value.partial:
                    self.note("reduce_stream", size.times(-1.0, sums_stream=1), trips)
            elif node.name in ("convert_element_type", *VIEWS) and first is not None:
                value.partial = first.partial
            values[out] = value

    def narrowed(self, node: Node, values: dict[int, _Value], uses: Counter[int], value: _Value) -> bool:
        """A product's result that is cast at once exists in the narrow dtype alone."""
        source = values[node.ins[0]]
        fresh = source.array and source.maker in PRODUCTS | KERNELS and uses[node.ins[0]] == 1
        if not fresh or value.size.number >= source.size.number:
            return False
        source.array, value.array = False, True
        value.made, value.roots, value.maker, value.role = source.made, frozenset(), source.maker, source.role
        value.last = value.made
        return True

    def role(self, node: Node, size: Size) -> str:
        if self.is_weight(size):
            return "gathered weights"
        return "loss" if "loss/" in f"{node.scope}/".replace("loss_and_gradients", "") else "temporaries"

    def reduction(self, at: int, node: Node, values: dict[int, _Value], trips: Size) -> None:
        """A sum or a maximum, into which its operands are fused."""
        for i in node.ins:
            value = values[i]
            self.keep((i,) if value.array else value.roots, values, at)
        self.made(at, node, values)

    def made(self, at: int, node: Node, values: dict[int, _Value]) -> None:
        """Arrays that an operation makes."""
        for out, (shape, itemsize) in zip(node.outs, node.shapes, strict=True):
            size = self.size(shape, itemsize)
            role = "gradients" if self.is_weight(size) else self.role(node, size)
            values[out] = _Value(shape, size, role, array=True, made=at, last=at, maker=node.name)
            if self.is_stream(shape):
                values[out].size = size.times(cut_stream=1)
                values[out].whole = size.times(gathers_stream=1)
                values[out].partial = node.name in PRODUCTS
            elif self.is_weight(size):
                values[out].size, values[out].whole = size.times(cut_embed=1), size.times(gathers_weights=1)

    def heavy(
        self,
        at: int,
        node: Node,
        values: dict[int, _Value],
        trips: Size,
    ) -> None:
        """A product, a kernel or a move of data."""
        for i in dict.fromkeys(node.ins):
            value = values[i]
            self.as_array(value, values, at, trips)
            self.gathered(at, node, value, values, trips)
            self.note("operands", value.whole or value.size, trips)
        self.made(at, node, values)
        for out, (_, itemsize) in zip(node.outs, node.shapes, strict=True):
            value = values[out]
            self.note("operands", value.whole or value.size, trips)
            if value.partial and value.whole is not None:
                self.note("reduce_stream", self.over_tensor(value.whole), trips)
            if value.role == "gradients" and value.whole is not None:
                self.note("reduce_weights", self.crossing(value.whole, itemsize), trips)
        self.done(node, values, trips)

    def over_tensor(self, whole: Size) -> Size:
        """Of a whole stream, what crosses `tensor` before or after a product.

        Where its positions are not cut, a sum over `tensor` is an all-reduce: it costs as much as both together.
        """
        return whole.times(gathers_stream=-1, sums_stream=1)

    def crossing(self, whole: Size, itemsize: int) -> Size:
        """Of a gradient, what crosses the mesh when it is added up."""
        return whole.times(self.reduced / itemsize)

    def gathered(self, at: int, node: Node, value: _Value, values: dict[int, _Value], trips: Size) -> None:
        """What an operand is whole, for the operation's sake."""
        size = self.size(value.shape, 1).times(value.size.number / max(self.size(value.shape, 1).number, 1e-9))
        if self.is_weight(size) and value.role != "gradients" and node.name not in ("scatter-add", "scatter"):
            if value.outer and value.whole is not None and value.whole == value.size:
                return
            kind, whole, role = "gather_weights", size.times(gathers_weights=1), "gathered weights"
        elif self.is_stream(value.shape) and node.name in PRODUCTS:
            kind, whole, role = "gather_stream", size.times(gathers_stream=1), "temporaries"
        else:
            return
        if value.whole is None or not any(v.maker == f"gather {id(value)}" for v in values.values()):
            number = -2 - len(values)
            values[number] = _Value(value.shape, whole, role, array=True, made=at, last=at, maker=f"gather {id(value)}")
            self.note(kind, self.over_tensor(whole) if kind == "gather_stream" else whole, trips)
            value.whole = whole
        else:
            copy = next(v for v in values.values() if v.maker == f"gather {id(value)}")
            copy.last = max(copy.last, at)

    def added_up(self, node: Node, values: dict[int, _Value], program: Program, handed: set[int]) -> None:
        """A weight's gradient that a loop adds to its sum is made in the sum, which is whole until the loop ends."""
        for out, (_, itemsize) in zip(node.outs, node.shapes, strict=True):
            users = [user for user in program.nodes if out in user.ins]
            if values[out].role == "gradients" and [user.name for user in users] == ["add"]:
                total = users[0].outs[0]
                if total in handed:
                    values[out].array = False
                    self.sums.add(program.outs.index(total))
                    if self.micros:  # over microbatches the sum is spread, and each one's gradient before it is added
                        continue
                    whole = values[out].whole
                    taken = self.crossing(whole, itemsize) if whole is not None else None
                    self.work = [done for done in self.work if done.kind != "reduce_weights" or done.size != taken]

    def done(self, node: Node, values: dict[int, _Value], trips: Size) -> None:
        """The operation's own work."""
        if node.name in KERNELS:
            self.note(node.name, ONE, trips)
        elif node.name == "dot_general":
            (contracted, _), _ = node.params["dimension_numbers"]
            shape = values[node.ins[0]].shape
            out = self.size(node.shapes[0][0], 1)
            inner = size_of(tuple(shape[axis] for axis in contracted), 1, self.primes)
            self.note("product", out.by(inner).times(2.0), trips)
        elif node.name in ("grouped_product", "grouped_outer"):
            x, other = (values[i].shape for i in node.ins[:2])
            dims = (*x, node.shapes[0][0][-1]) if node.name == "grouped_product" else (*x, other[-1])
            self.note("product", size_of(dims, 1, self.primes).times(2.0), trips)
        elif node.name == "gather":
            shape = node.shapes[0][0]
            if len(shape) == 2 and shape[0] % (self.row * self.primes["rows"]) == 0:
                self.note("experts", size_of(shape, node.shapes[0][1], self.primes), trips)

    def loop(self, at: int, node: Node, values: dict[int, _Value], trips: Size, nested: dict[int, Moments]) -> None:
        """A loop: what it stacks and hands on is there while it runs, besides what its body holds."""
        assert node.body is not None
        given, carried = node.params["given"], node.params["carried"]
        ready = _used_whole(node, node.body)
        for place, i in enumerate(node.ins):
            self.as_array(values[i], values, at, trips)
            if place in ready:
                self.gathered(at, node, values[i], values, trips)
        count = size_of((node.params["trips"],), 1, self.primes)
        micros = self.outer and self.accumulation == count.number and any(n.name in LOOPS for n in node.body.nodes)
        if micros:
            count = ONE.times(micros=1)
        inner = Walker(self.primes, accumulation=self.accumulation, reduced=self.reduced, micros=micros)
        inner_moments = inner.walk(node.body, trips.by(count), outer=False, node=node)
        self.work += inner.work
        self.made(at, node, values)
        extra: Counter[Held] = Counter()
        for i, out in enumerate(node.outs):
            value = values[out]
            value.array = node.body.outs[i] >= 0
            if i < carried:
                start = values[node.ins[given + i]]
                if start.array and start.last == at:
                    start.last = at - 1  # is handed on in place
                if i in inner.sums and value.whole is not None:
                    extra[Held(value.whole, "gradients")] += 1
                    if not micros:
                        self.note("reduce_weights", self.crossing(value.whole, node.shapes[i][1]), trips)
            elif value.role == "temporaries" and value.size.has("layers") and self.of_tokens(value.size):
                value.role = "activations"
        for size in self.hoisted(node.body, given + carried):
            extra[Held(size, "gathered weights")] += 1
        nested[at] = [(f"{node.scope} {where}".strip(), counts + extra) for where, counts in inner_moments]

    def hoisted(self, body: Program, first: int) -> Iterable[Size]:
        """Casts of stacked weights, which are made once for the whole stack, before the loop."""
        origin = {i: body.shapes[i] for i in body.ins[first:]}
        for node in body.nodes:
            if node.name not in (*VIEWS, "convert_element_type") or node.ins[0] not in origin:
                continue
            shape, itemsize = origin[node.ins[0]]
            if node.name == "convert_element_type" and self.is_weight(self.size(shape, itemsize)):
                if node.shapes[0][1] < itemsize:
                    stack = self.size(shape, node.shapes[0][1]).times(cut_embed=1)
                    yield stack.times(layers=1)
            elif node.name in VIEWS:
                origin[node.outs[0]] = node.shapes[0]

    # --- the moments

    def moments(self, program: Program, values: dict[int, _Value], nested: dict[int, Moments]) -> Moments:
        """What is alive at every operation that is not elementwise."""
        arrays = [value for value in values.values() if value.array and value.size.number]
        found: Moments = []
        for at, node in enumerate(program.nodes):
            if node.name not in HEAVY:
                continue
            alive: Counter[Held] = Counter()
            for value in arrays:
                if value.made <= at <= value.last:
                    alive[Held(value.size, value.role)] += 1
                    if value.made == at and value.whole is not None and value.maker in HEAVY - LOOPS:
                        alive[Held(value.whole, value.role)] += 1
            if at in nested:
                found += [(where, alive + counts) for where, counts in nested[at]] or [(node.scope, alive)]
            else:
                found.append((f"{node.scope} {node.name}", alive))
        return found


def _used_whole(node: Node, body: Program) -> set[int]:
    """Which inputs of a loop are the same in every trip, and used as they are: weights are gathered before the loop."""
    used = {i for inner in body.nodes if inner.name in HEAVY - LOOPS for i in inner.ins}
    return {place for place, i in enumerate(body.ins[: node.params["given"]]) if i in used}
