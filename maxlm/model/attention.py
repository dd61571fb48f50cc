"""Grouped-query causal self-attention with rotary positions, in training and against a cache.

Shapes: B batch, S sequence, T keys (S, or the cache's capacity C), D embed, H query heads, K kv heads, h head dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import AttentionConfig, ModelConfig, RopeConfig
from maxlm.kernels.attention import Mask
from maxlm.model.layers import RMSNorm, add_bias, residual_init
from maxlm.model.param import constant, fan_in_normal, parameter
from maxlm.model.rotary import rotary
from maxlm.model.runtime import Runtime


class Sight(NamedTuple):
    """What every layer is told of the rows.

    positions: (B, S) int32, for the rotary angles.
    segments_q, segments_k: (B, S) and (B, T) int32; a query sees keys of its own segment. None: all are of one.
    offset: () int32, decoding only: the slot of the first query's token among the keys.
    real: (B, S) bool, False at padding; None: every position holds a token. Attention needs no telling, as padding is
      behind causality or in a segment of its own.
    longest: int32, () or what spreads over (B, S): how many positions the rows, or the row or document of each
      position, have, or may come to have in the cache; None: no matter.
    """

    positions: jax.Array
    segments_q: jax.Array | None
    segments_k: jax.Array | None
    offset: jax.Array | None = None
    real: jax.Array | None = None
    longest: jax.Array | None = None


class KeyValues(NamedTuple):
    """What a layer keeps for later tokens, (B, C, ...) with the shapes of `memory_shapes`.

    A layer that sees all that came before has a slot for each of the C tokens that a row may come to have. One with a
    window of w < C keeps the last w - 1 tokens, the oldest first.
    """

    keys: jax.Array
    values: jax.Array


class AttentionOut(NamedTuple):
    """out: (B, S, D). memory: the layer's keys and values with the new ones written in, or None."""

    out: jax.Array
    memory: KeyValues | None


