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
import math
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from maxlm.config import LatentConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.errors import UserError
from maxlm.model.rotary import amplitude
from maxlm.model.table import Table

TRAINING_ONLY = (
    "init",
    "embed_std",
    "head_init",
    "moe.balance_loss",
    "moe.router_z_loss",
    "moe.bias_rate",
    "moe.capacity_factor",
)
"""Settings that say how parameters are drawn or trained, not what the model computes with them."""

_SHARED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"),
    *("quantization_config", "transformers_version"),
)
"""What a config.json says of all halves of a model."""

_STRETCH = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "llama3": ("factor", "original_length", "turns"),
    "yarn": ("factor", "original_length", "turns", "whole_pairs"),
    "longrope": ("original_length", "short_factors", "long_factors"),
}
"""Of a kind of scaling, what the frequencies hang on besides."""

HFConfig = Mapping[str, Any]
"""The content of a config.json."""


class FamilyError(UserError):
    """There is no such family, or the family has no such setting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """Published models that also see or hear, and have a family's model as their text half.

    architectures, model_types: what their config.json says, as of a `Family`.
    config: the word of it under which the text half's settings are.
    prefixes: beginnings of the text half's tensor names -> what they are without the other halves.
    others: patterns of the names of the other halves' tensors, which are left out.
    """

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    config: str
    prefixes: Mapping[str, str]
    others: tuple[str, ...]


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
    whole: models of which only the text half is read; they are exported as the family's own.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    presets: Mapping[str, ModelConfig]
    from_hf: Callable[[HFConfig], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], Table]
    whole: Whole | None = None


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
        names = (family, family.whole) if family.whole else (family,)
        claims = {f"architecture {name}" for each in names for name in each.architectures}
        claims |= {f"model_type {name}" for each in names for name in each.model_types}
        claims |= {f"preset {name}" for name in family.presets} | {f"family {family.name}"}
        for claim in sorted(claims):
            if claim in claimed:
                raise ValueError(f"the {claim} is claimed by {claimed[claim]}.py and by {module.name}.py")
            claimed[claim] = module.name
        found[family.name] = family
    return found


class TextHalf(NamedTuple):
    """The settings of a text model, and the models of more halves that they were found in."""

    config: HFConfig
    whole: Whole | None


def text_half(hf: HFConfig) -> TextHalf:
    """What a config.json's content says of the text half, for a model that also sees or hears; else as it is.

    Raises:
      FamilyError: it says nothing of a text half.
    """
    named = list(hf.get("architectures") or ())
    for family in families().values():
        whole = family.whole
        if whole is None or not (
            any(name in whole.architectures for name in named)
            or (not named and hf.get("model_type") in whole.model_types)
        ):
            continue
        text = hf.get(whole.config)
        if not isinstance(text, Mapping):
            raise FamilyError(f"config.json of {', '.join(named) or hf['model_type']} has no {whole.config!r}")
        shared = {word: hf[word] for word in _SHARED if word in hf}
        return TextHalf(shared | {**text, "architectures": [family.architectures[0]]}, whole)
    return TextHalf(hf, None)


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


def read_model(family: Family, hf: HFConfig) -> ModelConfig:
    """The model of a config.json's content.

    Raises:
      FamilyError: a word is missing, cannot be read, or says what the family does not have.
    """
    named = ", ".join(hf.get("architectures") or [str(hf.get("model_type"))])
    try:
        return family.from_hf(hf)
    except FamilyError:
        raise
    except KeyError as error:
        raise FamilyError(f"config.json of {named} has no {error.args[0]!r}, which has to be there") from error
    except (TypeError, ValueError) as error:
        raise FamilyError(f"config.json of {named} holds a value that cannot be read: {error}") from error


def hf_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The content of the config.json that says what this model is.

    Raises:
      FamilyError: the family has no words for some settings of the model, which are named.
    """
    content = family.to_hf(model)
    problems = [
        f"{path} is {ours!r}, read back as {back!r}" for path, ours, back in unlike(model, read_model(family, content))
    ]
    if problems:
        raise FamilyError(f"{family.architectures[0]} cannot express the model: {'; '.join(problems)}")
    return content


def unlike(one: ModelConfig, other: ModelConfig) -> list[tuple[str, Any, Any]]:
    """The leaves in which two model configs say different models, as (path, one's, other's).

    What is the same said in two ways, or of no effect, is no difference.
    """
    mine, theirs = _leaves(one), _leaves(other)
    meant, counterpart = _leaves(_effective(one)), _leaves(_effective(other))
    return [
        (path, mine[path], theirs[path])
        for path in mine
        if not _same(meant[path], counterpart[path]) and path not in TRAINING_ONLY
    ]


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two values are the same; a number may come by another way, a root of a square among them."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=1e-12)
    return mine == theirs


def _leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted path."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), f"{prefix}{field.name}"
        found |= _leaves(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: value}
    return found


def _effective(model: ModelConfig) -> ModelConfig:
    """The model with one word for what can be said in several, and defaults where nothing looks."""
    attention, moe = model.attention, model.moe
    windows = [attention.windows[i % len(attention.windows)] for i in range(model.num_layers + model.mtp_layers)]
    return dataclasses.replace(
        model,
        attention=dataclasses.replace(
            attention,
            scale=attention.scale or 1 / math.sqrt(attention.head_dim),
            windows=tuple(windows),
            latent=attention.latent if attention.latent.kv_dim else LatentConfig(),
        ),
        rope=_effective_rope(model.rope, windowed=any(windows)),
        mlp=dataclasses.replace(model.mlp, dim=0) if moe.experts and not moe.dense_layers else model.mlp,
        moe=moe if moe.experts else MoeConfig(),
    )


def _effective_rope(rope: RopeConfig, *, windowed: bool) -> RopeConfig:
    if not rope.fraction:
        return RopeConfig(fraction=0.0)
    plain = rope.scaling == "none"
    own = {"theta", "fraction", "interleaved", "scaling", *(() if plain else _STRETCH[rope.scaling])}
    if windowed and not (plain and rope.local_theta == rope.theta):
        own.add("local_theta")
    values = {name: getattr(rope, name) for name in own}
    return RopeConfig(**values, attention_factor=amplitude(rope))


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
