"""Attention for CPUs: a few heads at a time, in blocks of queries, with a gradient of its own.

XLA runs batched matrix products several times slower than plain ones on a CPU; here every product is a plain one. Of
floats of 16 bits it moves parts of an array by way of the whole of it in float32, and multiplies in float32 too where a
product sums over the rows of its left operand: they enter and leave the loop over heads as integers, and what the
gradients of keys and values are made of is turned ahead of it, as within the loop XLA would take that back.

Shapes: B batch, S query positions, T key positions, H query heads, K kv heads, G = H / K queries a kv head, h head dim,
v head dim of values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.bits import as_floats, as_integers, is_narrow
from maxlm.kernels.mask import MASKED, Mask, static, visible, with_sinks
from maxlm.kernels.matmul import ATTENTION_NAME, dot
from maxlm.kernels.opaque import opaque

# The least and the most query rows of a block, and how many widths of keys there are.
BLOCK_ROWS = (128, 512)
TIERS = 8

# How many heads a turn of the loop takes at most, and the scores of a block up to which it takes more than one: of
# small products and what lies between them one head leaves a core idle, of large ones several drive each other's scores
# out of the cache.
HEADS_A_TURN = 4
FEW_SCORES = 128 * 512


class _Tier(NamedTuple):
    """`blocks` blocks of `size` query rows, from row `first` on, of which each looks at `width` keys."""

    first: int
    blocks: int
    size: int
    width: int

    def starts(self, block: jax.Array, keys: int) -> tuple[jax.Array, jax.Array]:
        """First query row and first key of a block: the `width` keys end with the block's last row."""
        row = self.first + block * self.size
        return row, jnp.clip(row + self.size - self.width, 0, keys - self.width)


