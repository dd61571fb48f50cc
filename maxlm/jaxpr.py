"""Programs that JAX has traced: what their operations call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend import core


def subprograms(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """The programs among an operation's parameters: of a call, a loop's body, the branches of a conditional."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
                yield opened(item)


def opened(program: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    """The program without its constants."""
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def manual_axes(params: Mapping[str, Any]) -> frozenset[str]:
    """The mesh axes that a `shard_map` with these parameters makes manual."""
    # The parameter's name differs between the versions of JAX that we support.
    return frozenset(params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"])
