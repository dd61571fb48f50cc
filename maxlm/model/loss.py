"""Cross entropy as a function of hidden states and the head, with a gradient of its own.

Shapes: B batch, S sequence, D embed, V vocab.

Left to itself, automatic differentiation either keeps every chunk's logits or computes them again. Here the forward
pass of a differentiated call makes each chunk's gradients while its logits are there: three products in all, and
nothing kept but the gradients themselves.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.kernels.cross_entropy import (
    Gradients,
    Settings,
    SpreadFn,
    Sums,
    alone,
    local_gradients,
    local_nll,
    local_sums,
)


class LossOut(NamedTuple):
    """Sums over the weighted positions, float32 (): -log p(target) and the squared log normaliser."""

    nll_sum: jax.Array
    z_sum: jax.Array


def chunked_cross_entropy(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    chunk: int,
    softcap: float,
    z_loss: float,
    spread: SpreadFn = alone,
) -> LossOut:
    """Weighted negative log likelihood of the targets, and the z-loss term (Chowdhery et al. 2022, section 5).

    Differentiable in `hidden_BSD` and `head_DV`, as `nll_sum + z_loss * z_sum` times any factor and in no other
    combination: that sum's gradient is what the forward pass makes. Another combination gets NaN, not a wrong gradient.
    The gradient of the hidden states has their dtype, that of the head is float32; weights get none.

    Args:
      hidden_BSD: in the compute dtype, which the products' operands have; sums are float32.
      head_DV: float32.
      targets_BS: int32, within the vocabulary also where the weight is 0.
      weights_BS: float32.
      chunk: positions of a device whose logits exist at once.
      softcap: logits become c * tanh(logit / c); 0: left alone.
      z_loss: weight of the z term in the gradient.
      spread: `Runtime.spread_loss`.
    """
    with jax.named_scope("loss"):
        sums = _loss_sums(spread, Settings(chunk, softcap, z_loss), hidden_BSD, head_DV, targets_BS, weights_BS)
        return LossOut(sums.nll, sums.z)


def token_nll(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    *,
    chunk: int,
    softcap: float,
    spread: SpreadFn = alone,
) -> jax.Array:
    """-log p(target) of every position in nats: (B, S) float32, for evaluation. Arguments as of the loss."""
    with jax.named_scope("loss"):
        weights = jnp.ones(targets_BS.shape, jnp.float32)
        return spread(local_nll(Settings(chunk, softcap)), hidden_BSD, head_DV, targets_BS, weights, kinds="token")


# In place of arrays, the kind of each: the tree that a spread function reads to know what crosses the mesh, and how.
_SUMS: Any = Sums("sum", "sum")  # type: ignore[arg-type]
_GRADIENTS: Any = Gradients(_SUMS, "hidden", "head")  # type: ignore[arg-type]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_sums(
    spread: SpreadFn, settings: Settings, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> Sums:
    """Without differentiation: the sums alone."""
    return spread(local_sums(settings), hidden, head, targets, weights, kinds=_SUMS)


def _forward(
    spread: SpreadFn, settings: Settings, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[Sums, tuple[jax.Array, jax.Array]]:
    out = spread(local_gradients(settings), hidden, head, targets, weights, kinds=_GRADIENTS)
    # Together: the head's gradient is added up over the mesh before the layers' backward pass begins. XLA would leave
    # it to the end, and keep the whole of it on every device until then (5 GiB of Gemma 3 27B).
    # Apart from what comes after: where there is but one chunk, XLA folds the transposition of a tied head into the
    # product that made the gradient, and its CPU back end has no bfloat16 product of that form ("Unsupported element
    # type for DotThunk").
    return out.sums, jax.lax.optimization_barrier((out.hidden, out.head))


def _backward(
    spread: SpreadFn, settings: Settings, gradients: tuple[jax.Array, jax.Array], cotangents: Sums
) -> tuple[Any, ...]:
    d_hidden, d_head = gradients
    nll, z = cotangents
    # Rounding in how the caller formed the sum is allowed for; a z term that is left out or counted twice is not.
    factor = jnp.where(jnp.isclose(z, settings.z_loss * nll, rtol=1e-3, atol=0.0), nll, jnp.nan)
    return (d_hidden.astype(jnp.float32) * factor).astype(d_hidden.dtype), d_head * factor, None, None


_loss_sums.defvjp(_forward, _backward)
