"""Floats of 16 bits as integers, on their way through loops on CPUs.

XLA:CPU slices and updates no array of bfloat16 or float16: it makes a float32 copy of the whole of it, and what a loop
keeps of all its turns is such an array. Integers of 16 bits it leaves as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def is_narrow(dtype: Any) -> bool:
    """Whether it is a float of 16 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 2


def as_integers(tree: Any) -> Any:
    """The arrays of a tree, those of 16-bit floats as uint16 of the same bits."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) if is_narrow(x.dtype) else x, tree)


def as_floats(tree: Any, like: Any) -> Any:
    """`as_integers` undone: what is a 16-bit float in `like`, a tree of arrays or of their shapes, is one again."""
    return jax.tree.map(
        lambda x, own: jax.lax.bitcast_convert_type(x, own.dtype) if is_narrow(own.dtype) else x, tree, like
    )


def kept_as_integers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of arrays and trees of them, keeping for its gradient integers in place of 16-bit floats.

    All arrays that it needs are to be among its arguments: it may be traced once more when its gradient is taken, and a
    traced array that it closed over may be gone by then.
    """

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return function(*args)

    def forward(*args: Any) -> Any:
        out, pull = jax.vjp(function, *args)
        # An empty array says of each what it was: a dtype is none.
        return out, (as_integers(pull), jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), pull))

    def backward(kept: Any, g: Any) -> Any:
        return as_floats(*kept)(g)

    run.defvjp(forward, backward)
    return run
