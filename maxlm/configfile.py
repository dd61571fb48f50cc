"""Config files: reading one, writing one that can be run again, and noticing what changed between two runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maxlm import config as schema
from maxlm.config import Config
from maxlm.files import write_atomically
from maxlm.resolve import as_config_dict, leaves, resolve


def source(config: Config) -> str:
    """The text of a config file whose `get_config()` gives this config."""
    sections = sorted(name for name, kind in vars(schema).items() if dataclasses.is_dataclass(kind))
    body = _expression(config, 1)
    return (
        '"""The config of this run, as it was used. `maxlm train --config=<this file>` runs it again."""\n\n'
        f"from maxlm.config import {', '.join(sections)}  # noqa: F401\n"
        "from maxlm.resolve import as_config_dict\n\n\n"
        f"def get_config():\n    return as_config_dict(\n        {body}\n    )\n"
    )


def _expression(value: Any, depth: int) -> str:
    """A Python expression for a config section, one setting a line."""
    indent = "    " * (depth + 2)
    if dataclasses.is_dataclass(value):
        items = [f"{f.name}={_expression(getattr(value, f.name), depth + 1)}" for f in dataclasses.fields(value)]
        inner = "".join(f"{indent}{item},\n" for item in items)
        return f"{type(value).__name__}(\n{inner}{'    ' * (depth + 1)})"
    if isinstance(value, Mapping):
        inner = "".join(f"{indent}{key!r}: {_expression(item, depth + 1)},\n" for key, item in value.items())
        return f"{{\n{inner}{'    ' * (depth + 1)}}}" if value else "{}"
    return repr(value)


def record(config: Config, workdir: Path, *, log: Callable[[str], None]) -> None:
    """Saves the config in the run; if the run was begun with another, says what changed and keeps the old one.

    config.py is for people and can be run again; config.json is for programs, and is read without running anything.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    python, data = workdir / "config.py", workdir / "config.json"
    after = {path: value for path, _, value in leaves(config)}
    if data.exists():
        before = {path: value for path, _, value in leaves(resolve(json.loads(data.read_text())))}
        changed = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
        if not changed:
            return
        for path in changed:
            log(f"config: {path} was {before.get(path)!r}, now {after.get(path)!r}")
        shutil.copy(python, workdir / f"config.{sum(1 for _ in workdir.glob('config.*.py')) + 1}.py")
    write_atomically(python, source(config))
    write_atomically(data, json.dumps(as_config_dict(config).to_dict(), indent=1))
