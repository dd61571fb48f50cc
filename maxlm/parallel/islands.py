"""Places where a kernel sees only its device's part of the arrays: `shard_map` islands in an otherwise Auto mesh.

XLA cannot look into a hand-written kernel or a loop over heads, and would gather its operands. Attention is independent
between rows and between kv heads, so that with both sharded alike every device works on what it holds, without
communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxlm.kernels.attention import Mask
from maxlm.parallel.sharding import partition

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]


def sharded_attention(kernel: AttentionFn, mesh: Mesh) -> AttentionFn:
    """The kernel over a mesh that shards rows (`batch`) and heads (`q_heads`, `kv_heads`).

    Takes and returns what the kernel does: q (B, S, H, h), k (B, T, K, h), v (B, T, K, v), out (B, S, H, v).
    """
    queries = partition(("batch", None, "q_heads", None))
    keys = partition(("batch", None, "kv_heads", None))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        island = jax.shard_map(
            kernel, mesh=mesh, in_specs=(queries, keys, keys, mask_specs(mask)), out_specs=queries, check_vma=False
        )
        return island(q, k, v, mask)

    return attend


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
        q_offset=spec(mask.q_offset, "batch"),
        sinks=spec(mask.sinks, "q_heads"),
    )
