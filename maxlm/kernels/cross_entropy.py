"""Cross entropy of the positions that one device holds, a chunk of them at a time.

Shapes: B batch, S sequence, D embed, V vocab, n chunks, s positions of a chunk (n s >= B S).

Float32 logits of all positions never exist at once. A device may hold a part of the vocabulary alone: it then shares
normalisers, and the logits of targets, along the mesh axes that it is told of, and gives its own part of the gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.kernels.matmul import product

Axes = tuple[str, ...]
SpreadFn = Callable[..., Any]


class Device(NamedTuple):
    """Where the positions are. vocab: mesh axes along which others have parts of the vocabulary. cpu: what it is."""

    vocab: Axes
    cpu: bool


LocalFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Device], Any]
"""(hidden (B,S,D), head (D,V) in hidden's dtype, targets (B,S), weights (B,S), the device) -> results."""


class Sums(NamedTuple):
    """Sums over the weighted positions, float32 (): -log p(target) and the squared log normaliser."""

    nll: jax.Array
    z: jax.Array


class Gradients(NamedTuple):
    """The sums, and the gradients of nll + z_loss * z.

    hidden: (B, S, D), in the compute dtype, or, of a part of the vocabulary, in float32.
    head: (D, V) float32.
    """

    sums: Sums
    hidden: jax.Array
    head: jax.Array


@dataclasses.dataclass(frozen=True)
class Settings:
    """chunk: positions of a device whose logits exist at once. softcap, z_loss: as of `model.loss`."""

    chunk: int
    softcap: float
    z_loss: float = 0.0


class _Scores(NamedTuple):
    logits: jax.Array  # (s, V) float32
    log_normaliser: jax.Array  # (s,) float32, of the whole vocabulary
    nll: jax.Array  # (s,) float32


def alone(
    local: LocalFn, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, kinds: Any
) -> Any:
    """Runs `local` where one device holds all.

    Over a mesh `parallel.loss.sharded_loss` takes its place, which puts the results of the devices together.

    Args:
      head: (D, V) float32.
      kinds: what each of the results is: `sum`, of positions; `token`, one a position; `hidden` or `head`, a gradient.
    """
    del kinds
    return local(hidden, head.astype(hidden.dtype), targets, weights, Device((), jax.default_backend() == "cpu"))


def capped_logits(hidden: jax.Array, head: jax.Array, *, softcap: float) -> jax.Array:
    """(..., D) x (D, V) -> float32 logits (..., V), c * tanh(logit / c) where the cap is not 0; operands in hidden's
    dtype, float32 sums."""
    letters = "bsd"[-hidden.ndim :]
    spec = f"{letters},dv->{letters[:-1]}v"
    logits = product(spec, hidden, head, dtype=hidden.dtype, out_dtype=jnp.float32)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def local_nll(settings: Settings) -> LocalFn:
    """Of kind `token`: -log p(target) of every position, (B, S) float32. Weights are not looked at."""

    def run(hidden: jax.Array, head: jax.Array, targets: jax.Array, _: jax.Array, device: Device) -> jax.Array:
        chunks = _split(settings, hidden, 2), _split(settings, targets, 2)
        nll = lax.map(lambda part: _scores(settings, part[0], head, part[1], device).nll, chunks)
        return nll.reshape(-1)[: targets.size].reshape(targets.shape)

    return run


def local_sums(settings: Settings) -> LocalFn:
    """`Sums`, of kind `sum` both; one product a chunk."""

    def run(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, device: Device) -> Sums:
        def add(total: Sums, part: Any) -> tuple[Sums, None]:
            hidden, targets, weights = part
            scores = _scores(settings, hidden, head, targets, device)
            return jax.tree.map(jnp.add, total, _sums(scores, weights)), None

        chunks = tuple(_split(settings, x, 2) for x in (hidden, targets, weights))
        return lax.scan(add, Sums(jnp.zeros(()), jnp.zeros(())), chunks)[0]

    return run


def local_gradients(settings: Settings) -> LocalFn:
    """`Gradients`, of kinds `sum`, `hidden` and `head`; three products a chunk, and nothing kept but the gradients."""

    def run(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, device: Device) -> Gradients:
        axes = device.vocab
        dtype = jnp.float32 if axes else hidden.dtype

        def add(total: Any, part: Any) -> tuple[Any, jax.Array]:
            (hidden, targets, weights), left = part
            scores = _scores(settings, hidden, head, targets, device)
            slope = _slope(settings, scores, targets, weights, axes).astype(hidden.dtype)
            d_hidden = product("sv,dv->sd", slope, head, dtype=hidden.dtype, out_dtype=dtype)
            spec = "ds,sv->dv" if device.cpu else "sd,sv->dv"
            d_head = product(spec, left, slope, dtype=hidden.dtype, out_dtype=jnp.float32)
            sums, d_total = total
            return (jax.tree.map(jnp.add, sums, _sums(scores, weights)), d_total + d_head), d_hidden

        chunks = tuple(_split(settings, x, 2) for x in (hidden, targets, weights))
        start = (Sums(jnp.zeros(()), jnp.zeros(())), jnp.zeros(head.shape, jnp.float32))
        # XLA:CPU sums over rows of a left operand slowly, and in bfloat16 only after a cast of both to float32. It is
        # turned ahead of the scan, as within it XLA would take that back; elsewhere it would be memory for nothing.
        left = chunks[0].swapaxes(1, 2) if device.cpu else chunks[0]
        (sums, d_head), d_hidden = lax.scan(add, start, (chunks, left))
        d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
        return Gradients(sums, d_hidden, d_head)

    return run


def _split(settings: Settings, x: jax.Array, leading: int) -> jax.Array:
    """(B, S, ...) -> (n, s, ...): as few chunks as the limit allows, evenly filled, zeros at the end."""
    x = x.reshape(-1, *x.shape[leading:])
    count = -(-x.shape[0] // settings.chunk)
    size = -(-x.shape[0] // count)
    x = jnp.pad(x, ((0, count * size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])


def _first(vocab: int, axes: Axes) -> jax.Array | int:
    """The first id of this device's part of the vocabulary, each part having `vocab` of them."""
    return lax.axis_index(axes) * vocab if axes else 0


def _is_target(targets: jax.Array, vocab: int, axes: Axes) -> jax.Array:
    # A comparison, unlike a gather, fuses with what follows.
    return targets[..., None] == _first(vocab, axes) + jnp.arange(vocab, dtype=targets.dtype)


def _target_logits(logits: jax.Array, targets: jax.Array, device: Device) -> jax.Array:
    """(s,): logits (s, V) of the targets, 0 for those of other devices."""
    vocab = logits.shape[-1]
    if device.cpu:  # XLA:CPU would write the comparison's result down and read it again to sum it up
        column = targets - _first(vocab, device.vocab)
        column = jnp.where(column < 0, vocab, column)  # as below 0 it would count from the end
        return jnp.take_along_axis(logits, column[:, None], axis=-1, mode="fill", fill_value=0.0)[:, 0]
    return jnp.sum(jnp.where(_is_target(targets, vocab, device.vocab), logits, 0.0), axis=-1)


def _scores(settings: Settings, hidden: jax.Array, head: jax.Array, targets: jax.Array, device: Device) -> _Scores:
    axes = device.vocab
    logits = capped_logits(hidden, head, softcap=settings.softcap)
    highest = lax.stop_gradient(jnp.max(logits, axis=-1))
    highest = lax.pmax(highest, axes) if axes else highest
    total = jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1)
    target = _target_logits(logits, targets, device)
    total, target = lax.psum((total, target), axes) if axes else (total, target)
    log_normaliser = highest + jnp.log(total)
    return _Scores(logits, log_normaliser, log_normaliser - target)


def _sums(scores: _Scores, weights: jax.Array) -> Sums:
    return Sums(jnp.sum(weights * scores.nll), jnp.sum(weights * jnp.square(scores.log_normaliser)))


def _slope(settings: Settings, scores: _Scores, targets: jax.Array, weights: jax.Array, axes: Axes) -> jax.Array:
    """d(nll + z_loss * z) / d(logits before the soft-cap): (s, V) float32."""
    probabilities = jnp.exp(scores.logits - scores.log_normaliser[:, None])
    pull = 1.0 + 2.0 * settings.z_loss * scores.log_normaliser
    slope = probabilities * pull[:, None] - _is_target(targets, scores.logits.shape[-1], axes)
    if settings.softcap:
        slope *= 1.0 - jnp.square(scores.logits / settings.softcap)
    return slope * weights[:, None]
