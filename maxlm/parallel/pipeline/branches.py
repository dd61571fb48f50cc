"""Reads off a compiled program whether it would hang where stages of a pipeline do different things."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SINGLE = r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
_SEVERAL = r"(?:branch_computations|called_computations)=\{([^}]*)\}"


def refuse_permutes_in_branches(program: str) -> None:
    """Stops before a program is run that would hang: stages take different branches, and a permute waits for all.

    Conditionals outside of every `shard_map` are let be: their condition is one for all devices.

    Args:
      program: the text of a program compiled for CPU devices, which run a collective-permute as a rendezvous of all.

    Raises:
      RuntimeError: a branch of a conditional permutes, itself or in what it calls.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = computations.setdefault(start[1], [])
        lines.append(line)
    conditionals = [line for lines in computations.values() for line in lines if " conditional(" in line]
    conditionals = [line for line in conditionals if "shard_map" in (_origin(line) or "shard_map")]
    waiting, seen = [name for line in conditionals for name in _called(line)], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations.get(name, ()):
            if " collective-permute(" in line or " collective-permute-start(" in line:
                raise RuntimeError(
                    "a branch of the program permutes, which other stages would never join: "
                    f"{_origin(line) or line.strip()}"
                )
            waiting += _called(line)


def _origin(line: str) -> str:
    """What was traced to an instruction; empty: the compiler does not say."""
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def _called(line: str) -> Iterator[str]:
    yield from re.findall(_SINGLE, line)
    for names in re.findall(_SEVERAL, line):
        yield from (name.strip().lstrip("%") for name in names.split(","))
