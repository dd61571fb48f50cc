"""Layers that predict further tokens, for training (multi-token prediction; DeepSeek-AI 2024b, section 2.2).

The model proper predicts token i + 1 from the tokens up to i. Layer k adds a prediction of token i + 1 + k: it joins
what the layer before it says of position i (for the first, the hidden states that the head is given) with the embedding
of token i + k, and runs a block of its own over that. Embedding and output head are the model's. Generation does
without these layers.

Shapes: K layers, B batch, S sequence, D embed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.attention import Sight
from maxlm.model.layers import make_norm
from maxlm.model.param import fan_in_normal, parameter
from maxlm.model.runtime import Runtime, rematerialised
from maxlm.model.stack import LayerOut


class FurtherOut(NamedTuple):
    """hidden: (K, B, S, D), normed for the head. aux: as of `HiddenOut`, with K in front."""

    hidden: jax.Array
    aux: dict[str, jax.Array]


class MtpLayer(nnx.Module):
    """One layer: a norm for each of its two inputs, a projection of both together, a block and a norm."""

    def __init__(self, config: ModelConfig, *, make_block: Callable[[ModelConfig, nnx.Rngs], Any], rngs: nnx.Rngs):
        # The inputs lie side by side, the embedding first. As hidden dims they are cut over `tensor`.
        both = {"mlp": 2 * config.embed_dim, "embed": config.embed_dim}
        self.embed_norm = make_norm(config, rngs=rngs)
        self.hidden_norm = make_norm(config, rngs=rngs)
        self.projection = parameter(rngs, both, contract=("mlp",), init=fan_in_normal(1.0))
        self.block = make_block(config, rngs)
        self.out_norm = make_norm(config, rngs=rngs)

    def __call__(
        self, hidden: jax.Array, embedded: jax.Array, *, sight: Sight, window: int, runtime: Runtime
    ) -> LayerOut:
        """(B, S, D) of position i and (B, S, D) of token i + k -> (B, S, D), normed for the head."""
        joined = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        joined = runtime.constrain(joined, ("batch", "seq", "mlp"))
        x = runtime.multiply("bsm,md->bsd", joined, self.projection[...])
        x = runtime.constrain(x, ("batch", "residual", None))
        out = self.block(x, sight=sight, window=window, runtime=runtime)
        return out._replace(out=runtime.constrain(self.out_norm(out.out), ("batch", "seq", None)))


def run_mtp(
    stacked: nnx.Module,
    hidden: jax.Array,
    embedded: list[jax.Array],
    *,
    sight: Sight,
    windows: tuple[int, ...],
    runtime: Runtime,
) -> FurtherOut:
    """Runs the layers one after another.

    Args:
      stacked: of them, as `param.stack` makes it.
      hidden: (B, S, D), what the head is given.
      embedded: (B, S, D) for each layer, of the tokens that it is given.
      windows: of each layer.
    """
    graphdef, state = nnx.split(stacked)
    params = nnx.to_pure_dict(state)
    outs, aux = [], []
    for k, (ahead, window) in enumerate(zip(embedded, windows, strict=True)):

        def run(x: jax.Array, layer: Any, window: int = window) -> tuple[jax.Array, Any]:
            own, ahead = layer
            out = nnx.merge(graphdef, own)(x, ahead, sight=sight, window=window, runtime=runtime)
            return out.out, out.aux

        own = jax.tree.map(lambda p, k=k: p[k], params)
        hidden, found = rematerialised(run, runtime, prevent_cse=True)(hidden, (own, ahead))
        outs.append(hidden)
        aux.append(found)
    return FurtherOut(jnp.stack(outs), jax.tree.map(lambda *parts: jnp.stack(parts), *aux))
