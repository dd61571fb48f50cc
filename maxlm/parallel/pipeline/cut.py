"""Cuts an island of a layer's backward pass in two: what the gradient of the layer's input needs, and what is left.

A `shard_map` is one operation of a traced program, all of whose results are made at once. That of the experts' backward
pass gives the gradients of tokens and of matrices; in one piece it would belong to the unit that hands the first of
them on, and the experts' weight gradients, most products of the weight unit, would delay the stage before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.extend import core

from maxlm.jaxpr import manual_axes
from maxlm.parallel.pipeline.program import Program, replayed, variables


def cut_islands(closed: core.ClosedJaxpr, *, chain: int) -> core.ClosedJaxpr:
    """The same program with every island that follows the output's gradient in up to two parts.

    Args:
      closed: (..., x, dy) -> results.
      chain: which result is the input's gradient.
    """
    jaxpr = closed.jaxpr
    *_, x, dy = jaxpr.invars
    program = Program(jaxpr, closed.consts, {x: frozenset([x]), dy: frozenset([dy])})
    dx = jaxpr.outvars[chain]
    needed = {dx, *(v for i in program.walk([dx], without=set()) for v in variables(program.eqns[i].invars))}
    halves: dict[int, _Halves] = {}
    for i, eqn in enumerate(program.eqns):
        if eqn.primitive.name == "shard_map" and program.follows(i, dy) and not eqn.params["check_vma"]:
            roots = [frozenset() if isinstance(v, core.Literal) else program.roots[v] for v in eqn.invars]
            found = _halves(eqn, roots, dy, first=[var in needed for var in eqn.outvars])
            if found is not None:
                halves[id(eqn)] = found
    if not halves:
        return closed

    def run(*args: Any) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

        def in_two(eqn: core.JaxprEqn, args: list[Any]) -> list[Any] | None:
            return _perform(eqn, halves[id(eqn)], args) if id(eqn) in halves else None

        return replayed(jaxpr.eqns, env, jaxpr.outvars, instead=in_two, debug_info=jaxpr.debug_info)

    return jax.make_jaxpr(run)(*closed.in_avals)


class _Halves(NamedTuple):
    """An island's operations, shared out. Inputs, results and what is handed on are variables of the island."""

    program: Program
    early: set[int]
    late: set[int]
    handed: list[Any]
    is_late: list[bool]  # of the results


def _halves(eqn: core.JaxprEqn, roots: list[frozenset], dy: Any, *, first: list[bool]) -> _Halves | None:
    """None: there is nothing that could be done later.

    Args:
      roots: of the island's inputs.
      first: which results the input's gradient needs.
    """
    island = eqn.params["jaxpr"]
    inner = Program(island, (), dict(zip(island.invars, roots, strict=True)))
    outs = list(zip(island.outvars, first, strict=True))
    early = inner.walk([var for var, is_first in outs if is_first], without=set())
    late = inner.walk([var for var, is_first in outs if not is_first], without=early)
    again = {i for i in late if not inner.follows(i, dy)}
    early, late = early | again, late - again
    is_late = [not isinstance(var, core.Literal) and inner.maker.get(var) in late for var in island.outvars]
    if not early or not late:
        return None
    return _Halves(inner, early, late, inner.handed(inner.made(early), to=late, outs=()), is_late)


def _perform(eqn: core.JaxprEqn, halves: _Halves, args: list[Any]) -> list[Any]:
    """The results of the island, by two. What a device hands on is a part of an array that is cut over all of them."""
    params, island, names = eqn.params, eqn.params["jaxpr"], manual_axes(eqn.params)
    given = {var: (spec, arg) for var, spec, arg in zip(island.invars, params["in_specs"], args, strict=True)}
    apart = jax.P(tuple(name for name in params["mesh"].axis_names if name in names))

    def half(operations: set[int], also: list[Any], outs: list[Any], specs: list[Any]) -> list[Any]:
        ins = halves.program.used(operations, [*island.invars, *also], outs)
        run = halves.program.part(operations, ins, outs)

        def local(*values: Any) -> tuple[Any, ...]:
            values = tuple(v.reshape(var.aval.shape) for var, v in zip(ins, values, strict=True))
            return tuple(y.reshape(-1) if y.ndim == 0 and spec is apart else y
                         for y, spec in zip(run(*values), specs, strict=True))  # fmt: skip

        return list(
            jax.shard_map(
                local,
                mesh=params["mesh"],
                in_specs=tuple(given[var][0] for var in ins),
                out_specs=tuple(specs),
                axis_names=set(names),
                check_vma=False,
            )(*(given[var][1] for var in ins))
        )

    def chosen(values: Any, is_late: bool) -> list[Any]:
        return [value for value, late in zip(values, halves.is_late, strict=True) if late is is_late]

    outs, specs = island.outvars, params["out_specs"]
    early = half(
        halves.early, [], chosen(outs, False) + halves.handed, chosen(specs, False) + [apart] * len(halves.handed)
    )
    count = len(early) - len(halves.handed)
    given |= {var: (apart, value) for var, value in zip(halves.handed, early[count:], strict=True)}
    late = half(halves.late, halves.handed, chosen(outs, True), chosen(specs, True))
    first, then = iter(early[:count]), iter(late)
    return [next(then if is_late else first) for is_late in halves.is_late]
