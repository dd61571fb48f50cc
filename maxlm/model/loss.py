"""Cross entropy over chunks of positions, so that float32 logits of a whole batch never exist at once.

Shapes: B batch, S sequence, D embed, V vocab, n chunks, s positions a chunk and row (n s >= S; where S is cut into
shards, of each shard).

Left to itself, automatic differentiation either keeps every chunk's logits or computes them again. Here the forward
pass of a differentiated call makes each chunk's gradients while its logits are there: three products in all, and
nothing kept but the gradients themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.kernels.matmul import product
from maxlm.model.layers import capped_logits

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


class LossOut(NamedTuple):
    """Sums over the weighted positions, float32 (): -log p(target), squared log normaliser, weights."""

    nll_sum: jax.Array
    z_sum: jax.Array
    weight_sum: jax.Array


@dataclasses.dataclass(frozen=True)
class _Settings:
    chunk: int
    softcap: float
    z_loss: float
    constrain: Constrain
    shards: int


class _Scores(NamedTuple):
    logits: jax.Array  # (B, s, V) float32
    log_normaliser: jax.Array  # (B, s) float32
    nll: jax.Array  # (B, s) float32


def chunked_cross_entropy(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    chunk: int,
    softcap: float,
    z_loss: float,
    constrain: Constrain,
    shards: int = 1,
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
      chunk: positions, over all rows, whose logits exist at once; at least one of each row.
      softcap: logits become c * tanh(logit / c); 0: left alone.
      z_loss: weight of the z term in the gradient.
      constrain, shards: `Runtime.constrain` and `Runtime.sequence_shards`, which divides S.
    """
    settings = _Settings(chunk, softcap, z_loss, constrain, shards)
    with jax.named_scope("loss"):
        nll, z = _loss_sums(settings, hidden_BSD, head_DV, targets_BS, weights_BS)
        return LossOut(nll, z, weights_BS.sum())


def token_nll(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    *,
    chunk: int,
    softcap: float,
    constrain: Constrain,
    shards: int = 1,
) -> jax.Array:
    """-log p(target) of every position in nats: (B, S) float32, for evaluation. Arguments as of the loss."""
    settings = _Settings(chunk, softcap, 0.0, constrain, shards)
    with jax.named_scope("loss"):
        head = _gathered(settings, hidden_BSD, head_DV)
        chunks = (_split(settings, hidden_BSD), _split(settings, targets_BS))
        nll = jax.lax.map(lambda part: _scores(settings, part[0], head, part[1]).nll, chunks)
        return _join(settings, nll, hidden_BSD.shape[1])


