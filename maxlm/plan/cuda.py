"""What XLA has to know of an NVIDIA GPU to compile for it where there is none."""

from __future__ import annotations

from maxlm.chips import Chip
from maxlm.errors import UserError

_SHARED = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  fpus_per_core: 128
"""
# (compute capability, cores, clock GHz, L2 MiB, shared memory of a core and, opted in, of a block, threads of a core)
_DEVICES = {
    "a100": ((8, 0), 108, 1.41, 40, 167_936, 166_912, 2048),
    "h100": ((9, 0), 132, 1.98, 50, 233_472, 232_448, 2048),
    "h200": ((9, 0), 132, 1.98, 50, 233_472, 232_448, 2048),
    "b200": ((10, 0), 148, 1.965, 126, 233_472, 232_448, 2048),
}


def has_target(chip: Chip) -> bool:
    """Whether `target_config` has one for this chip."""
    return _device(chip) is not None


def _device(chip: Chip) -> str | None:
    return next((name for name in _DEVICES if chip.kind == name or chip.kind.startswith(f"{name}-")), None)


def target_config(chip: Chip) -> str:
    """XLA's `GpuTargetConfigProto` as text. Sources: NVIDIA's tuning guides of each generation, and `deviceQuery`.

    Raises:
      UserError: there is none for this chip.
    """
    base = _device(chip)
    if base is None:
        raise UserError(f"no compiler target is known for {chip.name}; use one like {', '.join(_DEVICES)}")
    (major, minor), cores, clock, l2_mib, shared_core, shared_block, threads = _DEVICES[base]
    return f"""
gpu_device_info {{
  {_SHARED}
  threads_per_core_limit: {threads}
  shared_memory_per_core: {shared_core}
  shared_memory_per_block_optin: {shared_block}
  core_count: {cores}
  clock_rate_ghz: {clock}
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  l2_cache_size: {l2_mib * 2**20}
  device_memory_size: {int(chip.hbm_bytes)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.kinds[0] if chip.kinds else chip.name}"
"""
