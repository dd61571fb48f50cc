"""Attention on NVIDIA GPUs for rows of several documents: JAX's Pallas kernel through Triton.

cuDNN as JAX calls it takes no segments. This kernel does; it knows neither windows, soft-caps nor sinks. JAX 0.11 still
has it, and warns that it is to move to tokamax.

Shapes: B batch, S positions, H query heads, K kv heads, h head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels

from maxlm.kernels.mask import Mask

BLOCK = 64  # small enough for the shared memory of an A100 with head dims up to 128, backwards too


def triton(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, interpret: bool = False) -> jax.Array:
    """Attention of q (B, S, H, h) over k and v (B, S, K, h), to (B, S, H, h), as `attention.plain`.

    S is a multiple of `BLOCK`, and queries and keys have the same segments. `interpret` runs the kernel on any
    platform, slowly. Under remat the forward kernel runs again, since its normalisers have no name to be saved by.
    """
    groups = q.shape[2] // k.shape[2]
    # The kernel knows one key a query head; the gradient of the repetition sums over a group.
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    sizes = kernels.BlockSizes(
        block_q=BLOCK,
        block_k=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_q_dq=BLOCK,
        block_kv_dq=BLOCK,
    )
    return kernels.mha(q, k, v, mask.segments_q, mask.scale, mask.causal, sizes, interpret=interpret)
