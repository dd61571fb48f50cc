"""Grouped-query causal self-attention with rotary positions, in training and against a cache.

Shapes: B batch, S sequence, T keys (S, or the cache's capacity C), D embed, H query heads, K kv heads, h head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import ModelConfig
from maxlm.kernels.attention import Mask
from maxlm.kernels.matmul import einsum
from maxlm.model.layers import add_bias, residual_init, rms_norm, rotary
from maxlm.model.param import constant, fan_in_normal, parameter
from maxlm.model.runtime import Runtime


class Sight(NamedTuple):
    """What every layer is told of the rows.

    positions: (B, S) int32, for the rotary angles.
    segments_q, segments_k: (B, S) and (B, T) int32; a query sees keys of its own segment. None: all are of one.
    offset: () int32, decoding only: the slot of the first query's token among the keys.
    real: (B, S) bool, False at padding; None: every position holds a token. Attention needs no telling, as padding is
      behind causality or in a segment of its own.
    """

    positions: jax.Array
    segments_q: jax.Array | None
    segments_k: jax.Array | None
    offset: jax.Array | None = None
    real: jax.Array | None = None


class KeyValues(NamedTuple):
    """Keys and values kept for later tokens: (B, C, K, h) for a layer, (L, B, C, K, h) for all."""

    keys: jax.Array
    values: jax.Array


class AttentionOut(NamedTuple):
    """out: (B, S, D). memory: the layer's keys and values with the new ones written in, or None."""

    out: jax.Array
    memory: KeyValues | None


class GroupedQueryAttention(nnx.Module):
    """Ainslie et al. 2023; with K = H it is multi-head attention, with K = 1 multi-query attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config, self.epsilon = config.attention, config.norm_epsilon
        embed, head_dim = {"embed": config.embed_dim}, {"head_dim": self.config.head_dim}
        queries = {"q_heads": self.config.q_heads} | head_dim
        keys = {"kv_heads": self.config.kv_heads} | head_dim
        inner, zero, one = fan_in_normal(1.0), constant(0.0), constant(1.0)
        self.query = parameter(rngs, embed | queries, contract=("embed",), init=inner)
        self.key = parameter(rngs, embed | keys, contract=("embed",), init=inner)
        self.value = parameter(rngs, embed | keys, contract=("embed",), init=inner)
        self.output = parameter(rngs, queries | embed, contract=tuple(queries), init=residual_init(config))
        bias, qk_norm = self.config.bias, self.config.qk_norm
        self.query_bias = parameter(rngs, queries, init=zero) if bias else None
        self.key_bias = parameter(rngs, keys, init=zero) if bias else None
        self.value_bias = parameter(rngs, keys, init=zero) if bias else None
        self.query_norm = parameter(rngs, head_dim, init=one) if qk_norm else None
        self.key_norm = parameter(rngs, head_dim, init=one) if qk_norm else None

    def __call__(
        self, x: jax.Array, *, sight: Sight, window: int, runtime: Runtime, memory: KeyValues | None = None
    ) -> AttentionOut:
        """Attends from every position of x (B, S, D) to those it sees.

        Args:
          window: positions seen, the query's own included; 0: all before.
          memory: keys and values of earlier tokens; the new ones are written from slot `sight.offset` on.
        """

        def heads(kernel: nnx.Param, bias: nnx.Param | None, norm: nnx.Param | None, axis: str) -> jax.Array:
            y = einsum("bsd,dnh->bsnh", x, kernel[...], dtype=runtime.dtype)
            if bias is not None:
                y = add_bias(y, bias[...])
            if norm is not None:
                y = rms_norm(y, norm[...], self.epsilon)
            return runtime.constrain(y, ("batch", "seq", axis, None))

        theta = self.config.rope_theta
        query = rotary(heads(self.query, self.query_bias, self.query_norm, "q_heads"), sight.positions, theta=theta)
        key = rotary(heads(self.key, self.key_bias, self.key_norm, "kv_heads"), sight.positions, theta=theta)
        value = heads(self.value, self.value_bias, None, "kv_heads")
        query, key, value = (checkpoint_name(y, "attention_qkv") for y in (query, key, value))
        if memory is not None:
            memory = _written(memory, KeyValues(key, value), sight.offset)
            key, value = (kept.astype(runtime.dtype) for kept in memory)
        mask = Mask(
            scale=1 / math.sqrt(self.config.head_dim),
            window=window,
            softcap=self.config.softcap,
            segments_q=sight.segments_q,
            segments_k=sight.segments_k,
            q_offset=sight.offset,
        )
        seen = runtime.attend(query, key, value, mask)
        seen = checkpoint_name(runtime.constrain(seen, ("batch", "seq", "q_heads", None)), "attention_out")
        return AttentionOut(einsum("bsnh,nhd->bsd", seen, self.output[...], dtype=runtime.dtype), memory)


def _written(memory: KeyValues, new: KeyValues, slot: jax.Array | None) -> KeyValues:
    if slot is None:
        raise ValueError("attention has a cache but no slot to write to; give Sight.offset")

    def write(old: jax.Array, fresh: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), slot, axis=1)

    return KeyValues(write(memory.keys, new.keys), write(memory.values, new.values))
