"""The feed-forward products of a mixture of experts: tokens to their experts' rows, through the experts, and back.

Shapes: T tokens, k experts of a token, D embed, F mlp, E experts, N rows of a buffer.

No token is multiplied by an expert that it was not sent to, and none is left out: what exceeds a capacity has been
given to no expert (the number E) before it comes here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.grouped import PLAIN, Backend, Cut, grouped_product, row_groups
from maxlm.kernels.matmul import SAVED_NAME


class Linear(NamedTuple):
    """One projection of all experts, float32: kernel (E, in, out) and bias (E, out) or None."""

    kernel: jax.Array
    bias: jax.Array | None = None


class Experts(NamedTuple):
    """The projections of all experts: gate (None without one) and up from D to F, down from F to D."""

    gate: Linear | None
    up: Linear
    down: Linear


class Routes(NamedTuple):
    """Where tokens go: experts (..., k) int32, E for nowhere, and the weights (..., k) float32 of what comes back."""

    experts: jax.Array
    weights: jax.Array


class Order(NamedTuple):
    """Entries sorted into the regions of a buffer.

    rows: (n,) the row of each entry; N for those of no group.
    entries: (N,) the entry in each row; n in rows that have none.
    sizes: (E,) entries of each group.
    """

    rows: jax.Array
    entries: jax.Array
    sizes: jax.Array


Hidden = Callable[[jax.Array | None, jax.Array], jax.Array]
"""(x gate or None, x up) -> hidden, elementwise."""


def order(groups: jax.Array, count: int, *, within: jax.Array | None = None, region: int = 0) -> Order:
    """Sorts entries by group, keeping the order within a group.

    Args:
      groups: (n,) int32 the group of each entry, `count` for none.
      within: (n,) int32 finer groups, each within one of `groups`, to sort by instead.
      region: rows of a group's region of the buffer, which has `count * region` in all; 0: groups lie one right after
        the other, in a buffer of n rows.
    """
    n = groups.shape[0]
    total = count * region or n
    sizes = jnp.zeros(count, jnp.int32).at[groups].add(1, mode="drop")
    sorted_entries = jnp.argsort(groups if within is None else within, stable=True)
    ends = jnp.cumsum(sizes)
    begins = jnp.arange(count) * region if region else ends - sizes
    shift = jnp.append(begins - (ends - sizes), total)  # entries of no group go beyond the end
    rows = jnp.arange(n) + shift[groups[sorted_entries]]
    rows = jnp.zeros(n, jnp.int32).at[sorted_entries].set(jnp.minimum(rows, total).astype(jnp.int32))
    entries = jnp.full(total, n, jnp.int32).at[rows].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    return Order(rows, entries, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def moved(fill: bool, x: jax.Array, forward: jax.Array, back: jax.Array) -> jax.Array:
    """Rows x[forward], zero where `forward` is beyond the end.

    The gradient is a gather too, where automatic differentiation would make a scatter of it.

    Args:
      fill: write those zeros, and in the gradient too; else what stands there is undefined.
      x: (n, D).
      forward: (m,) int32 the row of x that each row of the result takes.
      back: (n, c) int32 the rows of the result that take each row of x; m for none.
    """
    del back
    return _rows(fill, x, forward)


def _rows(fill: bool, x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0) if fill else jnp.take(x, index, axis=0, mode="clip")


def _moved_forward(fill: bool, x: jax.Array, forward: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    return moved(fill, x, forward, back), back


def _moved_backward(fill: bool, back: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    parts = _rows(fill, g, back)
    return jnp.sum(parts, axis=1, dtype=jnp.promote_types(g.dtype, jnp.float32)).astype(g.dtype), None, None


moved.defvjp(_moved_forward, _moved_backward)


def to_rows(x: jax.Array, place: Order, *, fill: bool = True) -> jax.Array:
    """Copies tokens (T, D) to the rows (N, D) of their n = T k entries; `fill` as of `moved`."""
    tokens, choices = x.shape[0], place.rows.shape[0] // x.shape[0]
    sources = jnp.where(place.entries < place.rows.shape[0], place.entries // choices, tokens)
    return moved(fill, x, sources, place.rows.reshape(tokens, choices))


def from_rows(y: jax.Array, place: Order, *, fill: bool = True) -> jax.Array:
    """The rows (N, D) of the n entries, in the entries' order: (n, D), zero for entries that have none with `fill`."""
    return moved(fill, y, place.rows, place.entries[:, None])


def weighted(parts: jax.Array, weights: jax.Array) -> jax.Array:
    """(T k, D) entries by their weights (T, k), added up: (T, D) float32."""
    parts = parts.reshape(*weights.shape, -1)
    return jnp.sum(parts.astype(jnp.float32) * weights[..., None], axis=1)


def through_experts(
    rows: jax.Array,
    sizes: jax.Array,
    experts: Experts,
    *,
    hidden: Hidden,
    dtype: Any,
    backend: Backend,
    gathered: str = "",
    reduce_dtype: Any = jnp.float32,
) -> jax.Array:
    """Rows (N, D), sorted by expert, through their experts: (N, D) in `dtype`; undefined for rows of none.

    Args:
      gathered: the mesh axis that D of the kernels, not of the biases, is cut along; empty: they are whole.
      reduce_dtype: in which the gradients of kernels are added up over that axis.
    """
    narrow = jnp.dtype(reduce_dtype)
    inward, outward = (Cut(gathered, 1, narrow), Cut(gathered, 2, narrow)) if gathered else (None, None)

    def project(x: jax.Array, linear: Linear, name: str, cut: Cut | None) -> jax.Array:
        y = grouped_product(x, linear.kernel, sizes, backend=backend, dtype=dtype, cut=cut)
        y = checkpoint_name(y, SAVED_NAME)
        if linear.bias is not None:  # in float32, so that its gradient adds up in float32
            # Rows of no group get no bias, and their cotangents, which may be anything, reach none.
            own = jnp.take(linear.bias, row_groups(sizes, x.shape[0]), axis=0, mode="fill", fill_value=0)
            y = (y.astype(jnp.float32) + own).astype(dtype)
        return checkpoint_name(y, name)

    gate = None if experts.gate is None else project(rows, experts.gate, "mlp_gate", inward)
    return project(hidden(gate, project(rows, experts.up, "mlp_up", inward)), experts.down, "mlp_out", outward)


def local_experts(
    x: jax.Array,
    routes: Routes,
    experts: Experts,
    *,
    hidden: Hidden,
    capacity: int = 0,
    dtype: Any,
    backend: Backend = PLAIN,
    gathered: str = "",
    reduce_dtype: Any = jnp.float32,
) -> jax.Array:
    """Tokens (B, S, D) through the experts that they are sent to, all on one device: (B, S, D) float32.

    Args:
      capacity: entries of one expert in a row of the batch at most; nothing depends on it here.
      gathered, reduce_dtype: as of `through_experts`.
    """
    del capacity
    tokens = x.astype(dtype).reshape(-1, x.shape[-1])
    place = order(routes.experts.reshape(-1), experts.up.kernel.shape[0])
    rows = to_rows(tokens, place)
    how: dict[str, Any] = {"hidden": hidden, "dtype": dtype, "backend": backend}
    y = through_experts(rows, place.sizes, experts, gathered=gathered, reduce_dtype=reduce_dtype, **how)
    y = from_rows(y, place)
    return weighted(y, routes.weights.reshape(tokens.shape[0], -1)).reshape(x.shape)