def _tiers(mask: Mask, queries: int, keys: int) -> list[_Tier]:
    """Cuts the queries into blocks of one size and these into a few tiers.

    A tier is a loop, so memory is one block's and the program does not grow with S; tiers differ in the width of
    their keys, so that causality costs (TIERS + 1) / (2 * TIERS) of all pairs.
    """
    size = max(BLOCK_ROWS[0], min(BLOCK_ROWS[1], queries // TIERS))
    blocks, rest = divmod(queries, size)
    step = -(-blocks // TIERS) or 1
    cuts = [(first * size, min(step, blocks - first), size) for first in range(0, blocks, step)]
    if rest:
        cuts.append((blocks * size, 1, rest))
    tiers = []
    for first, count, rows in cuts:
        width = min(first + count * rows, keys)
        if mask.window:
            width = min(width, rows + mask.window - 1)
        tiers.append(_Tier(first, count, rows, width))
    return tiers


class _Head(NamedTuple):
    """One kv head of one row: q (G, S, h), k (T, h), v (T, v), segments (S,) and (T,) or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments_q: jax.Array | None
    segments_k: jax.Array | None


class _Turned(NamedTuple):
    """What a head's gradients of k and v sum over queries: q (G, h, S), and g of the result (G, v, S)."""

    q: jax.Array
    g: jax.Array


class _Gradients(NamedTuple):
    """Of q (G, S, h), k (T, h) and v (T, v), in their dtypes."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def _rows(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Rows [start, start + size) of every query head: (G, S, ...) to (G*size, ...)."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1).reshape(-1, *x.shape[2:])


def _scores(
    head: _Head, mask: Mask, tier: _Tier, row: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """Masked float32 scores (G*s, t) of a block, and the soft-cap's derivative at them (1.0 without one)."""
    slice_ = jax.lax.dynamic_slice_in_dim
    scores = dot("qh,kh->qk", _rows(head.q, row, tier.size), slice_(head.k, start, tier.width)) * mask.scale
    slope: jax.Array | float = 1.0
    if mask.softcap:
        tanh = jnp.tanh(scores / mask.softcap)
        scores, slope = mask.softcap * tanh, 1.0 - tanh * tanh
    local = dataclasses.replace(
        mask,
        segments_q=None if head.segments_q is None else slice_(head.segments_q, row, tier.size)[None],
        segments_k=None if head.segments_k is None else slice_(head.segments_k, start, tier.width)[None],
        q_offset=row - start,
    )
    seen = visible(local, tier.size, tier.width)
    return jnp.where(seen, scores.reshape(-1, tier.size, tier.width), MASKED).reshape(scores.shape), slope


def _head_forward(mask: Mask, head: _Head) -> tuple[jax.Array, jax.Array]:
    """Attention of one head: out (G, S, v) and the scores' log normalisers (G, S) float32."""
    (groups, queries, _), keys = head.q.shape, head.k.shape[0]

    def block(tier: _Tier, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        row, start = tier.starts(index, keys)
        scores, _ = _scores(head, mask, tier, row, start)
        top = scores.max(axis=1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        v = jax.lax.dynamic_slice_in_dim(head.v, start, tier.width)
        out = (dot("qk,kh->qh", weights.astype(v.dtype), v) / total).astype(head.q.dtype)
        return out, (top + jnp.log(total))[:, 0]

    tiers = _tiers(mask, queries, keys)
    blocks = [jax.lax.map(functools.partial(block, tier), jnp.arange(tier.blocks)) for tier in tiers]
    outs, normalisers = zip(*blocks, strict=True)
    return _join_blocks(outs, groups), _join_blocks(normalisers, groups)


def _join_blocks(tiers: Sequence[jax.Array], groups: int) -> jax.Array:
    """Blocks (count, G*size, ...) of every tier to (G, S, ...)."""
    parts = [x.reshape(x.shape[0], groups, -1, *x.shape[2:]).swapaxes(0, 1) for x in tiers]
    return jnp.concatenate([x.reshape(groups, -1, *x.shape[3:]) for x in parts], axis=1)


def _head_backward(
    mask: Mask,
    head: _Head,
    out: jax.Array,
    normaliser: jax.Array,
    g: jax.Array,
    g_normaliser: jax.Array,
    turned: _Turned | None,
) -> _Gradients:
    """Gradients of one head's q, k and v; scores are formed again (Dao et al. 2022, algorithm 4).

    With `turned` those of k and v come out turned too, (h, T) and (v, T).
    """
    (groups, queries, _), keys, dtype = head.q.shape, head.k.shape[0], head.q.dtype
    delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), axis=-1) - g_normaliser

    axis = 0 if turned is None else 1  # of keys

    def add(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        part += jax.lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis=axis)

    def over_queries(scores: jax.Array, rows: jax.Array, turned: jax.Array | None, row: jax.Array) -> jax.Array:
        if turned is None:
            return dot("qk,qh->kh", scores, rows)
        columns = jax.lax.dynamic_slice_in_dim(turned, row, rows.shape[0] // groups, axis=2).swapaxes(0, 1)
        return dot("hq,qk->hk", columns.reshape(rows.shape[::-1]), scores)

    def block(tier: _Tier, sums: tuple[jax.Array, jax.Array], index: jax.Array) -> Any:
        row, start = tier.starts(index, keys)
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, tier.width) for x in (head.k, head.v))
        q_rows, g_rows, delta_rows = (_rows(x, row, tier.size) for x in (head.q, g, delta))
        scores, slope = _scores(head, mask, tier, row, start)
        weights = jnp.exp(scores - _rows(normaliser, row, tier.size)[:, None])
        dscores = weights * (dot("qh,kh->qk", g_rows, v) - delta_rows[:, None]) * slope * mask.scale
        dscores, weights = dscores.astype(dtype), weights.astype(dtype)
        dk = add(sums[0], over_queries(dscores, q_rows, turned and turned.q, row), start)
        dv = add(sums[1], over_queries(weights, g_rows, turned and turned.g, row), start)
        return (dk, dv), dot("qk,kh->qh", dscores, k).astype(dtype)

    shapes = (x.shape if turned is None else x.shape[::-1] for x in (head.k, head.v))
    sums, dq = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes), []
    for tier in _tiers(mask, queries, keys):
        sums, part = jax.lax.scan(functools.partial(block, tier), sums, jnp.arange(tier.blocks))
        dq.append(part)
    return _Gradients(_join_blocks(dq, groups), sums[0].astype(head.k.dtype), sums[1].astype(head.v.dtype))


def _split_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """(B, S, H, h) to (B*K, G, S, h)."""
    b, s, heads, dim = x.shape
    return (
        x.reshape(b, s, kv_heads, heads // kv_heads, dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(-1, heads // kv_heads, s, dim)
    )


def _join_heads(x: jax.Array, batch: int) -> jax.Array:
    """(B*K, G, S, h) to (B, S, H, h)."""
    _, groups, s, dim = x.shape
    return x.reshape(batch, -1, groups, s, dim).transpose(0, 3, 1, 2, 4).reshape(batch, s, -1, dim)


def _heads(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> _Head:
    """Every head of every row, along a new leading axis B*K."""
    kv_heads = k.shape[2]

    def repeat(segments: jax.Array | None) -> jax.Array | None:
        return None if segments is None else jnp.repeat(segments, kv_heads, axis=0)

    k, v = _split_heads(k, kv_heads)[:, 0], _split_heads(v, kv_heads)[:, 0]
    return _Head(_split_heads(q, kv_heads), k, v, repeat(mask.segments_q), repeat(mask.segments_k))


def _heads_a_turn(mask: Mask, heads: _Head) -> int:
    """How many kv heads, of all that `_heads` lines up, a turn of the loop takes; it divides them."""
    (count, groups, queries, _), keys = heads.q.shape, heads.k.shape[1]
    scores = groups * max(tier.size * tier.width for tier in _tiers(mask, queries, keys))
    return math.gcd(count, HEADS_A_TURN) if scores <= FEW_SCORES else 1


def _map(function: Callable[[Any], Any], operands: Any, a_turn: int) -> Any:
    """`lax.map` over trees of arrays, `a_turn` of their entries side by side, with floats of 16 bits as integers.

    The entries of a turn share nothing, so that XLA works on one while another has no work for all cores.
    """

    def turn(given: Any) -> Any:
        entries = [jax.tree.map(operator.itemgetter(index), given) for index in range(a_turn)]
        results = [as_integers(function(as_floats(entry, operands))) for entry in entries]
        return jax.tree.map(lambda *x: jnp.stack(x), *results)

    results = jax.eval_shape(lambda: jax.lax.map(function, operands))
    turns = jax.tree.map(lambda x: x.reshape(-1, a_turn, *x.shape[1:]), as_integers(operands))
    joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(turn, turns))
    return as_floats(joined, results)


def heads_loop(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Attention a few heads at a time, in blocks of queries that leave out the keys none of them sees.

    Each product is a plain matrix product, which XLA runs many times faster on a CPU than a batched one, and memory
    grows with S, not with S*T. Same arguments, result and precision as `plain`; S = T, and no `q_offset`.
    """
    return with_sinks(*_loop(q, k, v, dataclasses.replace(mask, sinks=None)), sinks=mask.sinks)


@jax.custom_vjp
def _loop(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """The result (B, S, H, v), and the scores' log normalisers (B, S, H) float32."""
    return _loop_forward(q, k, v, mask)[0]


def _loop_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> Any:
    heads, batch = _heads(q, k, v, mask), q.shape[0]
    one, a_turn = functools.partial(_head_forward, static(mask)), _heads_a_turn(mask, heads)
    # A remat policy that saves these need not run the loop again.
    out, normaliser = checkpoint_name(opaque(lambda heads: _map(one, heads, a_turn))(heads), ATTENTION_NAME)
    return (_join_heads(out, batch), _join_heads(normaliser[..., None], batch)[..., 0]), (
        q,
        k,
        v,
        mask,
        out,
        normaliser,
    )


def _loop_backward(kept: Any, g: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
    q, k, v, mask, out, normaliser = kept
    kv_heads = k.shape[2]
    cotangents = _split_heads(g[0], kv_heads), _split_heads(g[1][..., None], kv_heads)[..., 0]
    heads, turned = _heads(q, k, v, mask), None
    if is_narrow(q.dtype):
        turned = _Turned(heads.q.swapaxes(2, 3), cotangents[0].swapaxes(2, 3))
    a_turn = _heads_a_turn(mask, heads)
    d = _map(lambda x: _head_backward(mask, *x), (heads, out, normaliser, *cotangents, turned), a_turn)
    if turned:
        d = d._replace(k=d.k.swapaxes(1, 2), v=d.v.swapaxes(1, 2))
    batch = q.shape[0]
    return _join_heads(d.q, batch), _join_heads(d.k[:, None], batch), _join_heads(d.v[:, None], batch), None


_loop.defvjp(_loop_forward, _loop_backward)
