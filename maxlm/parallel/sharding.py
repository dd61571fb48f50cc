"""The one sharding table: which mesh axes a logical axis is spread over, for parameters and activations alike.

A parameter's `embed` axis is sharded over `fsdp` (its weights are gathered a layer at a time); the `embed` dim of an
activation is never sharded and has the logical axis None, since `fsdp` already spreads the activation's batch.

Between the tensor-parallel regions the positions of the residual stream are spread over `tensor` too (`residual`;
Korthikanti et al. 2022): norms and the saved stream take a share of a device's work and memory, and the sum after each
region becomes a reduce-scatter, whose other half is the all-gather before the next, in place of an all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "seq": ("context",),
    "residual": ("context", "tensor"),
    "embed": ("fsdp",),
    "staged": ("fsdp",),
    "vocab": ("tensor",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "latent": ("fsdp",),
    "latent_out": (),
    "positions": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "router": (),
    "layers": ("pipeline",),
}


class ShardingError(ValueError):
    """A logical axis is unknown, or two of one array want the same mesh axis."""


def partition(logical: tuple[str | None, ...], rules: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Raises:
      ShardingError: for an unknown logical axis, or a mesh axis wanted by two dims of the array, naming both.
    """
    used: dict[str, str] = {}
    entries: list[Any] = []
    for name in logical:
        if name is not None and name not in rules:
            raise ShardingError(f"the logical axis {name!r} is not in the sharding table; known: {', '.join(rules)}")
        axes = rules[name] if name is not None else ()
        for axis in axes:
            if axis in used:
                raise ShardingError(
                    f"the logical axes {used[axis]!r} and {name!r} of one array {logical} both want the mesh axis "
                    f"{axis!r}; give one of them another row of the sharding table"
                )
            used[axis] = name or ""
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, logical: tuple[str | None, ...]) -> NamedSharding:
    """The sharding on `mesh` of an array with these logical axes; () for a scalar, which is replicated."""
    return NamedSharding(mesh, partition(logical))


def constrainer(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """A function that pins an activation to its place in the table; handed to the model as `Runtime.constrain`.

    Within a `shard_map` it says nothing of the axes that are manual there, along which arrays are cut already.
    """

    def constrain(x: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
        context = jax.sharding.get_abstract_mesh()
        logical = settled(x.shape, logical, mesh.shape)
        if not context.manual_axes:
            return jax.lax.with_sharding_constraint(x, named_sharding(mesh, logical))
        rules = {name: tuple(axis for axis in axes if axis not in context.manual_axes) for name, axes in RULES.items()}
        return jax.lax.with_sharding_constraint(x, NamedSharding(context, partition(logical, rules)))

    return constrain


def settled(
    shape: tuple[int, ...], logical: tuple[str | None, ...], sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    """The logical axes that an activation of this shape is pinned by on a mesh of these sizes.

    After a step of decoding, or of an odd length, every device of a tensor group keeps all its positions. So it does
    within a pipeline, in whose branches XLA would bring weights to such positions by permutes, and those must not stand
    in a branch that other stages do not take. For the same reason a matrix whose inputs are `staged` (its `embed` axis,
    where `tensor` cuts none of its axes) is brought together there.
    """
    if sizes["pipeline"] > 1:
        logical = tuple(None if name == "staged" else name for name in logical)
    if "residual" not in logical:
        return logical
    if not shape[logical.index("residual")] % cut(sizes, "residual") and sizes["pipeline"] == 1:
        return logical
    return tuple("seq" if name == "residual" else name for name in logical)


def shards(mesh: Mesh, name: str) -> int:
    """Into how many parts the table cuts a logical axis on this mesh."""
    return cut(mesh.shape, name)


def cut(sizes: Mapping[str, int], name: str | None) -> int:
    """Into how many parts the table cuts a logical axis on a mesh of these sizes; None is never cut."""
    return math.prod(sizes[axis] for axis in RULES[name]) if name else 1
