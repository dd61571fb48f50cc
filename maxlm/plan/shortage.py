"""What to say when a run has stopped for want of memory: how much there is, and the cheapest changes that would fit.

The command line joins this to `maxlm train`, which knows nothing of plans.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from maxlm.chips import CHIPS, chip_of_kind
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
    lines = [f"out of memory: {str(error).strip().splitlines()[0]}"]
    try:
        lines += _advice(config)
    except Exception as failed:  # whatever becomes of the advice, the shortage is what the user has to hear of
        lines.append(f"what would fit could not be found out ({type(failed).__name__}: {failed})")
    return OutOfMemory("\n".join(lines))


def _advice(config: Config) -> list[str]:
    """How much there is, and what would fit into it, in lines."""
    devices: list[Any] = jax.devices()
    topology = topology_of(devices, jax.local_devices())
    usable = topology.chip.usable_bytes
    if not usable:
        return [f"how much memory a {devices[0].device_kind} has is not known; try more devices, or train.remat=full"]
    lines = [f"a device has {usable / GIB:.1f} GiB for a program"]
    # The run needed more than there is, whatever the model thinks of it.
    changes = cheapest(resolve(config, devices=len(devices)), topology, needs=usable, usable=usable)
    if not changes:
        searched = ", or `maxlm plan --search`" if topology.chip.hbm_bandwidth else ""
        return [*lines, f"no single change would make it fit; try more devices{searched}"]
    lines.append("by the analytical model these would fit, the cheapest first:")
    return lines + [f"  {place}. {line}" for place, line in enumerate(sentences(changes), start=1)]


def topology_of(devices: list[Any], local: list[Any]) -> Topology:
    """The hardware of a run, as a topology; memory as the devices themselves report it.

    A chip that the table does not name has a memory and no other figures (0 where it does not report that).

    Args:
      devices: of all processes.
      local: this process's own, which alone can be asked for their memory.
    """
    first = local[0]
    stats = first.memory_stats() if first.platform != "cpu" else None
    limit = float((stats or {}).get("bytes_limit") or 0)
    if first.platform == "cpu":  # each has its share of the machine's
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(local)
    chip = chip_of_kind(first.device_kind)
    if chip is None:
        platform = "tpu" if first.platform == "tpu" else "gpu"
        chip = dataclasses.replace(CHIPS["cpu"], name=first.device_kind, platform=platform)
    chip = dataclasses.replace(chip, usable_bytes=limit or chip.usable_bytes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # How the links lie is not known here; a switch is near enough. Of what it joins, each is a device.
    flat = dataclasses.replace(chip, torus_dims=0, devices_per_chip=1)
    return Topology(f"{len(devices)} x {first.device_kind}", flat, slices, (len(devices) // slices,))
