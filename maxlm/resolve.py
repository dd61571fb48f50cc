"""From a `ConfigDict` to a checked `Config`, and back.

`resolve` is a pure function: it reads no file, no environment and no device, and it reports every problem at once,
each as one sentence that says what was given, what was expected and what to type instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from maxlm.checks.data import check_data
from maxlm.checks.loop import check_loop
from maxlm.checks.model import check_model
from maxlm.checks.moe import check_moe
from maxlm.checks.optim import check_optim
from maxlm.checks.pipeline import check_pipeline
from maxlm.checks.words import divisors
from maxlm.config import Config, ModelConfig, ParallelConfig
from maxlm.errors import UserError


class ConfigError(UserError):
    """The config has problems; `problems` holds one sentence for each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(["the config has problems:", *(f"  - {problem}" for problem in problems)]))


def as_config_dict(config: Config) -> ConfigDict:
    """The config as a locked, typed ConfigDict, as `get_config()` of a config file returns it."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return value

    return ConfigDict(plain(config), type_safe=True, convert_dict=True).lock()


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf of a config (or section) as (dotted path, its field with doc and unit, value)."""
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}.")
        elif "of" in field.metadata:
            for name, item in value.items():
                yield from leaves(item, f"{path}.{name}.")
        else:
            yield path, field, value


def differences(config: Config) -> dict[str, tuple[Any, Any]]:
    """Leaves that are not at their default, as path -> (default, value); a named entry is held against a new one."""
    plain = {path: field.default for path, field, _ in leaves(config)}
    return {path: (plain[path], value) for path, _, value in leaves(config) if plain[path] != value}


def resolve(given: ConfigDict | Mapping[str, Any] | Config, *, devices: int | None = None) -> Config:
    """The checked config, with values that follow from others filled in.

    Args:
      given: what `get_config()` returned, with overrides applied, or a `Config`.
      devices: how many devices the mesh has; None leaves a -1 in `parallel` and the mesh's size unchecked.

    Raises:
      ConfigError: naming every problem.
    """
    raw = as_config_dict(given).to_dict() if isinstance(given, Config) else _to_dict(given)
    problems: list[str] = []
    config = _build(Config, raw, "", problems)
    if problems:  # relations between values are checked only once the values themselves are sound
        raise ConfigError(problems)
    config = dataclasses.replace(
        config, model=_filled_model(config.model), parallel=filled_mesh(config.parallel, devices)
    )
    if problems := relations(config, devices=devices):
        raise ConfigError(problems)
    return config


def relations(config: Config, *, devices: int | None = None) -> list[str]:
    """The problems in the relations between settings of a config whose values are sound and filled in; [] if it stands.

    Args: as of `resolve`.
    """
    problems = [problem for check in _CHECKS for problem in check(config)]
    return [*problems, *_check_devices(config, devices)]


def resolve_model(given: Mapping[str, Any]) -> ModelConfig:
    """A model section that stands alone, e.g. in a checkpoint's metadata, filled in.

    Raises:
      ConfigError: naming every problem.
    """
    problems: list[str] = []
    model = _build(ModelConfig, given, "model.", problems)
    if problems:
        raise ConfigError(problems)
    return _filled_model(model)


def misnamed(path: Sequence[str], given: Mapping[str, Any], section: type = Config, prefix: str = "") -> Iterator[str]:
    """The problem of a path of names that an override of a config cannot follow; none where it can.

    Args:
      path: what stands between the dots of `--config.data.batch_size`.
      given: the config, or the section of it that is reached at `prefix`.
    """
    name, *rest = path
    hints, fields = typing.get_type_hints(section), {field.name: field for field in dataclasses.fields(section)}
    if name not in fields:
        yield _no_setting(name, prefix, fields)
    elif name not in given:
        yield f"{prefix}{name} is not in what get_config() returns; end it with `return as_config_dict(Config(...))`"
    elif rest and "of" in fields[name].metadata:
        (entry, *rest), of = rest, fields[name].metadata["of"]
        if entry not in given[name]:
            yield (
                f"{prefix}{name}.{entry} is not in the config file, which has {', '.join(given[name]) or 'none'}: an "
                f"override changes entries that are there; add {name}={{{entry!r}: {of.__name__}(...)}} to the file"
            )
        elif rest:
            yield from misnamed(rest, given[name][entry], of, f"{prefix}{name}.{entry}.")
    elif dataclasses.is_dataclass(hints[name]):
        if rest:
            yield from misnamed(rest, given[name], typing.cast(type, hints[name]), f"{prefix}{name}.")
        else:
            first = dataclasses.fields(hints[name])[0].name
            yield f"{prefix}{name} is a section; name a setting of it, as in {prefix}{name}.{first}"
    elif rest:
        yield f"{prefix}{name}.{'.'.join(rest)} is not a setting; {prefix}{name} is one, and has no parts"


