"""What devices that share an island say to each other, where an axis has more than one of them.

XLA leaves a collective of one device in the program on CPUs, with a copy of what it is given, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def _size(axis: str) -> int:
    """Devices along an axis of the island that this is traced in; 1 outside of any."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def index(axis: str) -> jax.Array | int:
    """This device's place along the axis."""
    return lax.axis_index(axis) if _size(axis) > 1 else 0


def gather(x: jax.Array, axis: str, *, dim: int) -> jax.Array:
    """The devices' parts of `x`, one behind the other along `dim`."""
    return lax.all_gather(x, axis, axis=dim, tiled=True) if _size(axis) > 1 else x


def scatter(x: jax.Array, axis: str, *, dim: int, pieces: bool = False) -> jax.Array:
    """This device's part along `dim` of the sum of the devices' `x`.

    Args:
      pieces: whether the parts are written one behind the other first: of narrow ones along the last dim XLA:TPU makes
        an all-reduce (`train.setup.outermost_label`).
    """
    if (size := _size(axis)) == 1:
        return x
    if not pieces:
        return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    apart = jnp.moveaxis(x.reshape(*x.shape[:dim], size, -1, *x.shape[dim + 1 :]), dim, 0)
    return lax.psum_scatter(apart, axis, scatter_dimension=0, tiled=False)


def add(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    """The sum of the devices' `x` over one axis or several."""
    several = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if _size(axis) > 1)
    return lax.psum(x, several) if several else x
