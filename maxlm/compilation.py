"""Compiled programs kept from run to run."""

from __future__ import annotations

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
