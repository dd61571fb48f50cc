"""How programs are compiled and sent off: settings of JAX that a run makes before its first device is used."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`; an empty name leaves JAX's own settings as they are."""
    if not folder:
        return
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def give_virtual_devices_threads() -> None:
    """Has several CPU devices of one process share enough threads; to be called before JAX starts its devices.

    By default there is one thread a device. A program waits in its collectives with a thread a device, so that a second
    one in flight can take the threads that the first still needs: XLA ends such a process after 40 seconds.
    """
    asked = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if asked and int(asked[1]) > 1:
        os.environ.setdefault("NPROC", str(4 * int(asked[1])))  # the size of XLA's pools
