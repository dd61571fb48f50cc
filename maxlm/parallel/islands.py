"""Places where a kernel sees only its device's part of the arrays: `shard_map` islands in an otherwise Auto mesh.

XLA cannot look into a hand-written kernel or a loop over heads, and would gather its operands. Attention is independent
between rows and between kv heads, so that with both sharded alike every device works on what it holds, without
communication.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxlm.kernels.attention import Mask
from maxlm.parallel.sharding import partition, shards

LookupFn = Callable[..., jax.Array]
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]


def island(function: Callable[..., Any], mesh: Mesh, *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`shard_map` of the function over all axes of the mesh that are not manual yet where it is called.

    Inside a pipeline `pipeline` is manual already, and an island there is cut along the other axes.
    """

    def call(*args: Any) -> Any:
        context = jax.sharding.get_abstract_mesh()
        return jax.shard_map(
            function,
            mesh=context if context.manual_axes else mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(mesh.axis_names) - set(context.manual_axes),
            check_vma=False,
        )(*args)

    return call


def sharded_attention(kernel: AttentionFn, mesh: Mesh) -> AttentionFn:
    """The kernel over a mesh that shards rows (`batch`) and heads (`q_heads`, `kv_heads`).

    Takes and returns what the kernel does: q (B, S, H, h), k (B, T, K, h), v (B, T, K, v), out (B, S, H, v).
    """
    queries = partition(("batch", None, "q_heads", None))
    keys = partition(("batch", None, "kv_heads", None))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        specs = (queries, keys, keys, mask_specs(mask))
        return island(kernel, mesh, in_specs=specs, out_specs=queries)(q, k, v, mask)

    return attend


def sharded_lookup(mesh: Mesh) -> LookupFn:
    """`model.runtime.take` of a table that is spread over `vocab` and `embed`, without gathering the vocabulary.

    The table comes together along `embed` in the dtype of the result. Every device of a tensor group looks up what its
    part of the vocabulary has, and the parts are summed. Left to itself XLA may move the operands between devices by a
    permute, which deadlocks where stages of a pipeline do different things.
    """

    def lookup(table: jax.Array, tokens: jax.Array, *, scale: float, dtype: Any) -> jax.Array:
        # The sum over `tensor` leaves each of its devices a part of the positions, as the stream has them.
        scattered = tokens.shape[1] % shards(mesh, "residual") == 0

        def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
            own = tokens - jax.lax.axis_index("tensor") * table.shape[0]
            held = (own >= 0) & (own < table.shape[0])
            rows = _wide_rows(scale, jnp.dtype(dtype), table, jnp.where(held, own, 0))
            rows = jnp.where(held[..., None], rows, 0.0)
            known = (tokens >= 0) & (tokens < table.shape[0] * mesh.shape["tensor"])
            rows = jnp.where(known[..., None], rows, jnp.nan)
            if scattered:
                return jax.lax.psum_scatter(rows, "tensor", scatter_dimension=1, tiled=True)
            return jax.lax.psum(rows, "tensor")

        specs = (partition(("vocab", "embed")), partition(("batch", "seq")))
        out = partition(("batch", "residual" if scattered else "seq", None))
        return island(local, mesh, in_specs=specs, out_specs=out)(table, tokens)

    return lookup


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wide_rows(scale: float, dtype: Any, table: jax.Array, numbers: jax.Array) -> jax.Array:
    """Rows of what the devices along `fsdp` hold, side by side: (V, D / fsdp), (B, S) -> (B, S, D) in `dtype`."""
    wide = jax.lax.all_gather((table * scale).astype(dtype), "fsdp", axis=1, tiled=True)
    return jnp.take(wide, numbers, axis=0)


def _wide_rows_forward(scale: float, dtype: Any, table: jax.Array, numbers: jax.Array) -> Any:
    return _wide_rows(scale, dtype, table, numbers), (table.shape[0], numbers)


def _wide_rows_backward(scale: float, dtype: Any, kept: Any, g: jax.Array) -> Any:
    del dtype
    count, numbers = kept
    # In float32 from here on: a frequent row's gradient has many summands.
    wide = jnp.zeros((count, g.shape[-1]), jnp.float32).at[numbers].add(g.astype(jnp.float32))
    return jax.lax.psum_scatter(wide, "fsdp", scatter_dimension=1, tiled=True) * scale, None


_wide_rows.defvjp(_wide_rows_forward, _wide_rows_backward)


def mask_specs(mask: Mask, *, seq: str | None = None) -> Mask:
    """A Mask that holds, in place of each of its arrays, the array's PartitionSpec.

    Args:
      seq: the logical axis of positions.
    """

    def spec(x: jax.Array | int | None, *logical: str | None) -> Any:
        return None if x is None else partition(logical[: jnp.ndim(x)])

    return dataclasses.replace(
        mask,
        segments_q=spec(mask.segments_q, "batch", seq),
        segments_k=spec(mask.segments_k, "batch", seq),
        q_offset=spec(mask.q_offset),
        sinks=spec(mask.sinks, "q_heads"),
        slopes=spec(mask.slopes, "q_heads"),
    )
