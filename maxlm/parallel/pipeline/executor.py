"""Runs a schedule's table: loss and gradients of a batch whose layers are spread over the `pipeline` axis.

The program is a `shard_map` that is manual over `pipeline` alone, with a scan over the table's ticks in it. In a tick a
stage does its unit, and then every stage hands an activation to the next and a gradient to the one before. These two
permutes stand outside the units: every device takes part in them, while the units' own collectives are among the
devices of one stage.

A unit is chosen by a chain of two-way conditionals, one for each kind in the table. That is `lax.switch` with the same
cost and one difference: XLA passes a buffer through a two-way conditional in place, and copies it, each tick, through
one of more branches (128 MiB of buffers took 256 through a switch, and 136 through the chain).

Shapes: T ticks, A microbatches, L layers, n cycles of layers in a chunk. A cycle is the layers that are scanned as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from maxlm.parallel.pipeline.order import from_stages, to_stages
from maxlm.parallel.pipeline.schedule import Schedule, Unit
from maxlm.parallel.pipeline.slots import Row, Slots
from maxlm.parallel.pipeline.split import LayerFn, SplitLayer, split_layer

AXIS = "pipeline"
SCOPES: Mapping[Unit, str] = {
    Unit.FORWARD: "forward",
    Unit.INPUT: "input_backward",
    Unit.WEIGHT: "weight_backward",
    Unit.BACKWARD: "backward",
}
"""What the compiled program calls each unit: `plan/stages.py` reads from it which branch runs when."""
FIRST, LAST = "first_chunk", "last_chunk"  # and what only these chunks do


class Stages(NamedTuple):
    """A model in the parts that a pipeline places: the first on the first stage, the last on the last.

    embed: (outer, micro) -> x (B, S, D). Its gradient runs it again, which should cost no product.
    layer: (parameters of one cycle of layers, x, micro) -> split.LayerOut.
    head: (outer, x, micro) -> (loss, terms): () float32, and float32 arrays that are summed over microbatches.

    pin: puts a stream (B, S, D) in its place on the other mesh axes; both ways through a conditional have to agree.

    `outer` are all parameters but the layers', `micro` is a microbatch. The total that is differentiated is the sum of
    `head`'s and all layers' losses over microbatches.
    """

    embed: Callable[[Any, Any], jax.Array]
    layer: LayerFn
    head: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
    pin: Callable[[jax.Array], jax.Array]


class PipelineOut(NamedTuple):
    """terms: of `head`, summed over microbatches. watched: of `layer`, summed over microbatches, (L / cycle, ...).
    outer, layers: gradients. executed: (T, stages, 3) int32: the unit that ran, its microbatch and virtual stage.
    """

    terms: Any
    watched: Any
    outer: Any
    layers: Any
    executed: jax.Array


class _Carry(NamedTuple):
    """What a stage holds from tick to tick; the buffers have their slots in front, `kept` and `pairs` then (n, ...)."""

    inputs: jax.Array
    seeds: jax.Array
    kept: list[jax.Array]
    pairs: list[jax.Array]
    ahead: jax.Array  # what goes to the next stage
    back: jax.Array  # what goes to the stage before
    ran: jax.Array  # () int32: the last unit that ran, written by the unit itself
    outer: Any
    layers: list[jax.Array]
    terms: Any
    watched: Any


RunFn = Callable[[Any, Any, Any, Row], PipelineOut]


def pipelined(
    schedule: Schedule,
    slots: Slots,
    stages: Stages,
    *,
    mesh: Mesh,
    cycle: int,
    constrain: Callable[[Any], Any],
) -> RunFn:
    """The function (outer, layers, micros, rows) -> PipelineOut.

    `layers` are parameters (L, ...), sharded over `pipeline` in their first dim and in the model's order, whatever the
    schedule; so are their gradients. `micros` has leaves (A, ...). `rows` are those of `slots`.

    Args:
      slots: `assign(schedule)`.
      cycle: layers that `stages.layer` takes at once; its parameters then are (cycle, ...), or (...) if it is 1.
      constrain: pins the gradients of the stacked layers (L, ...) to their places on the other mesh axes.
    """
    used = sorted({cell.unit for _, _, cell in schedule.cells()})
    everywhere, along = PartitionSpec(), PartitionSpec(AXIS)
    place: Any = PipelineOut  # its fields hold specs here

    def body(outer: Any, layers: Any, micros: Any, rows: Row) -> PipelineOut:
        layers = jax.tree.map(lambda p: to_stages(p, AXIS, schedule.virtual), layers)
        folded = jax.tree.map(lambda p: p.reshape(-1, cycle, *p.shape[1:]) if cycle > 1 else p, layers)
        stage = _Stage.make(stages, schedule, slots, outer=outer, layers=folded, micros=micros)
        grads = jax.tree.leaves(constrain(jax.tree.map(jnp.zeros_like, layers)))
        carry = stage.start([g.reshape(p.shape) for g, p in zip(grads, jax.tree.leaves(folded), strict=True)])
        carry, executed = jax.lax.scan(lambda c, row: stage.tick(c, row, used), carry, rows)
        terms, d_outer = jax.lax.psum((carry.terms, carry.outer), AXIS)
        d_layers = [g.reshape(p.shape) for g, p in zip(carry.layers, jax.tree.leaves(layers), strict=True)]
        d_layers = [from_stages(g, AXIS, schedule.virtual) for g in d_layers]
        watched = jax.tree.map(lambda w: from_stages(w, AXIS, schedule.virtual), carry.watched)
        return PipelineOut(terms, watched, d_outer, jax.tree.unflatten(jax.tree.structure(layers), d_layers), executed)

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(everywhere, along, everywhere, PartitionSpec(None, AXIS)),
        out_specs=place(everywhere, along, everywhere, along, PartitionSpec(None, AXIS)),
        axis_names={AXIS},
        check_vma=False,
    )


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One device's view: the model's parts, what stays the same over the ticks, and the units."""

    stages: Stages
    schedule: Schedule
    slots: Slots
    split: SplitLayer
    cycles: int  # of layers in a chunk
    outer: Any
    layers: Any  # (virtual * n, ...)
    micros: Any
    stream: jax.ShapeDtypeStruct
    shapes: Any  # of (terms, watched)

    @classmethod
    def make(cls, stages: Stages, schedule: Schedule, slots: Slots, *, outer: Any, layers: Any, micros: Any) -> _Stage:
        """Traces the parts to learn the shapes of what they hand on."""
        micro, layer = (jax.tree.map(lambda x: _shape(x[0]), tree) for tree in (micros, layers))
        outer_shapes = jax.tree.map(_shape, outer)
        stream = jax.eval_shape(stages.embed, outer_shapes, micro)
        _, terms = jax.eval_shape(stages.head, outer_shapes, stream, micro)
        watched = jax.eval_shape(stages.layer, layer, stream, micro).watched
        return cls(
            stages,
            schedule,
            slots,
            split_layer(stages.layer, layer, stream, micro),
            jax.tree.leaves(layers)[0].shape[0] // schedule.virtual,
            outer,
            layers,
            micros,
            stream,
            (terms, watched),
        )

    def start(self, grads: list[jax.Array]) -> _Carry:
        """Empty buffers, and sums at zero."""

        def empty(shape: Any, *front: int) -> jax.Array:
            return jnp.zeros((*front, *shape.shape), shape.dtype)

        slots, n, (terms, watched) = self.slots, self.cycles, self.shapes
        return _Carry(
            inputs=empty(self.stream, slots.inputs + 1),
            seeds=empty(self.stream, slots.seeds + 1),
            kept=[empty(k, slots.kept, n) for k in self.split.kept],
            pairs=[empty(p, slots.pairs, n) for p in self.split.pairs] if slots.pairs else [],
            ahead=empty(self.stream),
            back=empty(self.stream),
            ran=jnp.zeros((), jnp.int32),
            outer=jax.tree.map(jnp.zeros_like, self.outer),
            layers=grads,
            terms=jax.tree.map(empty, terms),
            watched=jax.tree.map(lambda w: empty(w, self.schedule.virtual * n), watched),
        )

    def tick(self, carry: _Carry, row: Row, used: list[Unit]) -> tuple[_Carry, jax.Array]:
        """The stage's unit, then the two permutes; returns what ran."""
        row = Row(*(column[0] for column in row))
        units: Mapping[Unit, Callable[[_Carry, Row], _Carry]] = {
            Unit.FORWARD: self.forward,
            Unit.INPUT: self.input,
            Unit.WEIGHT: self.weight,
            Unit.BACKWARD: self.backward,
        }
        carry = carry._replace(ran=jnp.full((), Unit.IDLE, jnp.int32))
        for unit in used:
            carry = jax.lax.cond(row.unit == unit, units[unit], lambda carry, row: carry, carry, row)
        with jax.named_scope("hand_over"):
            count = self.schedule.stages
            arrived = jax.lax.ppermute(carry.ahead, AXIS, [(s, (s + 1) % count) for s in range(count)])
            returned = jax.lax.ppermute(carry.back, AXIS, [(s, (s - 1) % count) for s in range(count)])
            seeds = _put(carry.seeds, returned, row.store_seed)
            # The last chunk's own output is what its backward pass starts from.
            seeds = _put(seeds, carry.ahead, row.store_own)
            carry = carry._replace(inputs=_put(carry.inputs, arrived, row.store_input), seeds=seeds)
        return carry, jnp.stack([carry.ran, row.micro, row.virtual])[None]

    def is_first(self, row: Row) -> jax.Array:
        return (jax.lax.axis_index(AXIS) == 0) & (row.virtual == 0)

    def is_last(self, row: Row) -> jax.Array:
        last = jax.lax.axis_index(AXIS) == self.schedule.stages - 1
        return last & (row.virtual == self.schedule.virtual - 1)

    def micro(self, row: Row) -> Any:
        return jax.tree.map(lambda x: _at(x, row.micro), self.micros)

    def layer(self, row: Row, i: jax.Array) -> Any:
        """Parameters of cycle i of the row's chunk. Cut out here, so that no copy of a chunk's is made."""
        return jax.tree.map(lambda p: _at(p, row.virtual * self.cycles + i), self.layers)

    def forward(self, carry: _Carry, row: Row) -> _Carry:
        """Embeds on the first chunk, and runs the chunk's layers."""
        micro = self.micro(row)
        with jax.named_scope(SCOPES[Unit.FORWARD]):
            x = jax.lax.cond(
                self.is_first(row),
                jax.named_scope(FIRST)(lambda: self.stages.pin(self.stages.embed(self.outer, micro))),
                lambda: self.stages.pin(_at(carry.inputs, row.input)),
            )

            def step(state: tuple, i: jax.Array) -> tuple[tuple, None]:
                x, kept, watched = state
                (x, _, seen), new = self.split.forward(self.layer(row, i), x, micro)
                kept = [_put(buffer, value, row.kept, i) for buffer, value in zip(kept, new, strict=True)]
                place = row.virtual * self.cycles + i
                return (x, kept, jax.tree.map(lambda w, s: w.at[place].add(s), watched, seen)), None

            (x, kept, watched), _ = jax.lax.scan(step, (x, carry.kept, carry.watched), jnp.arange(self.cycles))
        return carry._replace(kept=kept, watched=watched, ahead=x, ran=jnp.full_like(carry.ran, Unit.FORWARD))

    def input(self, carry: _Carry, row: Row) -> _Carry:
        """The gradient of the chunk's input, and pairs for `weight`."""
        with jax.named_scope(SCOPES[Unit.INPUT]):
            micro, (carry, dy) = self.micro(row), self._seed(carry, row)

            def step(state: tuple, i: jax.Array) -> tuple[tuple, None]:
                dy, pairs, grads = state
                kept = [_at(buffer, row.kept, i) for buffer in carry.kept]
                out = self.split.input(self.layer(row, i), micro, kept, dy)
                pairs = [_put(buffer, value, row.pair, i) for buffer, value in zip(pairs, out.pairs, strict=True)]
                return (out.dx, pairs, self._added(grads, out.grads, row, i)), None

            state = (dy, carry.pairs, carry.layers)
            (dx, pairs, grads), _ = jax.lax.scan(step, state, jnp.arange(self.cycles), reverse=True)
            carry = self._embedded(carry._replace(pairs=pairs, layers=grads, back=dx), row)
        return carry._replace(ran=jnp.full_like(carry.ran, Unit.INPUT))

    def weight(self, carry: _Carry, row: Row) -> _Carry:
        """The gradients of the chunk's matrices."""
        with jax.named_scope(SCOPES[Unit.WEIGHT]):
            micro = self.micro(row)

            def step(grads: list[jax.Array], i: jax.Array) -> tuple[list[jax.Array], None]:
                kept = [_at(buffer, row.kept, i) for buffer in carry.kept]
                pairs = [_at(buffer, row.pair, i) for buffer in carry.pairs]
                return self._added(grads, self.split.weight(self.layer(row, i), micro, kept, pairs), row, i), None

            grads, _ = jax.lax.scan(step, carry.layers, jnp.arange(self.cycles))
        return carry._replace(layers=grads, ran=jnp.full_like(carry.ran, Unit.WEIGHT))

    def backward(self, carry: _Carry, row: Row) -> _Carry:
        """Both parts of the backward pass, a layer at a time."""
        with jax.named_scope(SCOPES[Unit.BACKWARD]):
            micro, (carry, dy) = self.micro(row), self._seed(carry, row)

            def step(state: tuple, i: jax.Array) -> tuple[tuple, None]:
                dy, grads = state
                kept = [_at(buffer, row.kept, i) for buffer in carry.kept]
                out = self.split.backward(self.layer(row, i), micro, kept, dy)
                return (out.dx, self._added(grads, out.grads, row, i)), None

            (dx, grads), _ = jax.lax.scan(step, (dy, carry.layers), jnp.arange(self.cycles), reverse=True)
            carry = self._embedded(carry._replace(layers=grads, back=dx), row)
        return carry._replace(ran=jnp.full_like(carry.ran, Unit.BACKWARD))

    def _added(
        self, sums: list[jax.Array], grads: Sequence[jax.Array | None], row: Row, i: jax.Array
    ) -> list[jax.Array]:
        place = row.virtual * self.cycles + i
        return [s if g is None else s.at[place].add(g) for s, g in zip(sums, grads, strict=True)]

    def _seed(self, carry: _Carry, row: Row) -> tuple[_Carry, jax.Array]:
        """The gradient of the chunk's output; on the last chunk head and loss make it out of the output itself."""
        seed, micro = self.stages.pin(_at(carry.seeds, row.seed)), self.micro(row)

        @jax.named_scope(LAST)
        def head(outer_grads: Any, terms: Any) -> tuple[jax.Array, Any, Any]:
            loss, pullback, new = jax.vjp(
                lambda outer, x: self.stages.head(outer, x, micro), self.outer, seed, has_aux=True
            )
            d_outer, dx = pullback(jnp.ones_like(loss))
            return self.stages.pin(dx), jax.tree.map(jnp.add, outer_grads, d_outer), jax.tree.map(jnp.add, terms, new)

        dy, outer, terms = jax.lax.cond(
            self.is_last(row),
            head,
            lambda outer, terms: (self.stages.pin(seed), outer, terms),
            carry.outer,
            carry.terms,
        )
        return carry._replace(outer=outer, terms=terms), dy

    def _embedded(self, carry: _Carry, row: Row) -> _Carry:
        """Adds the embedding's gradient on the first chunk."""
        micro = self.micro(row)

        @jax.named_scope(FIRST)
        def embed(outer_grads: Any) -> Any:
            _, pullback = jax.vjp(lambda outer: self.stages.embed(outer, micro), self.outer)
            return jax.tree.map(jnp.add, outer_grads, pullback(carry.back)[0])

        return carry._replace(outer=jax.lax.cond(self.is_first(row), embed, lambda outer: outer, carry.outer))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _at(buffer: jax.Array, *index: Any) -> jax.Array:
    """buffer[index], for an index that is within bounds."""
    starts = (*index, *(0,) * (buffer.ndim - len(index)))
    sizes = (*(1,) * len(index), *buffer.shape[len(index) :])
    return jax.lax.dynamic_slice(buffer, starts, sizes).reshape(buffer.shape[len(index) :])


def _put(buffer: jax.Array, value: jax.Array, *index: Any) -> jax.Array:
    """The buffer with buffer[index] = value, in place where the compiler can."""
    starts = (*index, *(0,) * (buffer.ndim - len(index)))
    return jax.lax.dynamic_update_slice(buffer, value.reshape((1,) * len(index) + value.shape), starts)
