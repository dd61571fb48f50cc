"""A pod patch: what a cluster's pods need beyond what a launcher knows of, read from a file and merged into the pod.

The file is YAML (or JSON) of a pod template, `metadata` and `spec`, as in

    spec:
      hostNetwork: true
      containers:
      - name: maxlm
        env:
        - {name: NCCL_SOCKET_IFNAME, value: "eth1,eth2"}
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from launch.job import LaunchError

_KEYS = ("mountPath", "name")  # by the first of these that all items have, lists of maps are merged


def read_patch(path: Path) -> dict[str, Any]:
    """The patch in a file. Raises LaunchError: it is not there, or is none."""
    try:
        import yaml
    except ImportError as error:  # a machine that only launches need not have MaxLM's packages
        raise LaunchError("--pod_patch is read with PyYAML; type pip install pyyaml, then the same again") from error
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise LaunchError(f"--pod_patch={path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not found or set(found) - {"metadata", "spec"}:
        has = ", ".join(map(str, found)) if isinstance(found, dict) and found else "neither"
        raise LaunchError(f"--pod_patch={path} has {has} at its top; give metadata: and spec: of a pod template")
    return found


def merged(whole: Any, patch: Any) -> Any:
    """`whole` with what `patch` says: maps key by key; lists of maps item by item, as named by name or mountPath, or
    one after the other where they have no names; anything else replaced. Neither argument is changed.
    """
    if isinstance(whole, dict) and isinstance(patch, dict):
        kept = {
            key: merged(value, patch[key]) if key in patch else copy.deepcopy(value) for key, value in whole.items()
        }
        return kept | {key: copy.deepcopy(value) for key, value in patch.items() if key not in whole}
    if not (isinstance(whole, list) and isinstance(patch, list)):
        return copy.deepcopy(patch)
    if not all(isinstance(item, dict) for item in [*whole, *patch]):
        return copy.deepcopy(patch)
    key = next((key for key in _KEYS if all(key in item for item in [*whole, *patch])), None)
    if key is None:
        return copy.deepcopy([*whole, *patch])
    given = {item[key]: item for item in patch}
    found = [merged(item, given.pop(item[key], {})) for item in whole]
    return [*found, *copy.deepcopy(list(given.values()))]
