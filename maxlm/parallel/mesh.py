"""The device mesh: six named axes, always all six, most of them of size one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from maxlm.config import ParallelConfig

AXES = ("data", "fsdp", "pipeline", "context", "expert", "tensor")
"""Outermost first: `data` crosses the slowest network, `tensor` the fastest."""


def make_mesh(parallel: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a resolved config over `devices` (all of them by default), with Auto axes.

    `resolve(..., devices=n)` has filled in a -1 and checked that the sizes multiply to the number of devices.
    """
    sizes = dataclasses.asdict(parallel)
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """A mesh of one device, for generation and for tools."""
    return make_mesh(ParallelConfig(data=1), [device or jax.local_devices()[0]])
