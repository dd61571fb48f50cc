"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).

Keys and values of all heads are projected from one vector a token, and so is all that a cache has to hold, besides a
turned part of the key that the heads share. Against a cache the projection of keys is moved over to the query and that
of values to the output, so that neither is ever made for the tokens of the cache.

Shapes: B batch, S sequence, T cached tokens, D embed, H heads, h head dim = u plain + r turned dims, w value dim,
c latent dim of keys and values, q that of queries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import ModelConfig
from maxlm.model.attention import AttentionOut, KeyValues, Sight, attention_mask, remembered, turned_in_sight
from maxlm.model.layers import RMSNorm, residual_init
from maxlm.model.param import fan_in_normal, parameter
from maxlm.model.runtime import Runtime


class LatentAttention(nnx.Module):
    """Takes and returns what `GroupedQueryAttention` does; its memory is (B, C, c) and (B, C, r)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config, self.rope = config.attention, config.rope
        dims = self.config.latent
        plain = self.config.head_dim - dims.rope_dim
        embed, heads, inner = {"embed": config.embed_dim}, {"q_heads": self.config.q_heads}, fan_in_normal(1.0)
        # Of the matrices that make a latent `embed` is spread over the mesh, of those that take one the latent dim.
        made, latent = {"latent_out": dims.kv_dim}, {"latent": dims.kv_dim}
        values = heads | {"head_dim": dims.value_dim}
        source = {"latent": dims.query_dim} if dims.query_dim else embed
        lower, lowered = bool(dims.query_dim), {"latent_out": dims.query_dim}
        self.query_down = parameter(rngs, embed | lowered, contract=("embed",), init=inner) if lower else None
        self.query_latent_norm = RMSNorm(config, rngs=rngs, dims=lowered) if lower else None
        queries = source | heads | {"head_dim": self.config.head_dim}
        self.query = parameter(rngs, queries, contract=tuple(source), init=inner)
        self.latent = parameter(rngs, embed | made, contract=("embed",), init=inner)
        self.latent_norm = RMSNorm(config, rngs=rngs, dims=made)
        self.shared_key = parameter(rngs, embed | {"head_dim": dims.rope_dim}, contract=("embed",), init=inner)
        self.key = parameter(rngs, latent | heads | {"head_dim": plain}, contract=("latent",), init=inner)
        self.value = parameter(rngs, latent | values, contract=("latent",), init=inner)
        self.output = parameter(rngs, values | embed, contract=tuple(values), init=residual_init(config))

    def __call__(
        self, x: jax.Array, *, sight: Sight, window: int, runtime: Runtime, memory: KeyValues | None = None
    ) -> AttentionOut:
        """See `GroupedQueryAttention.__call__`."""

        def turned(y: jax.Array) -> jax.Array:
            return turned_in_sight(y, self.rope, sight, window=window, runtime=runtime)

        def on_heads(y: jax.Array) -> jax.Array:
            return runtime.constrain(y, ("batch", "seq", "q_heads", None))

        def down(spec: str, w: nnx.Param) -> jax.Array:
            # Left to itself, XLA may work on parts of the gradient of such a matrix along `tensor` and permute them,
            # which would hang in a stage's branch (`parallel.sharding.settled`).
            return runtime.multiply(spec, x, runtime.constrain(w[...], ("staged", "latent_out")))

        source = x
        if self.query_down is not None and self.query_latent_norm is not None:
            source = self.query_latent_norm(down("bsd,dq->bsq", self.query_down))
        query = on_heads(runtime.multiply("bsq,qnh->bsnh", source, self.query[...]))
        plain, rotated = jnp.split(query, [self.config.head_dim - self.config.latent.rope_dim], axis=-1)
        rotated = turned(rotated)
        latent = self.latent_norm(down("bsd,dc->bsc", self.latent))
        shared = turned(down("bsd,dr->bsr", self.shared_key)[:, :, None])
        if memory is None:
            mask = attention_mask(self.config, sight, window=window)
            key = on_heads(runtime.multiply("bsc,cnu->bsnu", latent, self.key[...]))
            key = jnp.concatenate([key, jnp.broadcast_to(shared, (*key.shape[:-1], shared.shape[-1]))], axis=-1)
            value = on_heads(runtime.multiply("bsc,cnw->bsnw", latent, self.value[...]))
            query = jnp.concatenate([plain, rotated], axis=-1)
            query, key, value = (checkpoint_name(y, "attention_qkv") for y in (query, key, value))
            seen = on_heads(runtime.attend(query, key, value, mask))
        else:
            entries, memory, sight = remembered(memory, KeyValues(latent, shared[:, :, 0]), sight)
            kept, turned_keys = (part.astype(runtime.dtype)[:, :, None] for part in entries)
            mask = attention_mask(self.config, sight, window=window)
            inward = on_heads(runtime.multiply("bsnu,cnu->bsnc", plain, self.key[...]))
            query = jnp.concatenate([inward, rotated], axis=-1)
            gathered = runtime.attend(query, jnp.concatenate([kept, turned_keys], axis=-1), kept, mask)
            seen = on_heads(runtime.multiply("bsnc,cnw->bsnw", gathered, self.value[...]))
        out = runtime.multiply("bsnw,nwd->bsd", seen, self.output[...])
        return AttentionOut(checkpoint_name(out, "attention_proj"), memory)
