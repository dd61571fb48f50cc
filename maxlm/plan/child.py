"""The process that compiles: `python -m maxlm.plan.child FOLDER PARENT`, started by `maxlm.plan.compile`.

Reads FOLDER/request.json; leaves FOLDER/step.hlo, FOLDER/facts.json and XLA's dumps in FOLDER/dump. It ends with the
process PARENT, whatever ends that.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from maxlm.compilation import settle_cpu_devices
from maxlm.config import MESH_AXES, ParallelConfig
from maxlm.files import write_atomically
from maxlm.parallel.mesh import arrange, make_mesh
from maxlm.plan.compile import request_from_json
from maxlm.plan.topology import Topology
from maxlm.train.outlook import heaviest
from maxlm.train.setup import make_setup

ANALYSIS = ("argument_size", "output_size", "alias_size", "temp_size", "generated_code_size", "peak_memory")


def devices_of(topology: Topology) -> list[Any]:
    """Devices to compile for: of a description for TPUs and GPUs, virtual ones for a CPU."""
    from jax.experimental import topologies

    shape = "x".join(map(str, topology.shape))
    if topology.chip.platform == "cpu":
        return jax.devices()
    if topology.chip.platform == "gpu":
        from maxlm.plan.cuda import target_config

        name = f"{topology.slices}x1x{topology.shape[0]}"  # slices, as which JAX knows nodes; hosts of one; GPUs
        return topologies.get_topology_desc(
            topology_name=name, platform="cuda", topology=name, target_config=target_config(topology.chip)
        ).devices
    more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.shape) < topology.chip.devices_per_host // topology.chip.devices_per_chip:
        more["chips_per_host_bounds"] = (*topology.shape, 1, 1)[:3]
    if topology.chip.kind == "v4":
        more |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    return topologies.get_topology_desc(topology_name=f"{topology.chip.kind}:{shape}", platform="tpu", **more).devices


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """A device of a description, which does not say what node it is in, as those of a run do."""

    device: Any
    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str


def mesh_of(parallel: ParallelConfig, topology: Topology, devices: Sequence[Any]) -> Mesh:
    """The mesh that a run on this hardware makes (`parallel.mesh.make_mesh`), over devices of its description."""
    if topology.chip.platform != "gpu":
        return make_mesh(parallel, devices)
    nodes = [device.id // topology.devices_per_slice for device in devices]
    known = [
        _Gpu(device, device.id, node, node, device.platform, device.device_kind)
        for device, node in zip(devices, nodes, strict=True)
    ]
    placed = np.vectorize(lambda gpu: gpu.device, otypes=[object])(arrange(parallel, known))
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def place_of(device: Any, topology: Topology) -> list[int]:
    """As of `compile.Step.places`."""
    if topology.chip.torus_dims:
        return [getattr(device, "slice_index", 0), *device.coords[: topology.chip.torus_dims]]
    return [device.id // topology.devices_per_slice]


def end_with(parent: int) -> None:
    """Has this process killed when its parent is gone (Linux): a compiler would go on for minutes, and many GiB."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the process that asked for this is gone")


def run(work: Path) -> None:
    """Compiles what was asked for: of a run with phases the heaviest step."""
    settle_cpu_devices()
    request = request_from_json((work / "request.json").read_text())
    config = request.config
    mesh = mesh_of(config.parallel, request.topology, devices_of(request.topology))
    setup = make_setup(config, mesh)
    facts: dict[str, Any] = {
        "mesh": dict(mesh.shape),
        "places": [place_of(device, request.topology) for device in mesh.devices.flat],
        "attention": setup.attention,
    }
    # The parent may end this process before the compiler ends, or while it writes: files are whole or absent, and the
    # program, which says that the compiler ended, comes last.
    write_atomically(work / "facts.json", json.dumps(facts))
    begun = time.monotonic()
    with jax.set_mesh(mesh):  # kernels read from it which chip they are for
        lowered = setup.lower(*heaviest(config).shape)
    traced = time.monotonic()
    compiled = lowered.compile(dict(request.options) or None)
    analysis: Any = compiled.memory_analysis()
    facts["seconds"] = [traced - begun, time.monotonic() - traced]
    facts["analysis"] = {name: int(getattr(analysis, f"{name}_in_bytes", 0)) for name in ANALYSIS}
    write_atomically(work / "facts.json", json.dumps(facts))
    write_atomically(work / "step.hlo", compiled.as_text() or "")


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    run(Path(sys.argv[1]))
