"""What to say when a run has stopped for want of memory: how much there is, and the cheapest changes that would fit.

The command line joins this to `maxlm train`, which knows nothing of plans.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from maxlm.chips import CHIPS, Chip, chip_of_kind
from maxlm.config import Config
from maxlm.errors import UserError
from maxlm.plan.changes import cheapest, sentences
from maxlm.plan.topology import Topology
from maxlm.resolve import resolve

SIGN = "RESOURCE_EXHAUSTED"
GIB = 2**30


class OutOfMemory(UserError):
    """The run does not fit its devices."""


def is_shortage(error: BaseException) -> bool:
    """Whether JAX raised this because a device, or the machine, has too little memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and SIGN in str(error)


def explained(error: BaseException, config: Config) -> OutOfMemory:
    """The error in the user's words.

    Args:
      config: of the run, resolved for its devices or not.
    """
    devices: list[Any] = jax.devices()
    topology = topology_of(devices)
    said = str(error).strip().splitlines()[0]
    whole = resolve(config, devices=len(devices))
    lines = [f"out of memory: {said}"]
    usable = topology.chip.usable_bytes
    if usable:
        lines.append(f"a device has {usable / GIB:.1f} GiB for a program")
    changes = cheapest(whole, topology, usable=usable)
    if changes:
        lines.append("by the analytical model these would fit, the cheapest first:")
        lines += [f"  {place}. {line}" for place, line in enumerate(sentences(changes), start=1)]
    else:
        lines.append("no single change would make it fit; try more devices, or `maxlm plan --search`")
    return OutOfMemory("\n".join(lines))


def topology_of(devices: list[Any]) -> Topology:
    """The hardware that a process sees, as a topology; memory as the devices themselves report it."""
    first = devices[0]
    chip = chip_of_kind(first.device_kind) or CHIPS["cpu"]
    stats = first.memory_stats() if first.platform != "cpu" else None
    if first.platform == "cpu":
        chip = _this_machine(len(devices))
    elif stats and stats.get("bytes_limit"):
        chip = dataclasses.replace(chip, usable_bytes=float(stats["bytes_limit"]))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    flat = dataclasses.replace(chip, torus_dims=0)  # how the links lie is not known here; a switch is near enough
    return Topology(f"{len(devices)} x {first.device_kind}", flat, slices, (len(devices) // slices,))


def _this_machine(devices: int) -> Chip:
    """A CPU device with its share of the machine's memory. Its speed is not known: only its proportions count."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    flops = dict.fromkeys(CHIPS["cpu"].flops, 1e11 / devices)
    return dataclasses.replace(
        CHIPS["cpu"], flops=flops, usable_bytes=memory, hbm_bytes=memory, hbm_bandwidth=2e10 / devices
    )
