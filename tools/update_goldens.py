"""Writes tests/goldens: each recipe's step at reduced depth, in about thirty lines. Look at the diff before you commit.

python tools/update_goldens.py [RECIPE ...] [--only=cpu|tpu]

`cpu` compiles a small relative of the recipe for eight virtual devices, which the default tests compare; `tpu` compiles
the recipe's own widths for its first topology (needs `pip install -e '.[plan]'`; a minute or more each).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from maxlm.config import Config
from maxlm.plan import golden
from maxlm.resolve import resolve
from maxlm.train.setup import Setup

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"
KINDS = ("cpu", "tpu")


def recipes() -> list[str]:
    """Names of the config files that are tuned for named hardware."""
    return sorted(path.stem for path in (ROOT / "configs").glob("*.py") if "PLACES" in path.read_text())


def load(name: str) -> ModuleType:
    """A recipe's module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def place_of(name: str) -> str:
    """The topology that a recipe is for if nothing is said."""
    return next(iter(load(name).PLACES))


def small_page(name: str) -> str:
    """The golden of a recipe's small relative, compiled here, on eight virtual CPU devices."""
    config: Config = golden.small(resolve(load(name).get_config()))
    return page_of(name, golden.small_setup(config))


def page_of(name: str, setup: Setup) -> str:
    """The golden of a small setup."""
    text = setup.compile(setup.config.data.batch_size, setup.config.data.sequence_length).compiled.as_text() or ""
    lines = [*golden.summary(text, dict(setup.mesh.shape)), *golden.state_lines(setup)]
    return golden.page(f"{name}, small, on eight CPU devices", setup.config, lines)


def whole_page(name: str, *, cache: str | None) -> str:
    """The golden of a recipe at reduced depth, compiled for its first topology."""
    from maxlm.plan.compile import compile_step
    from maxlm.plan.topology import parse_topology

    place = place_of(name)
    topology = parse_topology(place)
    config = golden.shallow(resolve(load(name).get_config(), devices=topology.devices))
    step = compile_step(config, topology, whole=False, cache=cache, log=print)
    lines = golden.summary(step.program, step.mesh, buffers=step.buffers, ranges=step.ranges)
    by = f"libtpu {step.versions.get('libtpu', '?')}"
    return golden.page(f"{name} on {place}, by jax {step.versions['jax']} and {by}", config, lines)


def main() -> int:
    """Writes what was asked for, a recipe after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(recipes())}; all")
    parser.add_argument("--only", choices=KINDS, help="one kind of golden; both")
    args = parser.parse_args()
    if unknown := set(args.recipes) - set(recipes()):
        parser.error(f"{', '.join(sorted(unknown))}: no such recipe; there are {', '.join(recipes())}")
    GOLDENS.mkdir(exist_ok=True)
    for name in args.recipes or recipes():
        if args.only != "tpu":
            _write(f"{name}.cpu.txt", small_page(name))
        if args.only != "cpu" and not place_of(name).startswith(("h100", "h200")):
            _write(f"{name}.txt", whole_page(name, cache=None))
    return 0


def _write(name: str, text: str) -> None:
    path = GOLDENS / name
    changed = golden.differences(path.read_text() if path.exists() else "", text)
    path.write_text(text)
    print(f"{path.relative_to(ROOT)}: {changed or 'as it was'}", flush=True)


if __name__ == "__main__":
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # JAX reads these when it starts: this program, again, with the devices and the quick compiler of the tests.
        sys.path.insert(0, str(ROOT))
        from tests import conftest  # noqa: F401  sets them

        sys.exit(subprocess.run([sys.executable, *sys.argv], env=dict(os.environ)).returncode)
    sys.exit(main())
