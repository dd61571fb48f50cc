"""Multipliers by parameter path: `(regex, value)` pairs, of which the first that matches the whole path counts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from maxlm.errors import UserError


class RuleError(UserError):
    """A parameter that no rule matches, or a rule that no parameter needs."""


def match_rules(rules: Iterable[tuple[str, float]], paths: Iterable[str], *, setting: str) -> dict[str, float]:
    """The value of every path such as `layers/mlp/up` by `re.fullmatch`, first match first.

    Args:
      rules: (pattern, value) pairs.
      paths: the parameters' paths.
      setting: the rules' name in the config, for messages.

    Raises:
      RuleError: if a path has no match, or a rule decides over no path; it lists them all.
    """
    rules, paths = list(rules), list(paths)
    chosen = {path: next((i for i, (p, _) in enumerate(rules) if re.fullmatch(p, path)), None) for path in paths}
    problems = []
    unmatched = [path for path, index in chosen.items() if index is None]
    if unmatched:
        problems.append(
            f"{setting} has no rule for the parameters {', '.join(unmatched)}; every parameter needs one, "
            "so end the list with ('.*', 1.0)"
        )
    for index, (pattern, _) in enumerate(rules):
        if index not in chosen.values():
            problems.append(f"{setting} has the rule {pattern!r}, {_why_idle(pattern, paths)}")
    if problems:
        raise RuleError("\n".join(problems))
    return {path: rules[index][1] for path, index in chosen.items() if index is not None}


def _why_idle(pattern: str, paths: list[str]) -> str:
    """Why a rule decides over no path, and what to do about it."""
    if any(re.fullmatch(pattern, path) for path in paths):
        return "which is never reached, because rules before it match the same parameters; move it up or delete it"
    nearest = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
    return f"which matches no parameter; the nearest is {nearest[0]!r}" if nearest else "but there are no parameters"
