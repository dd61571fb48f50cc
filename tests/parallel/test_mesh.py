"""Which devices are neighbours in the mesh, and which axis crosses from slice to slice."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from maxlm.config import MESH_AXES, ParallelConfig
from maxlm.parallel.mesh import MeshError, arrange, make_mesh


def nodes(count, each):
    """Devices as a cluster of GPU nodes shows them, in an order that does not give the nodes away."""
    made = [
        SimpleNamespace(id=i, process_index=i // each, slice_index=i // each, platform="gpu", device_kind="gpu")
        for i in range(count * each)
    ]
    return made[::2] + made[1::2]


def crossing(mesh):
    """The axes along which neighbours are in different nodes."""
    slices = np.vectorize(lambda device: device.slice_index)(mesh)
    return {axis for number, axis in enumerate(MESH_AXES) if np.any(np.diff(slices, axis=number))}


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 2}, "data"),
        ({"data": 4, "fsdp": 2, "tensor": 2}, "data"),
        ({"pipeline": 4, "fsdp": 2, "tensor": 2, "data": 1}, "pipeline"),
    ],
)
def test_one_axis_alone_crosses_the_slow_network(sizes, axis):
    mesh = arrange(ParallelConfig(**sizes, across_slices=axis), nodes(2, 8))
    assert crossing(mesh) == {axis}
    assert mesh.shape == tuple(ParallelConfig(**sizes).sizes.values())
    assert sorted(device.id for device in mesh.flat) == list(range(16))


def test_an_axis_that_the_slices_do_not_divide_is_refused():
    with pytest.raises(MeshError, match=r"16 devices are in 4 slices.*parallel.data.*is 2; use a multiple of 4"):
        arrange(ParallelConfig(data=2, fsdp=8), nodes(4, 4))


def test_any_axis_may_cross_when_asked():
    mesh = arrange(ParallelConfig(data=1, fsdp=16, across_slices="any"), nodes(4, 4))
    assert crossing(mesh) == {"fsdp"}


def tpu_slices(count, side):
    """Square slices of TPUs. Coordinates begin anew in each, as those of real ones do."""
    made = [(s, x, y) for s in range(count) for y in range(side) for x in range(side)]
    return [
        SimpleNamespace(
            id=i,
            process_index=s,
            slice_index=s,
            coords=(x, y, 0),
            core_on_chip=0,
            platform="tpu",
            device_kind="TPU v5 lite",
        )
        for i, (s, x, y) in enumerate(made)
    ]


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 32}, {"data": 4, "fsdp": 4, "tensor": 2}])
def test_any_axis_may_cross_tpu_slices_which_are_laid_out_one_after_the_other(sizes):
    mesh = arrange(ParallelConfig(**sizes, across_slices="any"), tpu_slices(2, 4))
    assert [device.slice_index for device in mesh.flat] == [0] * 16 + [1] * 16
    assert sorted(device.id for device in mesh.flat) == list(range(32))


def test_one_slice_is_in_the_order_of_its_devices():
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()[:8]]
    assert mesh.axis_names == MESH_AXES and all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
