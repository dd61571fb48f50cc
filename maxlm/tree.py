"""Nested dicts addressed by path: `{"a": {"b": x}}` has the path `a/b`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a nested dict by path, in sorted order (the order of `jax.tree.leaves`)."""
    out: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            out.update({f"{key}/{rest}": leaf for rest, leaf in paths(value).items()})
        else:
            out[key] = value
    return out


def from_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `paths` are `leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_paths(function: Callable[..., Any], tree: Mapping[str, Any], *rest: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `function(path, leaf, *leaves of the rest)` to every leaf of nested dicts of one structure."""
    others = [paths(other) for other in rest]
    return from_paths({path: function(path, leaf, *(o[path] for o in others)) for path, leaf in paths(tree).items()})
