"""Cuts a layer's forward and backward pass into the units of a pipeline, by what its traced program depends on.

The layer and its gradient are traced together into one list of operations. Three backward walks share it out:

- forward: what the output and the layer's losses need;
- input: what else the gradient of the layer's input needs, recomputation under a remat policy included;
- weight: what else the gradients of the matrices need and depends on the output's gradient. That is a product of a
  kept input and an output's gradient for each matrix, and neither a part of the forward pass nor of the input's chain.

What one share makes and a later one uses is handed on: `kept` from forward, `pairs` from input to weight. Operations
on parameters and on what a whole microbatch shares (casts of weights, rotary angles, masks) are cheap and are done
again wherever they are needed, so that no copy of the parameters is handed on. A `shard_map` that would be in two of
the shares, as that of the experts' backward pass, is cut in two before (`cut.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from maxlm.jaxpr import subprograms
from maxlm.parallel.pipeline.cut import cut_islands
from maxlm.parallel.pipeline.program import Program, replayed

LayerFn = Callable[[Any, jax.Array, Any], "LayerOut"]
_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})


class LayerOut(NamedTuple):
    """x: the stream after the layer. loss: () float32, added to the total. watched: arrays without a gradient."""

    x: jax.Array
    loss: jax.Array
    watched: Any


class ForwardOut(NamedTuple):
    """The layer's own result, and what its backward pass will use."""

    out: LayerOut
    kept: list[jax.Array]


class InputOut(NamedTuple):
    """dx: gradient of the input. grads: of parameters that cost no product; None elsewhere. pairs: for `weight`."""

    dx: jax.Array
    grads: list[jax.Array | None]
    pairs: list[jax.Array]


class BackwardOut(NamedTuple):
    """dx: gradient of the input. grads: of every parameter."""

    dx: jax.Array
    grads: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class SplitLayer:
    """The four units of a layer.

    Parameters and their gradients are flat lists in the order of `jax.tree.leaves`. `kept` and `pairs` are shapes.

    forward: (params, x, shared) -> ForwardOut
    input: (params, shared, kept, dy) -> InputOut
    weight: (params, shared, kept, pairs) -> gradients, None where `input` gave them
    backward: (params, shared, kept, dy) -> BackwardOut, which is `input` and `weight` at once
    """

    kept: list[jax.ShapeDtypeStruct]
    pairs: list[jax.ShapeDtypeStruct]
    forward: Callable[..., ForwardOut]
    input: Callable[..., InputOut]
    weight: Callable[..., list[jax.Array | None]]
    backward: Callable[..., BackwardOut]


