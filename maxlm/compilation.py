"""How programs are compiled and sent off: settings of JAX that a run makes before its first device is used."""

from __future__ import annotations

import os
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


def order_virtual_devices() -> None:
    """Has several CPU devices of one process run one program at a time; to be called before JAX starts its devices.

    They share one pool of threads. With two programs in flight, the collectives of the later one can take all threads
    while the earlier one waits for another: XLA ends such a process after 40 seconds.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags or jax.config.jax_num_cpu_devices > 1:  # type: ignore[attr-defined]  # added by JAX at run time
        jax.config.update("jax_cpu_enable_async_dispatch", False)