def _layout(settings: _Settings, batch: int, sequence: int) -> tuple[int, int]:
    """(n, s) of a shard of a row: as few chunks as the limit allows, and those evenly filled."""
    count = -(-sequence // max(settings.chunk // (batch * settings.shards), 1))
    return count, -(-sequence // count)


def _split(settings: _Settings, x: jax.Array) -> jax.Array:
    """(B, S, ...) -> (n, B, s, ...).

    Chunk i has the positions i, i + n, ... of every shard of the sequence, so that these stay where they are.
    """
    batch, sequence = x.shape[0], x.shape[1] // settings.shards
    count, size = _layout(settings, batch, sequence)
    x = x.reshape(batch, settings.shards, sequence, *x.shape[2:])
    if extra := count * size - sequence:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(batch, settings.shards * size, count, *x.shape[3:]), 2, 0)
    return settings.constrain(x, (None, "batch", "seq") + (None,) * (x.ndim - 3))


def _join(settings: _Settings, x: jax.Array, sequence: int) -> jax.Array:
    """Undoes `_split`."""
    count, batch, size = x.shape[:3]
    x = jnp.moveaxis(x, 0, 2).reshape(batch, settings.shards, size // settings.shards * count, *x.shape[3:])
    return x[:, :, : sequence // settings.shards].reshape(batch, sequence, *x.shape[3:])


def _gathered(settings: _Settings, hidden: jax.Array, head: jax.Array) -> jax.Array:
    """The head in the compute dtype, brought together along embed once instead of once a chunk."""
    return settings.constrain(head.astype(hidden.dtype), (None, "vocab"))


def _is_target(targets: jax.Array, vocab: int) -> jax.Array:
    # A comparison, unlike a gather, needs no communication over a sharded vocabulary and fuses with what follows.
    return targets[..., None] == jnp.arange(vocab, dtype=targets.dtype)


def _scores(settings: _Settings, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> _Scores:
    logits = capped_logits(hidden, head, softcap=settings.softcap)
    logits = settings.constrain(logits, ("batch", "seq", "vocab"))
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.sum(jnp.where(_is_target(targets, logits.shape[-1]), logits, 0.0), axis=-1)
    return _Scores(logits, log_normaliser, log_normaliser - target)


def _sums(scores: _Scores, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(weights * scores.nll), jnp.sum(weights * jnp.square(scores.log_normaliser))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(
    settings: _Settings, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Without differentiation: the sums alone, one product a chunk."""
    wide = _gathered(settings, hidden, head)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        hidden, targets, weights = part
        return jax.tree.map(jnp.add, total, _sums(_scores(settings, hidden, wide, targets), weights)), None

    chunks = tuple(_split(settings, x) for x in (hidden, targets, weights))
    sums, _ = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), chunks)
    return sums


def _forward(
    settings: _Settings, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The sums, and the gradients of nll_sum + z_loss * z_sum."""
    wide = _gathered(settings, hidden, head)

    def add(total: Any, part: Any) -> tuple[Any, jax.Array]:
        hidden, targets, weights = part
        scores = _scores(settings, hidden, wide, targets)
        slope = _logits_gradient(settings, scores, targets, weights).astype(hidden.dtype)
        d_hidden = product("bsv,dv->bsd", slope, wide, dtype=hidden.dtype)
        d_head = product("bsd,bsv->dv", hidden, slope, dtype=hidden.dtype, out_dtype=jnp.float32)
        sums, d_total = total
        sums = jax.tree.map(jnp.add, sums, _sums(scores, weights))
        return (sums, settings.constrain(d_total + d_head, ("embed", "vocab"))), d_hidden

    chunks = tuple(_split(settings, x) for x in (hidden, targets, weights))
    start = ((jnp.zeros(()), jnp.zeros(())), jnp.zeros(head.shape, jnp.float32))
    (sums, d_head), d_hidden = jax.lax.scan(add, start, chunks)
    # Where there is but one chunk, XLA folds the transposition of a tied head into the product that made the gradient,
    # and its CPU back end has no bfloat16 product of that form ("Unsupported element type for DotThunk").
    d_head = jax.lax.optimization_barrier(d_head)
    d_hidden = settings.constrain(_join(settings, d_hidden, hidden.shape[1]), ("batch", "seq", None))
    return sums, (d_hidden, d_head)


def _logits_gradient(settings: _Settings, scores: _Scores, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """d(nll + z_loss * z) / d(logits before the soft-cap): (B, s, V) float32."""
    probabilities = jnp.exp(scores.logits - scores.log_normaliser[..., None])
    pull = 1.0 + 2.0 * settings.z_loss * scores.log_normaliser
    slope = probabilities * pull[..., None] - _is_target(targets, scores.logits.shape[-1])
    if settings.softcap:
        slope *= 1.0 - jnp.square(scores.logits / settings.softcap)
    return slope * weights[..., None]


def _backward(settings: _Settings, gradients: tuple[jax.Array, jax.Array], cotangents: Any) -> tuple[Any, ...]:
    d_hidden, d_head = gradients
    nll, z = cotangents
    # Rounding in how the caller formed the sum is allowed for; a z term that is left out or counted twice is not.
    factor = jnp.where(jnp.isclose(z, settings.z_loss * nll, rtol=1e-3, atol=0.0), nll, jnp.nan)
    return (d_hidden.astype(jnp.float32) * factor).astype(d_hidden.dtype), d_head * factor, None, None


_loss_sums.defvjp(_forward, _backward)
