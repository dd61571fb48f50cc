"""Places where a kernel sees only its device's part of the arrays: `shard_map` islands in an otherwise Auto mesh.

XLA cannot look into a hand-written kernel or a loop over heads, and would gather its operands. Attention is independent
between rows and between kv heads, so that with both sharded alike every device works on what it holds, without
communication.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from maxlm.kernels.attention import Mask
from maxlm.parallel.sharding import partition

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]


def sharded_attention(kernel: AttentionFn, mesh: Mesh) -> AttentionFn:
    """The kernel over a mesh that shards rows (`batch`) and heads (`q_heads`, `kv_heads`).

    Takes and returns what the kernel does: q (B, S, H, h), k and v (B, T, K, h), out (B, S, H, h).
    """
    queries = partition(("batch", None, "q_heads", None))
    keys = partition(("batch", None, "kv_heads", None))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        rows = jax.tree.map(lambda x: partition(("batch", *(None,) * (x.ndim - 1)) if x.ndim else ()), mask)
        island = jax.shard_map(
            kernel, mesh=mesh, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False
        )
        return island(q, k, v, mask)

    return attend
