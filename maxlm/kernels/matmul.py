"""Matrix products in the compute dtype with float32 accumulation, forwards and backwards.

Every product of the model goes through `einsum`. Left to itself, automatic differentiation multiplies a float32
cotangent by a bfloat16 operand, which is a float32 product on a GPU and a slow path on a CPU.

Float32 operands are multiplied in float32. Left to itself, XLA rounds them to bfloat16 on a TPU, and to TF32 on an
NVIDIA GPU: a run in float32, and the router of any run, would compute with 8 or 11 bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

SAVED_NAME = "matmul"  # what a remat policy calls the products' results, in their final dtype
ATTENTION_NAME = "attention_out"  # and attention's, its normalisers with them where a kernel's gradient needs those


def einsum(
    spec: str, x: jax.Array, w: jax.Array, *, dtype: Any, reduce_dtype: Any = jnp.float32, outermost: str = ""
) -> jax.Array:
    """Multiplies activations `x` by a weight `w`, e.g. `"bsd,dhk->bshk"`: a `product` that remat can save by name."""
    y = product(spec, x, w, dtype=dtype, reduce_dtype=reduce_dtype, outermost=outermost)
    return checkpoint_name(y, SAVED_NAME)


def product(
    spec: str,
    x: jax.Array,
    w: jax.Array,
    *,
    dtype: Any,
    out_dtype: Any = None,
    reduce_dtype: Any = jnp.float32,
    outermost: str = "",
) -> jax.Array:
    """Multiplies two arrays as `spec` says.

    Both operands are cast to `dtype`, sums are float32, and the result is cast to `out_dtype` (by default `dtype`).
    The gradient of `x` and of `w` are products of operands in `dtype` as well, summed in float32 and returned in the
    dtype in which `x` and `w` came: a float32 master weight gets a float32 gradient that was never rounded, unless
    `reduce_dtype` is narrower.

    Args:
      reduce_dtype: in which the gradient of `w` leaves the product, and devices that share the sum add up their parts.
      outermost: a label; if `w` has it, its gradient leaves the product with that dim first, and is turned behind the
        devices' sum.

    Raises:
      ValueError: a label stands twice in one term, or is summed over in one operand alone (the gradient of such a
        product is not an einsum of the same kind).
    """
    _check(spec)
    # The cast of the input is outside the custom gradient, so the input's own dtype is given back by `astype`.
    dtypes = _Dtypes(jnp.dtype(dtype), jnp.dtype(out_dtype or dtype), jnp.dtype(reduce_dtype))
    return _multiply(spec, dtypes, outermost, x.astype(dtype), w)


class _Dtypes(NamedTuple):
    operands: Any
    out: Any
    reduced: Any


def _check(spec: str) -> None:
    left, right, out = _terms(spec)
    for term in (left, right, out):
        if len(set(term)) != len(term):
            raise ValueError(f"einsum {spec!r}: a label stands twice in {term!r}; give each dim its own label")
    if lonely := (set(left) ^ set(right)) - set(out):
        raise ValueError(f"einsum {spec!r}: {sorted(lonely)} stand in one operand only; sum over them before")


def _terms(spec: str) -> tuple[str, str, str]:
    operands, out = spec.replace(" ", "").split("->")
    left, right = operands.split(",")
    return left, right, out


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """What XLA is asked for with operands of `dtype`: all bits of float32 ones; 16-bit ones lose none as they are."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def dot(spec: str, x: jax.Array, y: jax.Array, *, out_dtype: Any = jnp.float32) -> jax.Array:
    """An einsum of operands of one dtype, summed in float32 and by default left so: for what has its own gradient."""
    return jnp.einsum(spec, x, y, preferred_element_type=out_dtype, precision=precision_of(x.dtype))


def exactly(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """`precision_of` for what others have written: their products take the precision that is set where it is traced."""
    return jax.default_matmul_precision("highest") if precision_of(dtype) else contextlib.nullcontext()


def exact(function: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """The function traced `exactly`, and its gradient too, which is traced later."""

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        with exactly(dtype):
            return function(*args)

    def forward(*args: Any) -> Any:
        with exactly(dtype):
            return jax.vjp(function, *args)

    def backward(pull: Any, g: Any) -> Any:
        with exactly(dtype):
            return pull(g)

    run.defvjp(forward, backward)
    return run if precision_of(dtype) else function


def _dot(spec: str, x: jax.Array, w: jax.Array, *, dtype: Any, out_dtype: Any) -> jax.Array:
    return dot(spec, x.astype(dtype), w.astype(dtype)).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(spec: str, dtypes: _Dtypes, outermost: str, x: jax.Array, w: jax.Array) -> jax.Array:
    del outermost
    return _dot(spec, x, w, dtype=dtypes.operands, out_dtype=dtypes.out)


def _forward(spec: str, dtypes: _Dtypes, outermost: str, x: jax.Array, w: jax.Array) -> Any:
    # The weight is kept as it came: a copy in the compute dtype would be a second copy of the parameters.
    return _multiply(spec, dtypes, outermost, x, w), (x, w)


def _backward(spec: str, dtypes: _Dtypes, outermost: str, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    left, right, out = _terms(spec)
    dx = _dot(f"{out},{right}->{left}", g, w, dtype=dtypes.operands, out_dtype=x.dtype)
    # XLA adds the devices' parts up right behind the product, in the dtype that that writes: a cast comes too late.
    written = "".join(sorted(right, key=lambda label: label != outermost))
    dw = dot(f"{left},{out}->{written}", x.astype(dtypes.operands), g.astype(dtypes.operands), out_dtype=dtypes.reduced)
    if written != right:  # XLA would write the product as it is wanted, were it not for the barrier and the layout
        dw = with_layout_constraint(dw, Layout(major_to_minor=tuple(range(dw.ndim))))
        dw = jnp.einsum(f"{written}->{right}", jax.lax.optimization_barrier(dw))
    return dx, dw.astype(w.dtype)


_multiply.defvjp(_forward, _backward)
