"""The most memory that the devices of this process, or on CPUs the process itself, held over the steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax


class Watermark:
    """Begun when the step is compiled and the state is there, so that neither compiler nor initialisation counts."""

    def __init__(self) -> None:
        """Forgets the peak so far, where it is kept by Linux."""
        self._before = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        except OSError:  # not on Linux, or not allowed
            return

    def device_bytes(self, state: Any) -> float | None:
        """Of one device, at the fullest moment since; None where nobody knows.

        An accelerator says itself. On CPUs it is the growth of the process's peak beside the state, shared out among
        its devices.

        Args:
          state: what was there at the beginning and still is, on this process's devices.
        """
        devices = jax.local_devices()
        stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
        if stats and "peak_bytes_in_use" in stats:
            return float(stats["peak_bytes_in_use"])
        if devices[0].platform != "cpu" or self._before is None:
            return None
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
        return (max(_status("VmHWM") - self._before, 0) + held) / len(devices)


def _status(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
