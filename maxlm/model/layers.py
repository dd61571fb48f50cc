"""Norms, the embedding table and the output head.

Shapes: B batch, S sequence, D embed, V vocab, P learned positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.param import Initializer, constant, fan_in_normal, normal, parameter
from maxlm.model.runtime import Runtime, cheap


def residual_init(config: ModelConfig) -> Initializer:
    """Of the matrices that write into the residual stream, one of `config.init`:

    - depth_scaled: normal, 1 / sqrt(fan_in) / sqrt(2 L), so that the 2 L branches add up to unit variance
      (Radford et al. 2019, section 2.3)
    - fan_in: normal, 1 / sqrt(fan_in), as all other matrices
    - zero_output: zero, so that every block begins as the identity
    """
    match config.init:
        case "depth_scaled":
            return fan_in_normal(1 / math.sqrt(2 * config.num_layers))
        case "fan_in":
            return fan_in_normal(1.0)
        case "zero_output":
            return constant(0.0)
        case other:
            raise ValueError(f"model.init is {other!r}; it can be depth_scaled, fan_in or zero_output")


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides x by the root mean square over the last dims, those that `scale` has, in float32; returns x's dtype.

    Zhang & Sennrich 2019.
    """

    def normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(wide), axis=tuple(range(-scale.ndim, 0)), keepdims=True)
        return (wide * jax.lax.rsqrt(square + epsilon) * scale).astype(x.dtype)

    return cheap(normalise)(x, scale)


class RMSNorm(nnx.Module):
    """Norms the last dims, by default the stream's D, with a scale a dim.

    With `config.norm` rms_offset the parameter is what is to be added to one, and starts at zero: what a narrow dtype
    holds of it cannot be had from the sum.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dims: Mapping[str, int] | None = None):
        self.epsilon, self.offset = config.norm_epsilon, 1.0 if config.norm == "rms_offset" else 0.0
        self.scale = parameter(rngs, dims or {"embed": config.embed_dim}, init=constant(1.0 - self.offset))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.offset + self.scale[...], self.epsilon)


class LayerNorm(nnx.Module):
    """(B, S, D) -> (B, S, D), with a scale and a bias a dim, in float32 (Ba et al. 2016)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.epsilon = config.norm_epsilon
        self.scale = parameter(rngs, {"embed": config.embed_dim}, init=constant(1.0))
        self.bias = parameter(rngs, {"embed": config.embed_dim}, init=constant(0.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            wide = x.astype(jnp.float32)
            wide -= jnp.mean(wide, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            return (wide * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)

        return cheap(normalise)(x, self.scale[...], self.bias[...])


def make_norm(config: ModelConfig, *, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """The norm of the residual stream that `config.norm` names."""
    kinds: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "rms_offset": RMSNorm, "layer": LayerNorm}
    return kinds[config.norm](config, rngs=rngs)


class Embedding(nnx.Module):
    """The table of token vectors, and where the config asks for one, a table of position vectors."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.scale = math.sqrt(config.embed_dim) if config.embed_scale else 1.0
        dims = {"vocab": config.vocab_size, "embed": config.embed_dim}
        self.table = parameter(rngs, dims, init=normal(config.embed_std))
        places = {"positions": config.learned_positions, "embed": config.embed_dim}
        self.positions = parameter(rngs, places, init=normal(config.embed_std)) if config.learned_positions else None

    def __call__(self, tokens: jax.Array, positions: jax.Array, *, runtime: Runtime) -> jax.Array:
        """(B, S) int32 -> (B, S, D). A token or position outside its table gives NaN, which the update guard refuses.

        The positions are used by a learned table only.
        """
        dtype = runtime.dtype if self.positions is None else jnp.float32  # rounded once, after the sum
        rows = runtime.lookup(self.table[...], tokens, scale=self.scale, dtype=dtype)
        if self.positions is not None:
            rows += jnp.take(runtime.constrain(self.positions[...], (None, None)), positions, axis=0)
        return runtime.constrain(rows.astype(runtime.dtype), ("batch", "residual", None))


class Head(nnx.Module):
    """The output matrix of an untied model, drawn with `head_init` / sqrt(D): 1 gives unit logits of normed states."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dims = {"embed": config.embed_dim, "vocab": config.vocab_size}
        self.kernel = parameter(rngs, dims, contract=("embed",), init=fan_in_normal(config.head_init))
        self.normed = config.normed_head

    def matrix(self) -> jax.Array:
        """(D, V), as it is multiplied by; of a normed head float32."""
        kernel = self.kernel[...]
        if not self.normed:
            return kernel
        kernel = kernel.astype(jnp.float32)  # generation holds it in the compute dtype, if that is how it is stored
        squares = jnp.sum(jnp.square(kernel), axis=0, keepdims=True)
        # A column of zeros, as a lengthened vocabulary has them, has no direction and stays as it is; it can learn one.
        # The root's slope there is infinite, and is kept out of the gradient too.
        return kernel / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias in float32, so that the bias's gradient, a sum over all positions, adds up in float32; x's dtype."""
    return (x.astype(jnp.float32) + bias).astype(x.dtype)
