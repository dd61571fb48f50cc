"""Attention on TPUs: JAX's splash kernel (Pallas), which skips the blocks that a mask hides.

Shapes: B batch, S positions, H query heads, K kv heads, h head dim, v head dim of values.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from maxlm.kernels.mask import Mask
from maxlm.kernels.matmul import ATTENTION_NAME, exact

BLOCKS = (2048, 1024, 512, 384, 256, 128)
GRANTED = 512
"""The longest block that fits into the vector memory that XLA grants a kernel by default, on v4 and later."""


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, longest: int = GRANTED, interpret: bool = False
) -> jax.Array:
    """Attention of q (B, S, H, h) over k (B, S, K, h) and v (B, S, K, v), to (B, S, H, v), as `attention.plain`.

    S is a multiple of 128. `interpret` runs the kernel on any platform, slowly. The sinks' gradient alone is not summed
    in float32: the kernel sums it over positions in q's dtype, so that in bfloat16 it is right to about 2**-8.

    Args:
      longest: as of `block_size`, by chip in `compilation.SPLASH_BLOCKS`.
    """
    heads, length = q.shape[2], q.shape[1]
    block = block_size(length, window=mask.window, longest=longest)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    run = kernels.make_splash_mha(
        masks.MultiHeadMask([_seen(mask, length)] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=mask.softcap or None,
        residual_checkpoint_name=ATTENTION_NAME,
        interpret=interpret,
    )

    def rows(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: kernels.SegmentIds | None, sinks: jax.Array | None
    ) -> jax.Array:
        return jax.vmap(functools.partial(run, sinks=sinks))(q, k, v, segments)

    # The kernel takes heads first, and scores as they come.
    scaled = (q.astype(jnp.float32) * mask.scale).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (scaled, k, v))
    segments = None
    if mask.segments_q is not None and mask.segments_k is not None:
        segments = kernels.SegmentIds(mask.segments_q, mask.segments_k)
    return exact(rows, q.dtype)(q, k, v, segments, mask.sinks).swapaxes(1, 2)


def block_size(length: int, *, window: int, longest: int) -> int:
    """Positions of a block: the most of `BLOCKS` that divide the row, up to `longest`.

    A block that a window leaves little of is multiplied whole: above `GRANTED` none is longer than the window.
    """
    most = min(longest, max(window, GRANTED)) if window else longest
    return next(size for size in BLOCKS if size <= most and length % size == 0)


def _seen(mask: Mask, length: int) -> masks.Mask:
    """Computed a block at a time within the kernel."""
    shape = (length, length)
    if mask.window:
        before = mask.window - 1  # positions to the left of the query, without its own
        return masks.LocalMask(shape, (before, 0), 0)
    return masks.CausalMask(shape)
