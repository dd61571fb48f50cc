"""Forecast and measurement of a run's steps on this machine's CPUs, side by side.

python tools/forecast.py --config=configs/quickstart.py --devices=8 [--steps=10] [--config.data.batch_size=8 ...]

The forecast is of the compiler's plan and of a calibration of under 15 s. What is measured is the median step, and
then, over as many steps more, the growth of the process's peak memory within a step plus the state, with what is freed
given back at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

LIMITS = {"peak memory": 0.10, "step": 0.30}
"""Of what is measured: by how much the forecast may miss it."""


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 0 if both were measured and are as near as docs/plan.md says (`LIMITS`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    given, rest = parser.parse_known_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    flag = f"--xla_force_host_platform_device_count={given.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    from maxlm.compilation import settle_cpu_devices

    settle_cpu_devices()
    found = compare(rest, given.devices, given.steps)
    from rich.console import Console
    from rich.table import Table

    table = Table("", "forecast", "measured", "forecast / measured", box=None)
    for name, (foretold, measured, unit) in found["figures"].items():
        table.add_row(name, f"{foretold:.4g} {unit}", *beside(foretold, measured, unit))
    Console().print(table)
    parts = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in found["parts"].items())
    print(f"parts of the step: {parts}; calibrated in {found['calibration']:.1f} s")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(m is None or abs(f / m - 1) > LIMITS[name] for name, (f, m, _) in found["figures"].items()))


def beside(foretold: float, measured: float | None, unit: str) -> tuple[str, str]:
    """The measurement, and the forecast over it."""
    if measured is None:  # of the peak of a process, where the system does not let it be cleared
        return "not measured", ""
    return f"{measured:.4g} {unit}", f"{foretold / measured:.3f}"


def compare(args: list[str], devices: int, steps: int) -> dict:
    """The figures: forecast, measurement (None: there is none), unit."""
    import jax
    from absl import flags

    from maxlm.configflag import define_config, read_flags
    from maxlm.parallel.mesh import make_mesh
    from maxlm.plan import hlo
    from maxlm.plan.collectives import by_kind_and_axes, find
    from maxlm.plan.forecast import calibrate, compiled_bytes, forecast
    from maxlm.resolve import resolve
    from maxlm.train.compare import example_batch
    from maxlm.train.setup import make_setup, place_batch
    from maxlm.train.state import make_state
    from maxlm.train.watermark import Watermark

    values = flags.FlagValues()
    define_config(values, args)
    read_flags(values, ["forecast", *args])
    config = resolve(values.config, devices=devices)
    setup = make_setup(config, make_mesh(config.parallel))
    shape = config.data.batch_size, config.data.sequence_length
    program = setup.compile(*shape)
    batch = example_batch(0, rows=shape[0], length=shape[1], vocab=config.model.vocab_size)
    placed = place_batch(setup.mesh, shape, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    state, seconds = jax.block_until_ready(make_state(config, setup.optimizer, setup.shardings)), []
    for _ in range(steps):
        begun = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, placed))
        seconds.append(time.perf_counter() - begun)

    rates = calibrate(config)
    sent = by_kind_and_axes(find(hlo.parse(program.compiled.as_text() or ""), config.parallel.sizes))
    foretold = forecast(config, rates, device_bytes=compiled_bytes(program.compiled), traffic=sent)
    peaks: list[float | None] = []
    for _ in range(steps):
        watermark = Watermark()  # for each step anew, as what is freed in small pieces is kept all the same
        state, _ = jax.block_until_ready(program(state, placed))
        peaks.append(watermark.device_bytes(state))
    held, mib = None if None in peaks else max(peak for peak in peaks if peak is not None), 2**20
    return {
        "figures": {
            "peak memory": (foretold.bytes / mib, None if held is None else held * devices / mib, "MiB"),
            "step": (foretold.seconds, sorted(seconds)[len(seconds) // 2], "s"),
        },
        "parts": dict(foretold.parts),
        "calibration": rates.seconds,
    }


if __name__ == "__main__":
    from maxlm.allocator import use_huge_pages

    use_huge_pages()  # as a run does
    sys.exit(main())
