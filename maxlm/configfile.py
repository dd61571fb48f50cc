"""Config files: reading one, writing one that can be run again, and noticing what changed between two runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from maxlm import config as schema
from maxlm.config import Config
from maxlm.files import write_atomically
from maxlm.resolve import as_config_dict, leaves


def source(config: Config) -> str:
    """The text of a config file whose `get_config()` gives this config."""
    sections = sorted(name for name, kind in vars(schema).items() if dataclasses.is_dataclass(kind))
    body = _expression(config, 1)
    return (
        '"""The config of this run, as it was used. This runs it again:\n\n'
        'maxlm train --config=<this file> --workdir=<another folder>\n"""\n\n'
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


def flat(recorded: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a config.json by dotted path, whether the schema has them still or not."""
    found: dict[str, Any] = {}
    for name, value in recorded.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": _as_tuples(value)}
    return found


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


class Known(NamedTuple):
    """A config.json's settings that the schema has, and the paths of those that it has no more."""

    given: dict[str, Any]
    dropped: list[str]


def known(recorded: Mapping[str, Any], section: type = Config, prefix: str = "") -> Known:
    """What `resolve` can take of a config.json that was written when the schema was another."""
    if not prefix and (before := recorded.get("train", {})).get("remat") == "custom":  # with the names beside it
        recorded = {**recorded, "train": {**before, "remat": "+".join(before["remat_names"])}}
    hints, fields = typing.get_type_hints(section), {field.name: field for field in dataclasses.fields(section)}
    given: dict[str, Any] = {}
    dropped: list[str] = []
    for name, value in recorded.items():
        path = f"{prefix}{name}"
        section_now = name in fields and ("of" in fields[name].metadata or dataclasses.is_dataclass(hints[name]))
        if name not in fields or section_now != isinstance(value, Mapping):
            dropped.append(path)
        elif "of" in fields[name].metadata:
            parts = {key: known(entry, fields[name].metadata["of"], f"{path}.{key}.") for key, entry in value.items()}
            given[name] = {key: part.given for key, part in parts.items()}
            dropped += [each for part in parts.values() for each in part.dropped]
        elif dataclasses.is_dataclass(hints[name]):
            part = known(value, hints[name], f"{path}.")
            given[name] = part.given
            dropped += part.dropped
        else:
            given[name] = value
    return Known(given, dropped)


def record(config: Config, workdir: Path, *, log: Callable[[str], None]) -> None:
    """Saves the config in the run; if the run was begun with another, says what changed and keeps the old one.

    config.py is for people and can be run again; config.json is for programs, and is read without running anything.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    python, data = workdir / "config.py", workdir / "config.json"
    text, after = source(config), {path: value for path, _, value in leaves(config)}
    if data.exists():
        defaults = {path: field.default for path, field, _ in leaves(config)}  # of settings that came later
        before = defaults | flat(json.loads(data.read_text()))
        changed = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
        if not changed:
            return
        for path in changed:
            now = f"now {after[path]!r}" if path in after else "and is no setting now"
            log(f"config: {path} was {before[path]!r}, {now}")
        if python.read_text() != text:  # else it was written, and the process killed before config.json was
            shutil.copy(python, workdir / f"config.{sum(1 for _ in workdir.glob('config.*.py')) + 1}.py")
    write_atomically(python, text)
    write_atomically(data, json.dumps(as_config_dict(config).to_dict(), indent=1))