def split_layer(layer: LayerFn, params: Any, x: Any, shared: Any) -> SplitLayer:
    """Traces `layer(params, x, shared)` and its gradient, and shares the operations out.

    The gradient is that of the output times `dy` plus that of `loss` times one.

    Args:
      params, x, shared: shapes and dtypes (arrays or ShapeDtypeStructs).
    """
    leaves, tree = jax.tree.flatten((params, shared))
    count = len(jax.tree.leaves(params))

    def joint(leaves: list[jax.Array], x: jax.Array, dy: jax.Array) -> tuple[LayerOut, jax.Array, list[jax.Array]]:
        def run(flat: list[jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
            params, shared = jax.tree.unflatten(tree, [*flat, *leaves[count:]])
            out = layer(params, x, shared)
            return (out.x, out.loss), out.watched

        (y, loss), pullback, watched = jax.vjp(run, leaves[:count], x, has_aux=True)
        grads, dx = pullback((dy, jnp.ones_like(loss)))
        return LayerOut(y, loss, watched), dx, grads

    traced, (out, _, _) = jax.make_jaxpr(joint, return_shape=True)(leaves, x, x)
    inlined = jax.make_jaxpr(lambda *args: _flat(traced.jaxpr, traced.consts, args))(*traced.in_avals)
    cut = cut_islands(inlined, chain=len(jax.tree.leaves(out)))
    return _share_out(cut, out_tree=jax.tree.structure(out), count=count)


def _share_out(closed: core.ClosedJaxpr, *, out_tree: Any, count: int) -> SplitLayer:
    """Args: closed: (*parameters, *shared, x, dy) -> (*out, dx, *grads). out_tree: of a LayerOut. count: parameters."""
    *given, x, dy = closed.jaxpr.invars
    program = Program(closed.jaxpr, closed.consts, {x: frozenset([x]), dy: frozenset([dy])})
    outs, (dx, *grads) = closed.jaxpr.outvars[: out_tree.num_leaves], closed.jaxpr.outvars[out_tree.num_leaves :]

    forward = program.walk(outs, without=set())
    chain = program.walk([dx], without=forward)
    late = [any(_is_product(program.eqns[i]) for i in program.walk([g], without=forward | chain)) for g in grads]
    chain |= program.walk([g for g, is_late in zip(grads, late, strict=True) if not is_late], without=forward)
    last = program.walk([g for g, is_late in zip(grads, late, strict=True) if is_late], without=forward | chain)
    # What is computed again for the products' inputs belongs to the input's unit: it needs no output gradient.
    again = {i for i in last if not program.follows(i, dy)}
    chain, last = chain | again, last - again

    late_grads = [g for g, is_late in zip(grads, late, strict=True) if is_late]
    kept = program.handed([x, *program.made(forward)], to=chain | last, outs=[dx, *grads])
    pairs = program.handed([dy, *program.made(chain)], to=last, outs=late_grads)
    early_grads = [g for g, is_late in zip(grads, late, strict=True) if not is_late]

    def with_gaps(values: Sequence[jax.Array], filled: bool) -> list[jax.Array | None]:
        rest = iter(values)
        return [next(rest) if is_late is filled else None for is_late in late]

    run_forward = program.part(forward, [*given, x], [*outs, *kept])
    run_input = program.part(chain, [*given, *kept, dy], [dx, *early_grads, *pairs])
    run_weight = program.part(last, [*given, *kept, *pairs], late_grads)
    run_backward = program.part(chain | last, [*given, *kept, dy], [dx, *grads])

    def forward_unit(params: Any, x: jax.Array, shared: Any) -> ForwardOut:
        values = run_forward(*_leaves(params, shared), x)
        return ForwardOut(jax.tree.unflatten(out_tree, values[: len(outs)]), values[len(outs) :])

    def input_unit(params: Any, shared: Any, kept: Sequence[jax.Array], dy: jax.Array) -> InputOut:
        dx, *values = run_input(*_leaves(params, shared), *kept, dy)
        return InputOut(dx, with_gaps(values[: len(early_grads)], False), values[len(early_grads) :])

    def weight_unit(
        params: Any, shared: Any, kept: Sequence[jax.Array], pairs: Sequence[jax.Array]
    ) -> list[jax.Array | None]:
        return with_gaps(run_weight(*_leaves(params, shared), *kept, *pairs), True)

    def backward_unit(params: Any, shared: Any, kept: Sequence[jax.Array], dy: jax.Array) -> BackwardOut:
        dx, *values = run_backward(*_leaves(params, shared), *kept, dy)
        return BackwardOut(dx, values)

    return SplitLayer(
        [_shape(v) for v in kept], [_shape(v) for v in pairs], forward_unit, input_unit, weight_unit, backward_unit
    )


def _leaves(params: Any, shared: Any) -> list[jax.Array]:
    return jax.tree.leaves((params, shared))


def _shape(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _is_product(eqn: core.JaxprEqn) -> bool:
    """A matrix product, or a loop, island or kernel that may hold some."""
    return "dot" in eqn.primitive.name or any(True for _ in subprograms(eqn.params))


def _flat(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Performs a program, with calls and rematerialised parts dissolved into what they are made of."""

    def dissolved(eqn: core.JaxprEqn, args: list[Any]) -> list[Any] | None:
        if eqn.primitive.name not in _INLINED:
            return None
        inner = next(v for v in eqn.params.values() if isinstance(v, (core.Jaxpr, core.ClosedJaxpr)))
        closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
        return _flat(closed.jaxpr, closed.consts, args)

    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    return replayed(jaxpr.eqns, env, jaxpr.outvars, instead=dissolved, debug_info=jaxpr.debug_info)
