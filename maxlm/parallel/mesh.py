"""The device mesh: six named axes, always all six, most of them of size one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from maxlm.config import MESH_AXES, ParallelConfig


def make_mesh(parallel: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a resolved config over `devices` (all of them by default), with Auto axes.

    `resolve(..., devices=n)` has filled in a -1 and checked that the sizes multiply to the number of devices.
    """
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(parallel.sizes.values()), MESH_AXES, axis_types=types, devices=devices)


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """A mesh of one device, for generation and for tools."""
    return make_mesh(ParallelConfig(data=1), [device or jax.local_devices()[0]])
