"""Attention on NVIDIA GPUs for rows of several documents: JAX's Pallas kernel through Triton.

cuDNN as JAX calls it takes no segments. This kernel does; it knows neither windows, soft-caps nor sinks. JAX 0.11 still
has it, and warns that it is to move to tokamax.

Shapes: B batch, S positions, H query heads, K kv heads, h head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as kernels

from maxlm.kernels.mask import Mask
from maxlm.kernels.matmul import ATTENTION_NAME

BLOCK = 64  # small enough for the shared memory of an A100 with head dims up to 128, backwards too


def triton(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, interpret: bool = False) -> jax.Array:
    """Attention of q (B, S, H, h) over k and v (B, S, K, h), to (B, S, H, h), as `attention.plain`.

    S is a multiple of `BLOCK`, and queries and keys have the same segments. `interpret` runs the kernel on any
    platform, slowly. Its result and normalisers go by one name, under which remat can save them.
    """
    groups = q.shape[2] // k.shape[2]
    # The kernel knows one key a query head; the gradient of the repetition sums over a group.
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    return _attend(q, k, v, mask.segments_q, mask.scale, interpret)


_SIZES = kernels.BlockSizes(
    block_q=BLOCK, block_k=BLOCK, block_q_dkv=BLOCK, block_kv_dkv=BLOCK, block_q_dq=BLOCK, block_kv_dq=BLOCK
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, scale: float, interpret: bool
) -> jax.Array:
    return kernels.mha(q, k, v, segments, scale, True, _SIZES, interpret=interpret)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, scale: float, interpret: bool
) -> tuple[jax.Array, Any]:
    found = kernels.mha(q, k, v, segments, scale, True, _SIZES, interpret=interpret, return_residuals=True)
    out, normalisers = (checkpoint_name(x, ATTENTION_NAME) for x in found)
    return out, (q, k, v, segments, out, normalisers)


def _backward(scale: float, interpret: bool, kept: Any, g: jax.Array) -> Any:
    """The kernel's own, which takes what its `mha` takes: its defaults, in order."""
    warps, stages, grid, debug, residuals = None, 2, None, False, False
    options = "triton", warps, stages, grid, interpret, debug, residuals
    run: Any = kernels.mha.bwd  # of a type that leaves room for none
    return run(scale, True, _SIZES, *options, kept, g)


_attend.defvjp(_forward, _backward)
