"""How programs are compiled and sent off: settings of JAX that a run makes before its first device is used."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from maxlm.chips import Chip

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

SPLASH_BLOCKS: Mapping[str, tuple[int, int]] = {"v5p": (2048, 1024), "v6e": (2048, 1024)}
"""The longest blocks of splash attention with operands of 16 and of 32 bits, by chip, in steps that are compiled with
the options above: those that MaxText's recipes for these chips run with, and for 32 bits what fits at head dims up to
256. Elsewhere, and in evaluation and generation, which are compiled without, `splash.GRANTED`."""

ACCUMULATION_OPTIONS: Mapping[str, tuple[str, str]] = {
    "xla_disable_hlo_passes": (
        "while-loop-all-reduce-code-motion",
        "the pass takes sums over devices out of the loop over microbatches, and as of libtpu 0.0.48 it has done so "
        "where gradients of an embedding came out wrong, without a word (openxla/xla#49143, mended upstream in "
        "September 2026); of a step of ours it moves the table's sum over `data` alone, which without it runs once a "
        "microbatch, as those of all other gradients do",
    ),
}
"""Options for TPUs of a step that accumulates gradients: name -> (value, why)."""

IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""Flag of XLA with which CPU devices enter collectives in one order; see `settle_cpu_devices`."""


def compiler_options(chip: Chip, *, accumulation: int) -> dict[str, str]:
    """The options that a step of so many microbatches is compiled with on a chip, in training and planning alike."""
    options = dict(COMPILER_OPTIONS.get(chip.kind, {}))
    if chip.platform == "tpu" and accumulation > 1:
        options |= ACCUMULATION_OPTIONS
    return {name: value for name, (value, _) in options.items()}


def longest_block(chip: Chip | None, dtype: Any) -> int:
    """Of splash attention in a training step with operands of `dtype`, by `SPLASH_BLOCKS`; 0: what fits anywhere."""
    wide = jnp.dtype(dtype).itemsize > 2
    return SPLASH_BLOCKS[chip.kind][wide] if chip is not None and chip.kind in SPLASH_BLOCKS else 0


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`; an empty name leaves JAX's own settings as they are."""
    if not folder:
        return
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def settle_cpu_devices() -> None:
    """Settings for CPU devices that work together, in one process or several; call it before JAX starts its devices.

    - Threads for the devices of one process. By default there is one a device. A program waits in its collectives with
      a thread a device, so that a second one in flight can take the threads that the first still needs: XLA ends such a
      process after 40 seconds.
    - The order of collectives. JAX numbers all those of a `shard_map` alike, and XLA:CPU's default schedule runs those
      that do not wait for each other in any order: now and then two devices exchange different ones, and results are
      wrong (1 in 100 calls of a ring on two busy cores) or the process ends ("Id can't be larger than the number of
      participating threads"). The other schedule keeps their order (none in 7,500 calls), and takes less memory.
    """
    given = os.environ.get("XLA_FLAGS", "")
    asked = re.search(r"xla_force_host_platform_device_count=(\d+)", given)
    devices = int(asked[1]) if asked else 1
    if devices > 1:
        os.environ.setdefault("NPROC", str(4 * devices))  # the size of XLA's pools
    if (devices > 1 or jax.distributed.is_initialized()) and IN_ORDER.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{given} {IN_ORDER}".strip()