def _to_dict(given: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return given.to_dict() if isinstance(given, ConfigDict) else dict(given)


# --- values one by one -----------------------------------------------------------------------------------------------


def _build(cls: type, raw: Any, prefix: str, problems: list[str]) -> Any:
    """A dataclass from nested dicts; what is wrong is appended to `problems` and left at its default."""
    if not isinstance(raw, Mapping):
        problems.append(f"{prefix.rstrip('.')} is {raw!r}, but it is a section: give a mapping of its settings")
        return cls()
    hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            problems.append(_no_setting(key, prefix, fields))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in raw:
            continue
        path, item = f"{prefix}{name}", raw[name]
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), item, f"{path}.", problems)
        elif "of" in field.metadata:
            if not isinstance(item, Mapping):
                problems.append(f"{path} is {item!r}, but sections by name were expected; type {path}={{'NAME': {{}}}}")
                continue
            values[name] = {
                key: _build(field.metadata["of"], sub, f"{path}.{key}.", problems) for key, sub in item.items()
            }
        else:
            found = len(problems)
            value = _convert(item, hints[name], path, problems)
            if len(problems) == found:
                problems.extend(_out_of_range(path, value, field))
                values[name] = value
    return cls(**values)


def _no_setting(name: str, prefix: str, fields: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    known = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(sorted(fields))}"
    return f"{prefix}{name} is not a setting; {known}"


