"""Everything that is too long for every change: the slow tests and the whole of `.ci/run`, in one program.

python tools/full_check.py

Prints what ran, how long it took, and ends with a non-zero exit code if anything failed.

It takes hours and is for a machine of its own, as root: `.ci/run` makes `.venv` anew, whatever was in it, and the check
of SLURM installs slurm-wlm and munge, writes /etc/slurm/slurm.conf and /etc/hosts and starts daemons. One family's or
module's slow tests are run by `pytest -m slow -n 0 tests/...`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of the torture: what is thrown in half an hour, and how far simulated and measured goodput may lie apart. They differ
# by what the simulation leaves out: faults that warn, that come with a checkpoint, or that damage one.
ENOUGH = ("--least_faults=30", "--least_restarts=15", "--most_apart=0.75")
BITS_PER_BYTE = 1.68  # of the quickstart, on two cores that nothing else uses

CHECKS: tuple[tuple[str, list[str]], ...] = (
    ("ci", ["bash", ".ci/run"]),
    ("what else tests need", [".venv/bin/pip", "install", "--quiet", "-e", ".[plan,tfds]"]),
    ("slow tests", [".venv/bin/pytest", "-m", "slow", "-n", "0", "-rs"]),
    ("tests that CI skips", [".venv/bin/pytest", "-rs", "tests/plan", "tests/data/test_sources.py"]),
    ("slurm", ["bash", "tests/slurm/run.sh", ".venv/bin/python"]),
    ("torture", [".venv/bin/python", "tools/torture.py", "--minutes=30", "--seed=1", *ENOUGH]),
    ("every mesh against one device", [".venv/bin/python", "tools/equivalence.py"]),
    ("coverage of the scaling fit's intervals", [".venv/bin/python", "tools/study_coverage.py"]),
    ("forecasts on CPUs", [".venv/bin/python", "tools/forecast.py", "--config=configs/quickstart.py", "--devices=8"]),
    ("quickstart", [".venv/bin/python", "tools/full_check.py", "--quickstart"]),
)


def quickstart() -> int:
    """README's first command, in a folder of its own, and what its report has to say."""
    with tempfile.TemporaryDirectory(prefix="maxlm_quickstart_") as folder:
        command = [sys.executable, "-m", "maxlm", "train", "--config=configs/quickstart.py", f"--workdir={folder}/run"]
        if code := subprocess.run(command, cwd=ROOT).returncode:
            return code
        report = json.loads(Path(folder, "run", "report.json").read_text())
    reached = report["heldout_bits_per_byte"]
    print(f"{reached:.3f} held-out bits per byte, and at most {BITS_PER_BYTE} are wanted", flush=True)
    return int(reached > BITS_PER_BYTE)


def main(argv: list[str] | None = None) -> int:
    """Runs every check, also after one has failed; with --quickstart that one alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", action="store_true", help="only the quickstart, with this Python")
    if parser.parse_args(argv).quickstart:
        return quickstart()
    failed = []
    for name, command in CHECKS:
        began = time.monotonic()
        code = subprocess.run(command, cwd=ROOT).returncode
        print(
            f"{name}: {'passed' if code == 0 else f'failed ({code})'} in {time.monotonic() - began:.0f} s", flush=True
        )
        if code:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
