"""The device mesh: six named axes, always all six, most of them of size one.

Inside a slice (TPU) or a node (GPU) the network is many times faster than between them. A mesh over several is built so
that a single axis crosses the slow network, `data` unless `parallel.across_slices` names another: its gradients are
summed once for each microbatch, while `fsdp` gathers weights in each of its layers and `tensor` sums activations twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from maxlm.config import MESH_AXES, ParallelConfig
from maxlm.errors import UserError


class MeshError(UserError):
    """The mesh asked for does not go with where the devices are."""


def make_mesh(parallel: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a resolved config over `devices` (all of them by default), with Auto axes.

    `resolve(..., devices=n)` has filled in a -1 and checked that the sizes multiply to the number of devices.

    Raises:
      MeshError: the devices are in several slices, and their number does not divide the axis that is to cross them.
    """
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(arrange(parallel, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange(parallel: ParallelConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array with an axis for each of `MESH_AXES`, neighbours in it being near each other.

    Raises:
      MeshError: as of `make_mesh`.
    """
    shape = tuple(parallel.sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    axis = parallel.across_slices
    check_spreads(parallel, devices=len(devices), slices=slices)
    outer = tuple(crossing(parallel.sizes, axis, slices=slices).values())
    inner = tuple(whole // across for whole, across in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def spreads(sizes: Mapping[str, int], across_slices: str, *, slices: int) -> bool:
    """Whether such a mesh can be laid over so many slices or nodes: the axis that crosses divides into them."""
    return slices == 1 or across_slices == "any" or sizes[across_slices] % slices == 0


def check_spreads(parallel: ParallelConfig, *, devices: int, slices: int) -> None:
    """Whether the mesh of a resolved config can be laid over so many slices or nodes.

    Raises:
      MeshError: it cannot; with what to type.
    """
    axis = parallel.across_slices
    if not spreads(parallel.sizes, axis, slices=slices):
        raise MeshError(
            f"the {devices} devices are in {slices} slices or nodes, and parallel.{axis}, the axis that crosses them, "
            f"is {parallel.sizes[axis]}; use a multiple of {slices}, or type parallel.across_slices=any to let every "
            "axis cross"
        )


def crossing(sizes: Mapping[str, int], across_slices: str, *, slices: int) -> dict[str, int]:
    """How many slices or nodes a group along each axis is spread over, in a mesh that `spreads`.

    Where any axis may cross, the outermost do, as far as they reach: what is innermost talks most.
    """
    if across_slices != "any":
        return {axis: slices if axis == across_slices else 1 for axis in sizes}
    found, left = {}, slices
    for axis, size in sizes.items():
        found[axis] = math.gcd(size, left)
        left //= found[axis]
    return found
