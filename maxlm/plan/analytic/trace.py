"""The training step as a flat list of operations, traced with symbols for sizes and stand-ins for kernels.

Kernels that XLA cannot look into (attention, the experts' grouped products) are single operations here, with the
operands, results and saved names of the real ones; everything else is the program that trains.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from maxlm.data.batch import Batch
from maxlm.jaxpr import opened, subprograms
from maxlm.kernels.experts import local_experts
from maxlm.kernels.grouped import Backend
from maxlm.kernels.matmul import ATTENTION_NAME
from maxlm.model.decoder import split_model
from maxlm.model.runtime import Runtime
from maxlm.optim.optimizers import make_optimizer
from maxlm.optim.schedules import make_rates
from maxlm.plan.analytic.symbols import Proxy
from maxlm.train.state import abstract_shapes
from maxlm.train.step import make_train_step

LOOPS = ("scan", "while", "cond")
_IDENTITIES = ("name", "optimization_barrier", "sharding_constraint", "copy", "stop_gradient")


# --- kernels ---------------------------------------------------------------------------------------------------------


def _primitive(name: str, shapes: Callable[..., list[tuple[tuple[int, ...], Any]]]) -> core.Primitive:
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *args, **_: [jax.core.ShapedArray(s, t) for s, t in shapes(*args)])
    return primitive


def _attended(q: Any, k: Any, v: Any, *rest: Any) -> list[tuple[tuple[int, ...], Any]]:
    del k, rest
    return [((*q.shape[:3], v.shape[3]), q.dtype), (q.shape[:3], jnp.float32)]


FORWARD = _primitive("attention_forward", _attended)
BACKWARD = _primitive("attention_backward", lambda q, k, v, *_: [(x.shape, x.dtype) for x in (q, k, v)])
GROUPED = _primitive("grouped_product", lambda x, w, _: [((x.shape[0], w.shape[2]), jnp.float32)])
GROUPED_BACK = _primitive("grouped_product", lambda g, w, _: [((g.shape[0], w.shape[1]), jnp.float32)])
GROUPED_OUTER = _primitive(
    "grouped_outer", lambda x, g, sizes: [((sizes.shape[0], x.shape[1], g.shape[1]), jnp.float32)]
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(named: bool, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any) -> jax.Array:
    return FORWARD.bind(q, k, v)[0]


def _attend_forward(named: bool, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any) -> Any:
    out, normaliser = FORWARD.bind(q, k, v)
    if named:
        out, normaliser = checkpoint_name((out, normaliser), ATTENTION_NAME)
    return out, (q, k, v, sinks, out, normaliser)


def _attend_backward(named: bool, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    q, k, v, sinks, out, normaliser = kept
    d_sinks = None if sinks is None else jnp.zeros_like(sinks)
    return *BACKWARD.bind(q, k, v, out, normaliser, g), d_sinks


_attend.defvjp(_attend_forward, _attend_backward)

_EXPERTS = Backend(
    "stand-in",
    rows=lambda x, w, sizes: GROUPED.bind(x, w, sizes)[0],
    rows_transposed=lambda g, w, sizes: GROUPED_BACK.bind(g, w, sizes)[0],
    outer=lambda x, g, sizes: GROUPED_OUTER.bind(x, g, sizes)[0],
)


def step_program(traced: Proxy, *, named: bool) -> core.ClosedJaxpr:
    """The whole step of the proxy.

    Args:
      named: whether the attention kernel names its results for remat, as most do.
    """
    config = traced.config
    parts = split_model(config.model)
    optimizer = make_optimizer(config.optim, parts.specs)
    runtime = Runtime(
        dtype=jnp.dtype(config.train.precision),
        reduce_dtype=jnp.dtype(config.train.reduce_dtype),
        attend=lambda q, k, v, mask: _attend(named, q, k, v, mask.sinks),
        experts=functools.partial(local_experts, backend=_EXPERTS),
        experts_limited=bool(config.model.moe.capacity_factor),
        remat=config.train.remat,
    )
    step = make_train_step(config, parts, optimizer, runtime)
    shape = (config.data.batch_size, config.data.sequence_length)
    ints, floats = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(tokens=ints, targets=ints, segments=ints, positions=ints, weights=floats)
    rates = make_rates(config.optim, config.train.steps)
    return jax.make_jaxpr(step)(abstract_shapes(config, optimizer), batch, rates)


# --- operations ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation. Values are numbers; -1 is a literal.

    shapes: of the outputs, with their item sizes in bytes.
    body: of a loop.
    """

    name: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    shapes: tuple[tuple[tuple[int, ...], int], ...]
    params: Mapping[str, Any]
    scope: str
    body: Program | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """Operations in their order, without any that nothing needs. Outputs that nothing needs are -1."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    shapes: Mapping[int, tuple[tuple[int, ...], int]]
    nodes: tuple[Node, ...]


def flatten(jaxpr: core.Jaxpr, *, used: Sequence[bool] | None = None) -> Program:
    """The program with calls dissolved, and loops as operations with a body.

    Args:
      used: which outputs are; None: all.
    """
    flattener = _Flattener()
    ins = [flattener.new(var.aval) for var in jaxpr.invars]
    outs = flattener.inline(jaxpr, ins, [-1] * len(jaxpr.constvars), "")
    outs = [out if keep else -1 for out, keep in zip(outs, used or [True] * len(outs), strict=True)]
    needed, kept = {out for out in outs if out >= 0}, []
    for node in reversed(flattener.nodes):
        if needed.isdisjoint(node.outs):
            continue
        if node.body is not None:
            node = _with_body(node, needed)
        needed.update(i for i in node.ins if i >= 0)
        kept.append(node)
    return Program(tuple(ins), tuple(outs), flattener.shapes, tuple(reversed(kept)))


def _with_body(node: Node, needed: set[int]) -> Node:
    """A loop with the operations that its used results need. What is carried is always needed."""
    jaxpr, carried = node.params["jaxpr"], node.params["carried"]
    used = [i < carried or out in needed for i, out in enumerate(node.outs)]
    return dataclasses.replace(node, body=flatten(jaxpr, used=used))


class _Flattener:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.shapes: dict[int, tuple[tuple[int, ...], int]] = {}

    def new(self, aval: Any) -> int:
        self.shapes[len(self.shapes)] = (tuple(aval.shape), np.dtype(aval.dtype).itemsize)
        return len(self.shapes) - 1

    def inline(self, jaxpr: core.Jaxpr, args: Sequence[int], consts: Sequence[int], scope: str) -> list[int]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> int:
            return -1 if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            ins = [read(atom) for atom in eqn.invars]
            here = f"{scope}/{eqn.source_info.name_stack}".strip("/")
            if name in _IDENTITIES:
                outs = ins
            elif name not in LOOPS and (inner := _called(eqn)) is not None:
                outs = self.inline(inner, ins, [-1] * len(inner.constvars), here)
            else:
                outs = [self.new(var.aval) for var in eqn.outvars]
                shapes = tuple(self.shapes[out] for out in outs)
                params = _loop(eqn) if name in LOOPS else eqn.params
                body = flatten(params["jaxpr"]) if name in LOOPS else None
                self.nodes.append(Node(name, tuple(ins), tuple(outs), shapes, params, here, body))
            env |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def _called(eqn: Any) -> core.Jaxpr | None:
    """The program that a call stands for."""
    return next((inner for inner in subprograms(eqn.params) if len(inner.invars) == len(eqn.invars)), None)


def _loop(eqn: Any) -> dict[str, Any]:
    """jaxpr: the body. given, carried: how many inputs are the same in every trip, and handed on. trips: how many."""
    match eqn.primitive.name:
        case "scan":
            p = eqn.params
            return {
                "jaxpr": opened(p["jaxpr"]),
                "given": p["num_consts"],
                "carried": p["num_carry"],
                "trips": p["length"],
            }
        case "while":
            body = opened(eqn.params["body_jaxpr"])
            return {"jaxpr": body, "given": eqn.params["body_nconsts"], "carried": len(eqn.outvars), "trips": 1}
        case _:  # a conditional: its dearest branch
            branch = max(map(opened, eqn.params["branches"]), key=lambda b: len(b.eqns))
            return {"jaxpr": branch, "given": len(branch.invars), "carried": 0, "trips": 1}
