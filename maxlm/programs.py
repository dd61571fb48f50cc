"""Further processes of this program, which run the code that starts them, wherever they are started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import maxlm


def module_words(name: str) -> list[str]:
    """The words that start a module of ours. `-P`: the folder that the user stands in is not looked through first."""
    return [sys.executable, "-P", "-m", name]


def environment() -> dict[str, str]:
    """This process's environment, with its own code ahead of what else PYTHONPATH names."""
    paths = str(Path(maxlm.__file__).parent.parent), os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
