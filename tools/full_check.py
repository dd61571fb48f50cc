"""Everything that is too long for every change: the slow tests and the whole of `.ci/run`, in one program.

python tools/full_check.py

Prints what ran, how long it took, and ends with a non-zero exit code if anything failed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

CHECKS: tuple[tuple[str, list[str]], ...] = (
    ("ci", ["bash", ".ci/run"]),
    ("slow tests", [".venv/bin/pytest", "-m", "slow", "-n", "0"]),
    # Installs and starts daemons: for a machine of its own.
    ("slurm", ["bash", "tests/slurm/run.sh", ".venv/bin/python"]),
    ("torture", [".venv/bin/python", "tools/torture.py", "--minutes=30", "--seed=1"]),
    ("every mesh against one device", [".venv/bin/python", "tools/equivalence.py"]),
    ("coverage of the scaling fit's intervals", [".venv/bin/python", "tools/study_coverage.py"]),
    ("quickstart resolves", [".venv/bin/maxlm", "check", "--config=configs/quickstart.py"]),
)


def main() -> int:
    """Runs every check, also after one has failed."""
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
