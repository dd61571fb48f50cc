"""A traced program as a flat list of operations, of which some can be performed without the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core


class Program:
    """A flat list of operations; operations are named by their place in it.

    roots: of the program's inputs that matter which each value depends on. What depends on none is free to be made
      anywhere.
    """

    def __init__(self, jaxpr: core.Jaxpr, consts: Sequence[Any], roots: Mapping[Any, frozenset]):
        """Args: roots: of the inputs; () of those that are left out."""
        self.eqns, self.debug_info = jaxpr.eqns, jaxpr.debug_info
        self.consts = dict(zip(jaxpr.constvars, consts, strict=True))
        self.maker = {var: i for i, eqn in enumerate(self.eqns) for var in eqn.outvars}
        self.roots: dict[Any, frozenset] = {var: frozenset() for var in (*jaxpr.invars, *self.consts)}
        self.roots |= roots
        for eqn in self.eqns:
            found = frozenset().union(*(self.roots[v] for v in variables(eqn.invars)))
            self.roots |= {var: found for var in eqn.outvars}

    def walk(self, outs: Iterable[Any], *, without: set[int]) -> set[int]:
        """The operations that `outs` need, but for `without` and for those that are free."""
        found: set[int] = set()
        todo = variables(outs)
        while todo:
            var = todo.pop()
            i = self.maker.get(var)
            if i is not None and i not in found and i not in without and self.roots[var]:
                found.add(i)
                todo += variables(self.eqns[i].invars)
        return found

    def follows(self, i: int, root: Any) -> bool:
        """Whether operation i depends on the root."""
        return root in self.roots[self.eqns[i].outvars[0]]

    def made(self, operations: set[int]) -> list[Any]:
        """All that the operations give, in order."""
        return [var for i in sorted(operations) for var in self.eqns[i].outvars]

    def handed(self, values: Iterable[Any], *, to: set[int], outs: Iterable[Any]) -> list[Any]:
        """Those of the values that later operations use, or that are results themselves."""
        used = set(variables(outs)) | {var for i in to for var in variables(self.eqns[i].invars)}
        return [var for var in values if var in used and self.roots[var]]

    def part(self, operations: set[int], ins: Sequence[Any], outs: Sequence[Any]) -> Callable[..., list[jax.Array]]:
        """The operations as a function from `ins` to `outs`, with the free ones that they need."""
        eqns = [self.eqns[i] for i in self._with_free(operations, ins, outs)]
        return functools.partial(perform(eqns, [*self.consts, *ins], outs, self.debug_info), *self.consts.values())

    def used(self, operations: set[int], ins: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
        """Those of `ins` that `part` needs."""
        chosen = self._with_free(operations, ins, outs)
        found = set(variables(outs)) | {var for i in chosen for var in variables(self.eqns[i].invars)}
        return [var for var in ins if var in found]

    def _with_free(self, operations: set[int], ins: Sequence[Any], outs: Sequence[Any]) -> list[int]:
        have = {*ins, *self.consts}
        chosen, todo = set(operations), variables([*outs, *(v for i in operations for v in self.eqns[i].invars)])
        while todo:
            var = todo.pop()
            i = self.maker.get(var)
            if var not in have and i is not None and i not in chosen:
                assert not self.roots[var], "a share of the program uses what was not handed to it"
                chosen.add(i)
                todo += variables(self.eqns[i].invars)
        return sorted(chosen)


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Without literals."""
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def replayed(
    eqns: Iterable[core.JaxprEqn],
    env: Mapping[Any, Any],
    outs: Iterable[Any],
    *,
    instead: Callable[[core.JaxprEqn, list[Any]], Sequence[Any] | None],
    debug_info: Any,
) -> list[Any]:
    """Performs operations one by one, and those for which `instead` gives results by that.

    Args:
      env: value of each variable that the operations begin with.
      instead: (operation, its operands) -> results; None: it is performed as it is.
    """
    env = dict(env)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in eqns:
        results = instead(eqn, [read(atom) for atom in eqn.invars])
        if results is None:
            ins = list(dict.fromkeys(variables(eqn.invars)))
            results = perform([eqn], ins, eqn.outvars, debug_info)(*(env[var] for var in ins))
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in outs]


def perform(
    eqns: Sequence[core.JaxprEqn], ins: Sequence[Any], outs: Sequence[Any], debug_info: Any
) -> Callable[..., list[jax.Array]]:
    """The operations as a function from `ins` to `outs`."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    jaxpr = core.Jaxpr([], ins, list(outs), list(eqns), effects, debug_info.with_unknown_names())
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, []))
