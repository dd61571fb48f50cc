"""What a run is named by: all that its numbers depend on, and nothing else.

The name is a hash of the resolved config's leaves that are not at their defaults, without those that say how a run is
done rather than what, of the fingerprint of the data, and of NUMERICS_VERSION. A setting that is added to the schema
with a default that changes nothing so leaves names alone. A default that is changed would go unnoticed by the name:
`changed_leaves` compares the record that the run itself has kept. Of weights to begin with (`train.init_from`) the name
has the place alone: which they were, the result of the run says.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import maxlm
from maxlm.config import Config
from maxlm.configfile import flat
from maxlm.resolve import differences, leaves
from maxlm.rollcall import code_digest

NUMERICS_VERSION = 1
"""Raised by a change after which the same config and data give other numbers, beyond the last bits."""

HOW = (
    "name",
    "data.cache_dir",
    "data.prefetch",
    "data.workers",
    "data.stores.*.path",
    "train.compilation_cache",
    "train.wandb_project",
    "train.log_every",
    "train.norms_every",
    "train.profile",
    "train.watchdog",
    "train.audit_every",
    "checkpoint.*",
    "eval.every_steps",
    "eval.documents",  # of the evaluations during training: the last one is of all
    "eval.prompts",
    "eval.sample_tokens",
)
"""Leaves that leave a run's losses as they are."""


def run_name(config: Config, fingerprint: str) -> str:
    """The name of a run with this resolved config on data of this fingerprint."""
    chosen = {path: value for path, (_, value) in differences(config).items() if _counts(path)}
    content = json.dumps([NUMERICS_VERSION, fingerprint, chosen], sort_keys=True, default=list)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def changed_leaves(recorded: Mapping[str, Any], config: Config) -> list[str]:
    """Leaves that a run was recorded with, as its config.json says, and that are something else now; in words."""
    before = flat(recorded)
    return [
        f"{path} was {was!r} and is {value!r}"
        for path, field, value in leaves(config)
        if _counts(path) and (was := before.get(path, field.default)) != value
    ]


def fingerprint_of(stores: Mapping[str, str], tokenizer: str) -> str:
    """One fingerprint of all data: of the stores' by name, and of the tokenizer."""
    return hashlib.sha256(json.dumps([sorted(stores.items()), tokenizer]).encode()).hexdigest()[:32]


def commit() -> str:
    """The commit of this program's checkout, with + for changes on top of it; else its version and a digest."""
    package = Path(maxlm.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        # Installed below another repository, as in a virtual environment there, the package is no part of it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    except (OSError, subprocess.SubprocessError):
        return f"version {maxlm.__version__}, code {code_digest(package)}"


def _counts(path: str) -> bool:
    return not any(fnmatch.fnmatchcase(path, pattern) for pattern in HOW)
