"""A model family: its presets, its settings in Hugging Face's words and its table of tensor names.

A family is one file in `maxlm/model/families/` that defines `FAMILY`; every file there is found by itself, and nothing
outside such a file knows its name. The config alone says what the model is: a family adds nothing that `split_model`
would have to be told besides.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from maxlm.config import ModelConfig
from maxlm.errors import UserError
from maxlm.model.table import Table

TRAINING_ONLY = (
    "init",
    "embed_std",
    "moe.balance_loss",
    "moe.router_z_loss",
    "moe.bias_rate",
    "moe.capacity_factor",
)
"""Settings that say how parameters are drawn or trained, not what the model computes with them."""

HFConfig = Mapping[str, Any]
"""The content of a config.json."""


class FamilyError(UserError):
    """There is no such family, or the family has no such setting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What has to be known of a family.

    architectures: the classes in a config.json's `architectures` that it stands for; exports name the first.
    model_types: what `model_type` says where `architectures` is missing.
    presets: published models by name, e.g. llama-3-8b.
    from_hf: a config.json's content -> the model; raises FamilyError (`only`) for settings the family does not have.
    to_hf: the inverse, with `architectures` and `model_type`. Call it through `hf_config`, which finds what the family
      cannot express by reading the result back.
    table: the correspondence of the parameters.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    presets: Mapping[str, ModelConfig]
    from_hf: Callable[[HFConfig], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], Table]


@functools.cache
def families() -> dict[str, Family]:
    """Every family by name.

    Raises:
      ValueError: two of them have the same name, architecture, model type or preset.
    """
    package = importlib.import_module("maxlm.model.families")
    found: dict[str, Family] = {}
    claimed: dict[str, str] = {}
    for module in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
        claims = {f"architecture {name}" for name in family.architectures}
        claims |= {f"model_type {name}" for name in family.model_types}
        claims |= {f"preset {name}" for name in family.presets} | {f"family {family.name}"}
        for claim in sorted(claims):
            if claim in claimed:
                raise ValueError(f"the {claim} is claimed by {claimed[claim]}.py and by {module.name}.py")
            claimed[claim] = module.name
        found[family.name] = family
    return found


def family_of(hf: HFConfig) -> Family:
    """The family of a config.json's content, by its architecture, or else its model type.

    Raises:
      FamilyError: it is of none that is known.
    """
    named = list(hf.get("architectures") or ())
    for family in families().values():
        if any(name in family.architectures for name in named):
            return family
        if not named and hf.get("model_type") in family.model_types:
            return family
    known = sorted(name for family in families().values() for name in family.architectures)
    what = f"the architecture {', '.join(named)}" if named else f"the model_type {hf.get('model_type')!r}"
    raise FamilyError(f"{what} is of no family that is known; these are: {', '.join(known)}")


def hf_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The content of the config.json that says what this model is.

    Raises:
      FamilyError: the family has no words for some settings of the model, which are named.
    """
    content = family.to_hf(model)
    problems = [
        f"{path} is {ours!r}, read back as {back!r}" for path, ours, back in unlike(model, family.from_hf(content))
    ]
    if problems:
        raise FamilyError(f"{family.architectures[0]} cannot express the model: {'; '.join(problems)}")
    return content


def unlike(one: Any, other: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two model configs say different models, as (path, one's, other's)."""
    found: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(one):
        mine, theirs, path = getattr(one, field.name), getattr(other, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(mine):
            found += unlike(mine, theirs, f"{path}.")
        elif mine != theirs and path not in TRAINING_ONLY:
            found.append((path, mine, theirs))
    return found


def preset(name: str) -> ModelConfig:
    """A published model by name.

    Raises:
      FamilyError: there is none of that name.
    """
    every = {key: model for family in families().values() for key, model in family.presets.items()}
    if name not in every:
        raise FamilyError(f"there is no preset {name!r}; these are: {', '.join(sorted(every))}")
    return every[name]


def only(hf: HFConfig, **allowed: tuple[Any, ...]) -> None:
    """Refuses settings that the family does not have, all at once; one that is missing is allowed.

    Raises:
      FamilyError: a setting is not among its allowed values.
    """
    wrong = [
        f"{key} is {json.dumps(hf[key])}, but only {' or '.join(map(json.dumps, values))} is supported"
        for key, values in allowed.items()
        if key in hf and hf[key] not in values
    ]
    if wrong:
        raise FamilyError(f"config.json of {', '.join(hf.get('architectures') or ['?'])}: {'; '.join(wrong)}")
