"""A parameter is declared once: shape, dtype, logical axes, contracted axes and initializer, all in one place.

Shardings, optimizer groups, parameter and FLOP counts are read off the declaration as `ParamSpec`s and stated nowhere
else. Initializers draw from `jax.random` alone, whose bits depend neither on the mesh nor on compilation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm import tree

Initializer = Callable[[jax.Array, tuple[int, ...], int, Any], jax.Array]
"""`(key, shape, fan_in, dtype) -> value`; fan_in is the number of products that are summed into one output."""

ModuleT = TypeVar("ModuleT", bound=nnx.Module)

DECLARE = "declare"
"""A stream of `nnx.Rngs` by this name says that only declarations are wanted: draws take most of the time to trace."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What is known of a parameter without its value.

    logical: one logical axis a dim; stacked parameters have `layers` first.
    contract: the logical axes that its product sums over; () for tables, scales and biases.
    trained: False for what the step sets by a rule of its own, and no optimizer touches.
    """

    shape: tuple[int, ...]
    dtype: Any
    logical: tuple[str, ...]
    contract: tuple[str, ...]
    trained: bool = True

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)

    @property
    def role(self) -> str:
        """`embedding` (a vocab axis: table and head), `matrix` (contracts) or `vector` (scales and biases)."""
        if "vocab" in self.logical:
            return "embedding"
        return "matrix" if self.contract else "vector"


def parameter(
    rngs: nnx.Rngs,
    dims: Mapping[str, int],
    *,
    contract: tuple[str, ...] = (),
    init: Initializer,
    dtype: Any = jnp.float32,
    trained: bool = True,
) -> nnx.Param:
    """Declares and draws one parameter.

    Args:
      dims: logical axis -> size, in the order of the array's dims.
      contract: the axes of `dims` that the parameter's product sums over.
      trained: as of `ParamSpec`.

    Raises:
      ValueError: a size is below 1, or a contracted axis is not among the dims.
    """
    if bad := {axis: size for axis, size in dims.items() if size < 1}:
        raise ValueError(
            f"parameter with dims {dict(dims)}: {bad} must be 1 or more; build from a config that `resolve` filled"
        )
    if stray := set(contract) - set(dims):
        raise ValueError(f"parameter with dims {dict(dims)}: contract names {sorted(stray)}; name axes of dims only")
    fan_in = math.prod(dims[axis] for axis in contract)
    if DECLARE in rngs:
        init = constant(0.0)
    value = init(rngs.params(), tuple(dims.values()), fan_in, dtype)
    return nnx.Param(value, logical=tuple(dims), contract=contract, trained=trained)


def normal(std: float) -> Initializer:
    """Normal with a given standard deviation."""
    return lambda key, shape, _fan_in, dtype: _scaled_normal(key, shape, dtype, std)


def fan_in_normal(scale: float) -> Initializer:
    """Normal with standard deviation scale / sqrt(fan_in), which keeps the variance of unit inputs at scale^2."""
    return lambda key, shape, fan_in, dtype: _scaled_normal(key, shape, dtype, scale / math.sqrt(fan_in))


def _scaled_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    # Without the barrier a compiler folds std into the constants of the draw, and the last bit depends on jit.
    return std * jax.lax.optimization_barrier(jax.random.normal(key, shape, dtype))


def constant(value: float) -> Initializer:
    """The same number everywhere."""
    return lambda _key, shape, _fan_in, dtype: jnp.full(shape, value, dtype)


def stack(make: Callable[[nnx.Rngs], ModuleT], *, rngs: nnx.Rngs, count: int) -> ModuleT:
    """`count` modules made from split keys, as one module whose parameters have a first axis `layers`."""
    stacked = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))
    for _, node in nnx.iter_graph(stacked):
        if isinstance(node, nnx.Param):
            node.set_metadata(logical=("layers", *node.get_metadata("logical")))
    return stacked


def param_specs(model: nnx.Module) -> dict[str, Any]:
    """The declarations of a model (abstract or with values): the nested dict of its params with a ParamSpec a leaf."""
    specs = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value, metadata = param.get_value(), param.get_metadata()
        specs["/".join(map(str, path))] = ParamSpec(
            tuple(value.shape), value.dtype, metadata["logical"], metadata["contract"], metadata["trained"]
        )
    return tree.from_paths(specs)