def _convert(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """The value as the declared type; only an int for a float and a list for a tuple are converted."""
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        items = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        nested = typing.get_origin(inner[0]) is tuple
        if not isinstance(value, (tuple, list)) or (nested and not all(isinstance(i, (tuple, list)) for i in items)):
            wanted = "a tuple of tuples" if nested else "a tuple"
            problems.append(f'{path} is {value!r}, but {wanted} was expected; type {path}="{_filled(items, inner)}"')
            return value
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_convert(item, inner[0], path, problems) for item in value)
        if len(value) != len(inner):
            problems.append(f"{path} has the entry {value!r}, but entries are ({', '.join(t.__name__ for t in inner)})")
            return value
        return tuple(_convert(item, kind, path, problems) for item, kind in zip(value, inner, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path} is {value}, but a finite number was expected")
        return value
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        problems.append(f"{path} is {value!r} ({type(value).__name__}), but {hint.__name__} was expected")
    return value


def _filled(items: tuple[Any, ...], inner: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tuple of the declared shape out of what was given, for an example."""
    if inner[-1] is not Ellipsis:
        return (*items, *(kind(1) for kind in inner[len(items) :]))
    if kinds := typing.get_args(inner[0]):
        entries = (item for item in items if isinstance(item, (tuple, kinds[0])))
        return tuple(_filled(item if isinstance(item, tuple) else (item,), kinds) for item in entries)
    return items


def _out_of_range(path: str, value: Any, field: dataclasses.Field) -> Iterator[str]:
    low, choices = field.metadata["low"], field.metadata["choices"]
    for item in value if isinstance(value, tuple) else (value,):
        if low is not None and not item >= low:
            yield f"{path} is {item}, but it has to be at least {low:g} ({field.metadata['doc']})"
    if choices and value not in choices:
        close = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        yield f"{path} is {value!r}; {hint}it can be {', '.join(choices)}"


def _filled_model(model: ModelConfig) -> ModelConfig:
    """Fills the dims that follow from others."""
    attention, mlp, moe = model.attention, model.mlp, model.moe
    mlp_dim = mlp.dim
    if not mlp_dim:
        mlp_dim = -(-8 * model.embed_dim // 3 // 64) * 64 if mlp.gated else 4 * model.embed_dim
    return dataclasses.replace(
        model,
        attention=dataclasses.replace(
            attention,
            kv_heads=attention.kv_heads or attention.q_heads,
            head_dim=attention.head_dim or model.embed_dim // attention.q_heads,
        ),
        mlp=dataclasses.replace(mlp, dim=mlp_dim),
        moe=dataclasses.replace(moe, dim=moe.dim or mlp_dim // moe.active) if moe.experts else moe,
    )


def filled_mesh(parallel: ParallelConfig, devices: int | None) -> ParallelConfig:
    """Replaces the one -1 of the mesh by the devices that are left, where that comes out even."""
    sizes = parallel.sizes
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = 1
    for size in sizes.values():
        fixed *= abs(size)
    if devices is None or len(open_axes) != 1 or fixed == 0 or devices % fixed:
        return parallel
    filled: dict[str, Any] = {open_axes[0]: devices // fixed}
    return dataclasses.replace(parallel, **filled)


def batch_shards(parallel: ParallelConfig) -> int:
    """Shards that the rows of a batch are cut into; an axis that is still -1 counts as 1."""
    return max(parallel.data, 1) * max(parallel.fsdp, 1) * max(parallel.expert, 1)


# --- relations between values ----------------------------------------------------------------------------------------


def _check_mesh(config: Config) -> Iterator[str]:
    sizes = config.parallel.sizes
    for axis, size in sizes.items():
        if size == 0:
            yield f"parallel.{axis} is 0; type 1 for an unused axis, or -1 for the devices that are left"
    if sum(size == -1 for size in sizes.values()) > 1:
        axes = " and ".join(f"parallel.{axis}" for axis, size in sizes.items() if size == -1)
        yield f"{axes} are both -1; only one axis can take the devices that are left"
    dims: dict[str, tuple[tuple[str, int], ...]] = {
        "tensor": (
            ("model.attention.q_heads", config.model.attention.q_heads),
            ("model.attention.kv_heads", config.model.attention.kv_heads),
            ("model.vocab_size", config.model.vocab_size),
        ),
        "fsdp": (
            ("model.embed_dim", config.model.embed_dim),
            ("model.attention.latent.kv_dim", config.model.attention.latent.kv_dim),
            ("model.attention.latent.query_dim", config.model.attention.latent.query_dim),
        ),
    }
    if config.model.has_dense_layers:
        dims["tensor"] += (("model.mlp.dim", config.model.mlp.dim),)
    if config.model.mtp_layers:  # their projection has the stream and an embedding side by side
        dims["tensor"] += (("twice model.embed_dim", 2 * config.model.embed_dim),)
    for axis, sharded in dims.items():
        for path, dim in sharded:
            if sizes[axis] > 1 and dim % sizes[axis]:
                fits = divisors(dim)
                yield f"parallel.{axis} is {sizes[axis]}, which does not divide {path} {dim}; use one of {fits}"


def _check_context(config: Config) -> Iterator[str]:
    """Every row divides into two chunks a shard of the sequence (see parallel/context.py)."""
    context = config.parallel.context
    if context < 2:
        return
    if config.parallel.pipeline > 1 and config.parallel.context_method == "ring":
        yield (
            f"parallel.context_method is 'ring' with parallel.pipeline {config.parallel.pipeline}, but keys cannot go "
            "round within the stages of a pipeline; type parallel.context_method=gather"
        )
    lengths = {"data.sequence_length": config.data.sequence_length, "eval.sequence_length": config.eval.sequence_length}
    lengths |= {
        f"data.phases.{name}.sequence_length": phase.sequence_length for name, phase in config.data.phases.items()
    }
    for path, length in lengths.items():
        if length % (2 * context):
            yield (
                f"{path} is {length}, but parallel.context {context} cuts a row into {2 * context} chunks; use a "
                f"multiple of {2 * context}, or a context that divides {length // 2}"
            )


def _check_batches(config: Config) -> Iterator[str]:
    rows, shards = config.train.accumulation, batch_shards(config.parallel)
    batches = [("data.batch_size", config.data.batch_size)]
    batches += [(f"data.phases.{n}.batch_size", p.batch_size) for n, p in config.data.phases.items() if p.batch_size]
    for path, size in batches:
        if size % (rows * shards):
            yield (
                f"{path} is {size}, which does not divide into {rows} microbatches (train.accumulation) over {shards} "
                f"shards (parallel.data x fsdp x expert); use a multiple of {rows * shards}"
            )
    if config.eval.batch_size % shards:
        yield (
            f"eval.batch_size is {config.eval.batch_size}, which does not divide over {shards} shards "
            f"(parallel.data x fsdp x expert); use a multiple of {shards}"
        )


def _check_devices(config: Config, devices: int | None) -> Iterator[str]:
    """A mesh of exactly the devices there are."""
    sizes = config.parallel.sizes
    if devices is None or any(size == 0 for size in sizes.values()):
        return
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "all axes at 1"
    product = 1
    for size in sizes.values():
        product *= abs(size)
    if -1 in sizes.values():
        yield f"the mesh {mesh} does not divide {devices} devices; use sizes whose product is a divisor of {devices}"
    elif product != devices:
        yield (
            f"the mesh {mesh} has {product} devices, but there are {devices}; type parallel.data=-1 to use all, or "
            f"sizes whose product is {devices}"
        )


_CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    check_model,
    check_moe,
    _check_mesh,
    check_pipeline,
    _check_context,
    _check_batches,
    check_optim,
    check_data,
    check_loop,
)
