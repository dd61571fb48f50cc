"""The most memory that the devices of this process, or on CPUs the process itself, held over the steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from maxlm.allocator import give_back


class Watermark:
    """Begun when the step is compiled and the state is there, so that neither compiler nor initialisation counts."""

    def __init__(self) -> None:
        """Forgets the peak so far, where it is kept by Linux.

        What was freed but kept for later goes back first, or steps would use that and seem to need nothing.
        """
        self._before = None
        give_back()
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
        growth = self.growth()
        if devices[0].platform != "cpu" or growth is None:
            return None
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
        return (growth + held) / len(devices)

    def growth(self) -> int | None:
        """Bytes by which the process was ever larger since than it was then; None where nobody knows."""
        return None if self._before is None else max(_status("VmHWM") - self._before, 0)


def _status(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
