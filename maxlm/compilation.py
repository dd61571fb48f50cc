"""How programs are compiled and sent off: settings of JAX that a run makes before its first device is used."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax

COMPILER_OPTIONS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    chip: {
        "xla_tpu_scoped_vmem_limit_kib": (
            limit,
            "more vector memory a fusion: products work on larger tiles; a fifth fewer cycles by the compiler's own "
            "count on an 8B step on v5p, at several times the compile time; public recipes for v6e set it",
        ),
    }
    for chip, limit in {"v5p": "98304", "v6e": "98304"}.items()
}
"""Options of XLA by chip (`maxlm.chips`): name -> (value, why)."""


def compiler_options(chip: str) -> dict[str, str]:
    """The options that a step is compiled with on a chip of this name, in training and in planning alike."""
    return {name: value for name, (value, _) in COMPILER_OPTIONS.get(chip, {}).items()}


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