class GroupedQueryAttention(nnx.Module):
    """Ainslie et al. 2023; with K = H it is multi-head attention, with K = 1 multi-query attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config, self.rope = config.attention, config.rope
        embed, head_dim = {"embed": config.embed_dim}, {"head_dim": self.config.head_dim}
        queries = {"q_heads": self.config.q_heads} | head_dim
        keys = {"kv_heads": self.config.kv_heads} | head_dim
        inner, zero = fan_in_normal(1.0), constant(0.0)
        self.query = parameter(rngs, embed | queries, contract=("embed",), init=inner)
        self.key = parameter(rngs, embed | keys, contract=("embed",), init=inner)
        self.value = parameter(rngs, embed | keys, contract=("embed",), init=inner)
        self.output = parameter(rngs, queries | embed, contract=tuple(queries), init=residual_init(config))
        bias, qk_norm = self.config.bias, self.config.qk_norm
        self.query_bias = parameter(rngs, queries, init=zero) if bias else None
        self.key_bias = parameter(rngs, keys, init=zero) if bias else None
        self.value_bias = parameter(rngs, keys, init=zero) if bias else None
        self.output_bias = parameter(rngs, embed, init=zero) if self.config.output_bias else None
        # A logit that has had no training is as good as one more key that is like no other.
        self.sink_bias = parameter(rngs, {"q_heads": self.config.q_heads}, init=zero) if self.config.sinks else None
        normed = {"none": (None, None), "head": (head_dim, head_dim), "joint": (queries, keys)}[qk_norm]
        self.query_norm, self.key_norm = (RMSNorm(config, rngs=rngs, dims=dims) if dims else None for dims in normed)

    def __call__(
        self, x: jax.Array, *, sight: Sight, window: int, runtime: Runtime, memory: KeyValues | None = None
    ) -> AttentionOut:
        """Attends from every position of x (B, S, D) to those it sees.

        Args:
          window: positions seen, the query's own included; 0: all before.
          memory: keys and values of earlier tokens, to which the new ones are added (`remembered`).
        """

        def heads(kernel: nnx.Param, bias: nnx.Param | None, norm: RMSNorm | None, axis: str) -> jax.Array:
            y = runtime.multiply("bsd,dnh->bsnh", x, kernel[...])
            if bias is not None:
                y = add_bias(y, bias[...])
            if norm is not None:
                y = norm(y)
            return runtime.constrain(y, ("batch", "seq", axis, None))

        def turned(y: jax.Array) -> jax.Array:
            return turned_in_sight(y, self.rope, sight, window=window, runtime=runtime)

        query = turned(heads(self.query, self.query_bias, self.query_norm, "q_heads"))
        key = turned(heads(self.key, self.key_bias, self.key_norm, "kv_heads"))
        value = heads(self.value, self.value_bias, None, "kv_heads")
        query, key, value = (checkpoint_name(y, "attention_qkv") for y in (query, key, value))
        if memory is not None:
            seen, memory, sight = remembered(memory, KeyValues(key, value), sight)
            key, value = (kept.astype(runtime.dtype) for kept in seen)
        sinks = self.sink_bias[...] if self.sink_bias is not None else None
        found = runtime.attend(query, key, value, attention_mask(self.config, sight, window=window, sinks=sinks))
        found = runtime.constrain(found, ("batch", "seq", "q_heads", None))
        out = runtime.multiply("bsnh,nhd->bsd", found, self.output[...])
        out = runtime.constrain(out, ("batch", "residual", None))
        if self.output_bias is not None:
            out = add_bias(out, self.output_bias[...])
        return AttentionOut(checkpoint_name(out, "attention_proj"), memory)


def turned_in_sight(y: jax.Array, rope: RopeConfig, sight: Sight, *, window: int, runtime: Runtime) -> jax.Array:
    """Queries or keys (B, S, H, h) of a layer with this window, turned by their positions."""
    return rotary(
        y,
        rope,
        positions=sight.positions,
        windowed=bool(window),
        longest=sight.longest,
        by_products=runtime.turn_by_products,
    )


def attention_mask(config: AttentionConfig, sight: Sight, *, window: int, sinks: jax.Array | None = None) -> Mask:
    """What the kernel is told of a layer with this window."""
    return Mask(
        scale=config.scale or 1 / math.sqrt(config.head_dim),
        window=window,
        softcap=config.softcap,
        segments_q=sight.segments_q,
        segments_k=sight.segments_k,
        q_offset=sight.offset,
        sinks=sinks,
        slopes=jnp.array(alibi_slopes(config.q_heads), jnp.float32) if config.alibi else None,
    )


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head: 2^(-8/n), 2^(-16/n), ... for n = H heads (Press et al. 2022, section 3).

    Where H is no power of two, n is the largest one below, and the other heads have every second slope of 2n heads, as
    in the authors' code.
    """
    power = 1 << (heads.bit_length() - 1)
    between = [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return [*(2 ** (-8 * i / power) for i in range(1, power + 1)), *between][:heads]


def memory_shapes(config: AttentionConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a slot of a layer's `KeyValues` holds: keys and values (K, h) each, or, of latent attention, the vector
    that both come from, (kv_dim,), and the turned part of the key, (rope_dim,)."""
    if config.latent.kv_dim:
        return (config.latent.kv_dim,), (config.latent.rope_dim,)
    return ((config.kv_heads, config.head_dim),) * 2


def init_memory(
    config: AttentionConfig, leading: tuple[int, ...], *, capacity: int, window: int, dtype: Any
) -> KeyValues:
    """An empty memory of layers with this window.

    Args:
      leading: the axes in front of the slots, (B,) for a layer.
      capacity: tokens C that a row may come to have.
    """
    slots = min(window - 1, capacity) if window else capacity
    return KeyValues(*(jnp.zeros((*leading, slots, *shape), dtype) for shape in memory_shapes(config)))


class Remembered(NamedTuple):
    """seen: old and new entries, (B, T, ...). memory: what is kept. sight: of the T entries."""

    seen: KeyValues
    memory: KeyValues
    sight: Sight


def remembered(memory: KeyValues, new: KeyValues, sight: Sight) -> Remembered:
    """Adds the entries of new tokens (B, S, ...), whose first one has the slot `sight.offset`.

    Raises:
      ValueError: no slot is given.
    """
    if sight.offset is None or sight.segments_k is None:
        raise ValueError("attention has a cache but no slot to write to; give Sight.offset and Sight.segments_k")
    kept, count = memory.keys.shape[1], new.keys.shape[1]
    new = jax.tree.map(lambda old, fresh: fresh.astype(old.dtype), memory, new)
    if kept == sight.segments_k.shape[1]:
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=sight.offset, axis=1)
        memory = jax.tree.map(write, memory, new)
        return Remembered(memory, memory, sight)
    # The entries stand for the slots from offset - kept on; those below 0 have a segment like that of padding.
    seen = jax.tree.map(lambda old, fresh: jnp.concatenate([old, fresh], axis=1), memory, new)
    segments = jnp.pad(sight.segments_k, ((0, 0), (kept, 0)))
    segments = jax.lax.dynamic_slice_in_dim(segments, sight.offset, kept + count, axis=1)
    memory = jax.tree.map(lambda entries: entries[:, count:], seen)
    return Remembered(seen, memory, sight._replace(segments_k=segments, offset=jnp.asarray(kept, jnp.int32)))
