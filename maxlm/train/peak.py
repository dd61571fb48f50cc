"""The rate that MFU is a fraction of: the most floating-point operations a second that the devices can do.

For accelerators it is the vendor's dense figure (no sparsity) of the fastest unit that products of the dtype go to
(`maxlm.chips`): of float32, which no product here rounds on its way in, that of six bfloat16 passes on TPUs and of the
FP32 units on NVIDIA GPUs.

CPUs have no trustworthy figure on paper. There the best of a few large matrix products is measured, over all cores of
the process, in float32 and in the compute dtype with float32 accumulation; the faster one counts, since a run is free
to compute in float32.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import maxlm
from maxlm.chips import chip_of_kind
from maxlm.config import Config
from maxlm.resolve import leaves
from maxlm.rollcall import code_digest

SIZE = 1024  # rows and columns of the products measured: large enough for full speed, a few milliseconds each
SECONDS = 0.35  # of measuring, for each dtype

# Settings that no step's bits depend on. (What the stores hold is in the digest of the batch.)
NOT_OF_A_STEP = (
    "name",
    "checkpoint.",
    "eval.",
    "data.cache_dir",
    "data.prefetch",
    "data.stores.",
    "data.tokenizer.",
    "data.workers",
    "optim.guard.max_rejections",
    "optim.guard.rollback",
    "train.audit_every",
    "train.budget_seconds",
    "train.compilation_cache",
    "train.log_every",
    "train.profile",
    "train.wandb_project",
    "train.watchdog",
)


class Peak(NamedTuple):
    """The denominator of MFU."""

    flops: float  # floating-point operations a second, all devices of the run together
    source: str  # "data sheet" or "measured"


def peak_flops(platform_name: str, device_kind: str, dtype: str) -> float | None:
    """The data-sheet rate of one device for products of `dtype`, in FLOP/s; None when it is not known.

    Args:
      platform_name: "tpu", "gpu" or "cpu", as `device.platform` has it.
      device_kind: as `device.device_kind` has it.
      dtype: "float32", "bfloat16" or "float16".
    """
    chip = chip_of_kind(device_kind)
    return None if platform_name == "cpu" or chip is None else chip.peak(dtype)


def run_peak(devices: Sequence[Any], dtype: str) -> Peak | None:
    """The rate of all devices of a run together, or None when one of them is not known.

    On CPUs it is measured in this process (under 1.5 s) and counted once for each process among the devices.

    Args:
      devices: the mesh's JAX devices, those of other processes included.
      dtype: the compute dtype.
    """
    if all(device.platform == "cpu" for device in devices):
        processes = len({device.process_index for device in devices})
        return Peak(flops=measured_flops(dtype) * processes, source="measured")
    rates = [peak_flops(device.platform, device.device_kind, dtype) for device in devices]
    known = [rate for rate in rates if rate is not None]
    return Peak(flops=sum(known), source="data sheet") if len(known) == len(rates) else None


def measured_flops(dtype: str, *, size: int = SIZE, seconds: float = SECONDS) -> float:
    """The best rate in FLOP/s of square products of `size` on this process's default device, which uses all its cores.

    The largest single rate is taken, not the mean: what others take from the machine meanwhile must not lower the
    peak, because a peak too low would make MFU too high.
    """
    best = 0.0
    for kind in {"float32", dtype}:
        square = jnp.ones((size, size), jnp.dtype(kind))
        product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
        product(square).block_until_ready()
        end = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end:
            product(square).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def describe_place(config: Config, mesh: Mesh) -> dict[str, str]:
    """Where and by what steps are computed, as far as their bits depend on it: devices, mesh, code, JAX, settings."""
    return {
        "devices": describe_devices(list(mesh.devices.flat)),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device",
        "code": code_digest(Path(maxlm.__file__).parent),
        "jax": jax.__version__,
        "config": step_settings(config),
    }


def step_settings(config: Config) -> str:
    """A digest of the settings of a resolved config that a step's bits may depend on."""
    kept = {path: value for path, _, value in leaves(config) if not path.startswith(NOT_OF_A_STEP)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def describe_devices(devices: Sequence[Any]) -> str:
    """The devices in words, such as "8 x NVIDIA H100 80GB HBM3" or "2 CPU cores (x86_64)"."""
    kinds = collections.Counter("CPU" if device.platform == "cpu" else device.device_kind for device in devices)
    parts = [f"{count} x {kind}" for kind, count in kinds.items() if kind != "CPU"]
    if kinds["CPU"]:
        processes = len({device.process_index for device in devices})
        virtual = f" as {kinds['CPU']} devices" if kinds["CPU"] > 1 else ""
        shared = f", {processes} processes" if processes > 1 else ""
        parts.append(
            f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores "
            f"({platform.machine()}){virtual}{shared}"
        )
    return " and ".join(parts)
