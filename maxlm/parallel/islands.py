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
from jax.sharding import Mesh, PartitionSpec

from maxlm.kernels.attention import Mask
from maxlm.parallel import collectives
from maxlm.parallel.sharding import RULES, partition, shards

LookupFn = Callable[..., jax.Array]
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]


def island(function: Callable[..., Any], mesh: Mesh, *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`shard_map` of the function over all axes of the mesh that are not manual yet where it is called.

    Inside a pipeline `pipeline` is manual already, and an island there is cut along the other axes. On one device the
    function is called as it is: it speaks to others through `collectives`.
    """
    if mesh.size == 1:
        return function

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


def sharded_lookup(mesh: Mesh, *, reduce_dtype: Any = jnp.float32, pieces: bool = False) -> LookupFn:
    """`model.runtime.take` of a table that is spread over `vocab` and `embed`, without gathering the vocabulary.

    The table comes together along `embed` in the dtype of the result. Every device of a tensor group looks up what its
    part of the vocabulary has, and the parts are summed. Left to itself XLA may move the operands between devices by a
    permute, which deadlocks where stages of a pipeline do different things.

    Args:
      reduce_dtype: in which the table's gradient is added up over the mesh; a device adds up its own in float32, as a
        frequent row has many summands.
      pieces: as of `collectives.scatter`, of that sum.
    """
    (embed,), (vocab,) = RULES["embed"], RULES["vocab"]
    others = tuple(axis for axis in RULES["batch"] + RULES["seq"] if axis != embed)
    whole, of_tokens = partition(("vocab", "embed")), partition(("batch", "seq"))

    def placed(tokens: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """Which rows of this device's part the tokens have, and whether they have one."""
        own = tokens - collectives.index(vocab) * rows
        held = (own >= 0) & (own < rows)
        return jnp.where(held, own, 0), held[..., None]

    def scattered(positions: int) -> bool:
        """Whether the sum over `tensor` leaves each of its devices a part of the positions, as the stream has them."""
        return positions % shards(mesh, "residual") == 0

    def of_rows(positions: int) -> PartitionSpec:
        return partition(("batch", "residual" if scattered(positions) else "seq", None))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def find(scale: float, dtype: Any, table: jax.Array, tokens: jax.Array) -> jax.Array:
        split = scattered(tokens.shape[1])

        def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
            wide = collectives.gather((table * scale).astype(dtype), embed, dim=1)
            own, held = placed(tokens, table.shape[0])
            known = (tokens >= 0) & (tokens < table.shape[0] * mesh.shape[vocab])
            rows = jnp.where(held, jnp.take(wide, own, axis=0), 0.0)
            rows = jnp.where(known[..., None], rows, jnp.nan)
            return collectives.scatter(rows, vocab, dim=1) if split else collectives.add(rows, vocab)

        specs = (whole, of_tokens)
        return island(local, mesh, in_specs=specs, out_specs=of_rows(tokens.shape[1]))(table, tokens)

    def forward(scale: float, dtype: Any, table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
        return find(scale, dtype, table, tokens), (table.shape[0], tokens)

    def backward(scale: float, dtype: Any, kept: Any, g: jax.Array) -> tuple[jax.Array, None]:
        del dtype
        count, tokens = kept
        split = scattered(tokens.shape[1])

        def local(tokens: jax.Array, g: jax.Array) -> jax.Array:
            g = collectives.gather(g, vocab, dim=1) if split else g
            rows = count // mesh.shape[vocab]
            own, held = placed(tokens, rows)
            wide = jnp.zeros((rows, g.shape[-1]), jnp.float32).at[own].add(jnp.where(held, g.astype(jnp.float32), 0.0))
            part = collectives.scatter(wide.astype(reduce_dtype), embed, dim=1, pieces=pieces)
            return collectives.add(part, others).astype(jnp.float32) * scale

        specs = (of_tokens, of_rows(tokens.shape[1]))
        return island(local, mesh, in_specs=specs, out_specs=whole)(tokens, g), None

    find.defvjp(forward, backward)

    def lookup(table: jax.Array, tokens: jax.Array, *, scale: float, dtype: Any) -> jax.Array:
        return find(scale, jnp.dtype(dtype), table, tokens)

    return lookup


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
