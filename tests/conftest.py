"""Eight virtual CPU devices and quick compilation for every test, set before JAX starts."""

import os
from pathlib import Path

# Compiles six times faster, to programs that are slower by no more than tests notice.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST_COMPILE}"
    )

import hypothesis  # noqa: E402 (the settings above come first)
import jax  # noqa: E402

from maxlm.compilation import settle_cpu_devices  # noqa: E402

settle_cpu_devices()

# A second run of the tests spends half as long. Only this process: the programs that tests start have caches of their
# own, or none.
jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/maxlm/tests").expanduser()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# The same examples every time: a change fails for what it changed. HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

from tests.buckets import bucket, server  # noqa: E402, F401  (fixtures for every test)
