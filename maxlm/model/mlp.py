"""The feed-forward half of a block.

Shapes: B batch, S sequence, D embed, F mlp.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import ModelConfig
from maxlm.model.attention import Sight
from maxlm.model.layers import add_bias, residual_init
from maxlm.model.param import constant, fan_in_normal, parameter
from maxlm.model.runtime import ArrayFn, Runtime, cheap


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))  # So et al. 2021


def _gated(activation: ArrayFn) -> ArrayFn:
    return lambda gate, up: activation(gate) * up


def _clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gpt-oss's: a sigmoid that approximates GELU's, both sides clamped at 7, and the linear one moved up by one."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


GATED: dict[str, ArrayFn] = {
    "swiglu": _gated(jax.nn.silu),
    "geglu": _gated(functools.partial(jax.nn.gelu, approximate=True)),
    "clamped_swiglu": _clamped_swiglu,
}
"""(gate, up) -> hidden, elementwise (Shazeer 2020)."""

UNGATED: dict[str, ArrayFn] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu2": _relu2,
}
"""up -> hidden, elementwise."""


class FeedForwardOut(NamedTuple):
    """out: (B, S, D), compute dtype. aux: what is returned besides: losses and counts of a router, {} for a dense one.

    Losses and counts are float32 sums over the rows given, so that they add up over microbatches.
    """

    out: jax.Array
    aux: dict[str, jax.Array]


class Mlp(nnx.Module):
    """act(x up) down, or with a gate act(x gate, x up) down; GELU in its tanh form."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dim: int = 0):
        """With `dim` hidden dims, or those of the config."""
        self.kind = config.mlp.kind
        embed, mlp = {"embed": config.embed_dim}, {"mlp": dim or config.mlp.dim}
        inner, zero = fan_in_normal(1.0), constant(0.0)
        gated = config.mlp.gated
        self.gate = parameter(rngs, embed | mlp, contract=("embed",), init=inner) if gated else None
        self.up = parameter(rngs, embed | mlp, contract=("embed",), init=inner)
        self.down = parameter(rngs, mlp | embed, contract=("mlp",), init=residual_init(config))
        self.gate_bias = parameter(rngs, mlp, init=zero) if gated and config.mlp.bias else None
        self.up_bias = parameter(rngs, mlp, init=zero) if config.mlp.bias else None
        self.down_bias = parameter(rngs, embed, init=zero) if config.mlp.bias else None

    def __call__(self, x: jax.Array, *, sight: Sight, runtime: Runtime) -> FeedForwardOut:
        """(B, S, D) -> (B, S, D)."""
        del sight  # every position is treated alike

        def inward(kernel: nnx.Param, bias: nnx.Param | None, name: str) -> jax.Array:
            y = runtime.multiply("bsd,df->bsf", x, kernel[...])
            if bias is not None:
                y = add_bias(y, bias[...])
            return checkpoint_name(runtime.constrain(y, ("batch", "seq", "mlp")), name)

        up = inward(self.up, self.up_bias, "mlp_up")
        if self.gate is None:
            hidden = cheap(UNGATED[self.kind])(up)
        else:
            hidden = cheap(GATED[self.kind])(inward(self.gate, self.gate_bias, "mlp_gate"), up)
        y = runtime.multiply("bsf,fd->bsd", hidden, self.down[...])
        y = runtime.constrain(y, ("batch", "residual", None))
        if self.down_bias is not None:
            y = add_bias(y, self.down_bias[...])
        return FeedForwardOut(checkpoint_name(y, "mlp_out"), {})
