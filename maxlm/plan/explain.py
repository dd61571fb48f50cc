"""How a run is laid over its mesh: the sharding table, and for every parameter and activation what a device holds.

Parameters come from their declarations. Activations are those that the model pins to the table while the step is traced
for its shapes alone; XLA places everything between them.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from maxlm import tree
from maxlm.config import Config
from maxlm.data.batch import Batch
from maxlm.model.decoder import split_model
from maxlm.model.runtime import Runtime
from maxlm.optim.optimizers import make_optimizer
from maxlm.optim.schedules import make_rates
from maxlm.parallel.sharding import RULES, cut, settled
from maxlm.plan.page import WIDTH, gib
from maxlm.plan.topology import Topology
from maxlm.train.outlook import heaviest
from maxlm.train.state import abstract_shapes
from maxlm.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Placed:
    """An array on the mesh.

    what: a parameter's path, or the place in the source that pins an activation.
    logical, mesh_axes: of each dim; "" for a dim that is not cut.
    bytes, device_bytes: of the whole array, and of a device's part.
    """

    what: str
    shape: tuple[int, ...]
    dtype: str
    logical: tuple[str, ...]
    mesh_axes: tuple[str, ...]
    bytes: int
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A config's layout. `rules` are the table's rows: logical axis -> mesh axes of more than one device."""

    mesh: Mapping[str, int]
    rules: Mapping[str, str]
    parameters: tuple[Placed, ...]
    activations: tuple[Placed, ...]


def explanation(config: Config) -> Explanation:
    """The layout of a resolved config whose mesh is settled."""
    sizes = config.parallel.sizes
    specs = tree.paths(split_model(config.model).specs)
    return Explanation(
        mesh=sizes,
        rules={name: _axes(axes, sizes) for name, axes in RULES.items()},
        parameters=tuple(_placed(path, spec.shape, spec.dtype, spec.logical, sizes) for path, spec in specs.items()),
        activations=tuple(_activations(config, sizes)),
    )


def _axes(axes: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    return " + ".join(f"{axis} {sizes[axis]}" for axis in axes if sizes[axis] > 1)


def _placed(
    what: str, shape: tuple[int, ...], dtype: Any, logical: tuple[str | None, ...], sizes: Mapping[str, int]
) -> Placed:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    own = math.prod(-(-length // cut(sizes, name)) for length, name in zip(shape, logical, strict=True))
    return Placed(
        what=what,
        shape=tuple(shape),
        dtype=str(np.dtype(dtype)),
        logical=tuple(name or "" for name in logical),
        mesh_axes=tuple(_axes(RULES[name], sizes) if name else "" for name in logical),
        bytes=size,
        device_bytes=own * np.dtype(dtype).itemsize,
    )


def _activations(config: Config, sizes: Mapping[str, int]) -> list[Placed]:
    """Traces a step on no devices, with a `constrain` that writes down what it is asked; each place once."""
    found: dict[tuple[Any, ...], Placed] = {}

    def record(x: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
        caller = sys._getframe(1)
        code = caller.f_code
        function = code.co_qualname.replace(".<locals>", "").removesuffix(".__call__")
        where = f"{Path(code.co_filename).stem}: {function}"
        logical = settled(x.shape, logical, sizes)
        place = _placed(where, x.shape, x.dtype, logical, sizes)
        found.setdefault((where, place.shape, place.dtype, logical), place)
        return x

    parts = split_model(config.model)
    runtime = Runtime(
        dtype=jnp.dtype(config.train.precision),
        reduce_dtype=jnp.dtype(config.train.reduce_dtype),
        constrain=record,
        remat=config.train.remat,
    )
    optimizer = make_optimizer(config.optim, parts.specs)
    shape = heaviest(config).shape
    ints, floats = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(tokens=ints, targets=ints, segments=ints, positions=ints, weights=floats)
    step, rates = make_train_step(config, parts, optimizer, runtime), make_rates(config.optim, config.train.steps)
    jax.eval_shape(step, abstract_shapes(config, optimizer), batch, rates)
    return list(found.values())


def as_json(told: Explanation) -> str:
    """All of it."""
    return json.dumps(dataclasses.asdict(told), indent=1) + "\n"


def print_explanation(told: Explanation, topology: Topology, console: Console) -> None:
    """The tables."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    mesh = ", ".join(f"{axis} {size}" for axis, size in told.mesh.items())
    console.print(f"{topology.describe()}; mesh: {mesh}", highlight=False)
    table = Table("logical axis", "mesh axes", title="the sharding table", title_justify="left", box=None)
    for name, axes in told.rules.items():
        table.add_row(name, axes or "whole on every device")
    console.print("", table)
    for title, items in (("parameters", told.parameters), ("activations", told.activations)):
        console.print("", _table(title, items))
    held = sum(item.device_bytes for item in told.parameters)
    whole = sum(item.bytes for item in told.parameters)
    kinds = collections.Counter(item.mesh_axes for item in told.parameters if not any(item.mesh_axes))
    console.print(f"\nparameters: {gib(whole)} in all, {gib(held)} a device", highlight=False)
    if alone := sum(kinds.values()):
        console.print(f"{alone} of {len(told.parameters)} parameters are whole on every device", highlight=False)


def _table(title: str, items: tuple[Placed, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("what", "array", "logical axes", "mesh axes", "whole", "a device"):
        table.add_column(name, justify="right" if name in ("whole", "a device") else "left", no_wrap=True)
    for item in items:
        dims = ", ".join(map(str, item.shape))
        cut_up = ", ".join(axes or "-" for axes in item.mesh_axes)
        logical = ", ".join(name or "-" for name in item.logical)
        table.add_row(item.what, f"{item.dtype}[{dims}]", logical, cut_up, gib(item.bytes), gib(item.device_bytes))
    return table
