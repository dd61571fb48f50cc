"""What the launchers' tests share: a commit that is there, and hosts that are folders of this machine."""

import contextlib
import os
import secrets
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Any commit that holds the quickstart; its full name, so that changes of the tree do not matter.
COMMIT = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
SECRET = secrets.token_hex(6)  # in no file of the code that is copied

# In place of a host's Python: makes environments that hold itself, installs nothing, and trains by noting what it was
# told and ending with the next code of the home's plan ($PLAN where the home was made); without one it waits to
# be ended, a minute at most.
PYTHON = """#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
  "-c import ensurepip") exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >> "$HOME/made" ;;
  "-m pip install "*) [ -f "${@: -1}" ] && echo pip >> "$HOME/made" ;;
  *"maxlm.cli train"*)
    printf '%s\\n' "$*" >> "$HOME/trained"
    [ -e maxlm/cli.py ] && [ "$PYTHONPATH" = "$PWD" ] || exit 3
    [ -z "${TOKEN-}" ] || echo "token of ${#TOKEN}" >> "$HOME/trained"
    trap 'exit 75' TERM
    if [ -s "$HOME/plan" ]; then code=$(head -n 1 "$HOME/plan"); sed -i 1d "$HOME/plan"; sleep 0.1; exit "$code"; fi
    for turn in {1..1200}; do sleep 0.05; done
    exit 9 ;;
  *) exit 4 ;;
esac
"""


def make_home(home: Path) -> Path:
    """A host's home with its Python."""
    (home / "bin").mkdir(parents=True)
    for name in ("python3.11", "python3"):
        (home / "bin" / name).write_text(PYTHON)
        (home / "bin" / name).chmod(0o755)
    (home / "plan").write_text(os.environ.get("PLAN", "") + "\n" if os.environ.get("PLAN") else "")
    return home


def end_processes(folder: Path) -> None:
    """Ends what jobs of the hosts below a folder still run."""
    for pid in folder.rglob("jobs/*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
