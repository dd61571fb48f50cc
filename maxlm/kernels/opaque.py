"""Calls that automatic differentiation takes as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of trees of arrays, which remat does not look into; for the forward pass of a custom gradient.

    Under `jax.checkpoint` and in a scan over layers, JAX takes out of loops what does not depend on a loop's inputs.
    From loops over blocks of attention it takes every block's mask, and even constants, ahead of the loops over blocks,
    heads and layers, and keeps them all: S x T of them, where the loops were written to hold one block.
    """
    call = custom_vmap(lambda *args: function(*args))

    @call.def_vmap
    def batched(axis_size: int, in_batched: list[Any], *args: Any) -> Any:
        axes = tuple(jax.tree.map(lambda mapped: 0 if mapped else None, flags) for flags in in_batched)
        out = jax.vmap(function, in_axes=axes, axis_size=axis_size)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return call
