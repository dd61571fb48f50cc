"""Attention in blocks of queries and keys with an online softmax, and a gradient of its own.

Memory grows with S + T, never with S * T, on any platform. Every block knows where in its row it stands, so that
blocks may come in any order and from anywhere: `parallel/context.py` feeds this module the keys of other devices.
The forward pass is Milakov & Gimelshein's online softmax (2018), the backward pass forms the weights again from the
kept log normalisers (Dao et al. 2022, algorithm 4).

Shapes: B batch, S query positions, T key positions, H query heads, K kv heads, G = H / K queries a kv head, h head dim,
v head dim of values, N = B K heads to be worked on, n and m blocks of queries and keys, s and t positions in them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.mask import MASKED, Mask, biases, static, visible, with_sinks
from maxlm.kernels.matmul import ATTENTION_NAME, dot
from maxlm.kernels.opaque import opaque

BLOCK = 512  # rows of a block at most: positions of keys, or positions times G of queries
# The least a running maximum can be: so far above MASKED that a masked score weighs nothing even in a row that has
# seen nothing yet.
FLOOR = MASKED / 2


class Places(NamedTuple):
    """Where blocks stand: starts (n,) int32, the position in the row of each block's first entry.

    counts: (n,) int32, how many of a block's entries are real (the rest is padding); None: all.
    """

    starts: jax.Array
    counts: jax.Array | None


class Queries(NamedTuple):
    """rows: (N, n, G, s, h). segments: (N, n, s) int32 or None. slopes: (N, n, G) float32 or None, as of `Mask`."""

    rows: jax.Array
    segments: jax.Array | None
    slopes: jax.Array | None


class Keys(NamedTuple):
    """keys: (N, m, t, h). values: (N, m, t, v). segments: (N, m, t) int32 or None."""

    keys: jax.Array
    values: jax.Array
    segments: jax.Array | None


class Running(NamedTuple):
    """The online softmax so far, float32: out (N, n, G, s, v) not yet normalised; top and total (N, n, G, s)."""

    out: jax.Array
    top: jax.Array
    total: jax.Array


class Attended(NamedTuple):
    """out: (B, S, H, v). normaliser: (B, S, H) float32, log of the sum of exp(score); 0 where nothing is seen."""

    out: jax.Array
    normaliser: jax.Array


class Gradients(NamedTuple):
    """Float32 gradients in blocks: queries (N, n, G, s, h), keys (N, m, t, h), values (N, m, t, v)."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array


class Cotangents(NamedTuple):
    """What the backward pass knows of the queries: out (N, n, G, s, v); normaliser and delta (N, n, G, s) float32.

    `delta` is the product of the result and its cotangent, less the normaliser's own cotangent.
    """

    out: jax.Array
    normaliser: jax.Array
    delta: jax.Array


# --- blocks ----------------------------------------------------------------------------------------------------------


def block_size(length: int, groups: int = 1) -> int:
    """Positions of a block: as few blocks as `BLOCK` allows, and those evenly filled."""
    return -(-length // -(-length // max(BLOCK // groups, 1)))


def places(starts: jax.Array, length: int, *, groups: int = 1) -> Places:
    """The places of the blocks of stretches of `length` positions each that begin at `starts` (stretches,)."""
    size = block_size(length, groups)
    within = jnp.arange(0, length, size, dtype=jnp.int32)
    blocks = (starts[:, None].astype(jnp.int32) + within).reshape(-1)
    if length % size == 0:
        return Places(blocks, None)
    return Places(blocks, jnp.tile(jnp.minimum(size, length - within), starts.shape[0]))


def to_blocks(x: jax.Array, *, kv_heads: int, stretches: int = 1) -> jax.Array:
    """(B, S, H, h) to (B*K, n, G, s, h), padded where the blocks do not fill one of the row's equal `stretches`."""
    batch, length, heads, dim = x.shape
    length, groups = length // stretches, heads // kv_heads
    size = block_size(length, groups)
    return _cut(x.reshape(batch, stretches, length, kv_heads, groups, dim), size)


def _cut(x: jax.Array, size: int) -> jax.Array:
    """(B, stretches, length, K, G, h) to (B*K, n, G, size, h)."""
    batch, stretches, length, kv_heads, groups, dim = x.shape
    if extra := -length % size:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, size, kv_heads, groups, dim).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(batch * kv_heads, *x.shape[2:])


def from_blocks(x: jax.Array, *, batch: int, length: int, stretches: int = 1) -> jax.Array:
    """Undoes `to_blocks`, for rows of `length` positions."""
    _, blocks, groups, size, dim = x.shape
    x = x.reshape(batch, -1, blocks, groups, size, dim).transpose(0, 2, 4, 1, 3, 5)
    x = x.reshape(batch * stretches, blocks // stretches * size, -1, dim)[:, : length // stretches]
    return x.reshape(batch, length, -1, dim)


def query_blocks(q: jax.Array, rows: Rows, *, kv_heads: int) -> Queries:
    """Blocks of q (B, S, H, h), of its segments and of its heads' slopes."""
    stretches, slopes = rows.starts_q.shape[0], rows.slopes
    blocks = to_blocks(q, kv_heads=kv_heads, stretches=stretches)
    if slopes is not None:
        of_rows = jnp.tile(slopes.astype(jnp.float32).reshape(kv_heads, 1, -1), (q.shape[0], 1, 1))
        slopes = jnp.repeat(of_rows, blocks.shape[1], axis=1)
    segments = _segment_blocks(rows.segments_q, blocks.shape[3], kv_heads=kv_heads, stretches=stretches)
    return Queries(blocks, segments, slopes)


def key_blocks(k: jax.Array, v: jax.Array, segments: jax.Array | None, *, stretches: int = 1) -> Keys:
    """Blocks of k (B, T, K, h), v (B, T, K, v) and their segments (B, T)."""
    heads = k.shape[2]
    keys, values = (to_blocks(x, kv_heads=heads, stretches=stretches)[:, :, 0] for x in (k, v))
    return Keys(keys, values, _segment_blocks(segments, keys.shape[2], kv_heads=heads, stretches=stretches))


def _segment_blocks(segments: jax.Array | None, size: int, *, kv_heads: int, stretches: int) -> jax.Array | None:
    if segments is None:
        return None
    batch, length = segments.shape
    blocks = _cut(segments.reshape(batch, stretches, length // stretches, 1, 1, 1), size)[:, :, 0, :, 0]
    return jnp.repeat(blocks, kv_heads, axis=0)


# --- one block of queries and one of keys ----------------------------------------------------------------------------


def meet(mask: Mask, query: jax.Array, queries: int, key: jax.Array, keys: int) -> jax.Array:
    """Whether by their places any of `queries` queries from `query` on sees any of `keys` keys from `key` on."""
    seen = key <= query + queries - 1
    if mask.window:
        seen &= query - (key + keys - 1) < mask.window
    return seen


def _scores(
    mask: Mask, queries: Queries, start: jax.Array, keys: Keys, place: Places
) -> tuple[jax.Array, jax.Array | float]:
    """Masked float32 scores (G, s, t) of a pair of blocks, and the soft-cap's derivative at them (1.0 without one)."""
    scores = dot("gsh,th->gst", queries.rows, keys.keys) * mask.scale
    slope: jax.Array | float = 1.0
    if mask.softcap:
        tanh = jnp.tanh(scores / mask.softcap)
        scores, slope = mask.softcap * tanh, 1.0 - tanh * tanh
    local = dataclasses.replace(
        mask,
        segments_q=None if queries.segments is None else queries.segments[None],
        segments_k=None if keys.segments is None else keys.segments[None],
        q_offset=start - place.starts,
    )
    if queries.slopes is not None:
        scores += biases(local, queries.slopes, *scores.shape[1:])
    seen = visible(local, *scores.shape[1:])
    if place.counts is not None:
        seen &= jnp.arange(scores.shape[2]) < place.counts
    return jnp.where(seen, scores, MASKED), slope


def _absorb_pair(
    mask: Mask, running: Running, queries: Queries, start: jax.Array, keys: Keys, place: Places
) -> Running:
    scores, _ = _scores(mask, queries, start, keys, place)
    top = jnp.maximum(running.top, scores.max(axis=2))
    shrink = jnp.exp(running.top - top)
    weights = jnp.exp(scores - top[..., None])
    out = dot("gst,tv->gsv", weights.astype(keys.values.dtype), keys.values)
    return Running(running.out * shrink[..., None] + out, top, running.total * shrink + weights.sum(axis=2))


def _pull_pair(
    mask: Mask,
    sums: Gradients,
    queries: Queries,
    start: jax.Array,
    cotangents: Cotangents,
    keys: Keys,
    place: Places,
) -> Gradients:
    dtype = queries.rows.dtype
    scores, slope = _scores(mask, queries, start, keys, place)
    weights = jnp.exp(scores - cotangents.normaliser[..., None])
    pull = dot("gsv,tv->gst", cotangents.out, keys.values) - cotangents.delta[..., None]
    scores = (weights * pull * slope * mask.scale).astype(dtype)
    return Gradients(
        sums.queries + dot("gst,th->gsh", scores, keys.keys),
        sums.keys + dot("gst,gsh->th", scores, queries.rows),
        sums.values + dot("gst,gsv->tv", weights.astype(dtype), cotangents.out),
    )


# --- all blocks ------------------------------------------------------------------------------------------------------


class Blockwise(NamedTuple):
    """How blocks are worked through: the static part of a mask, and how heads are.

    mask: without arrays.
    together: all heads at once, as an accelerator wants it, or one after the other, since XLA runs batched products
      several times slower than plain ones on a CPU.
    """

    mask: Mask
    together: bool

    def absorb(self, running: Running, queries: Queries, starts: jax.Array, keys: Keys, places: Places) -> Running:
        """The online softmax after these keys, too.

        Args: starts (n,), the queries' places; places, those of the keys.
        """
        size, count = queries.rows.shape[3], keys.keys.shape[2]

        def head(operands: Any) -> Running:
            running, queries, keys = operands

            def rows(block: Any) -> Running:
                running, queries, start = block

                def step(running: Running, other: Any) -> tuple[Running, None]:
                    keys, place = other
                    met = meet(self.mask, start, size, place.starts, count)
                    add = functools.partial(_absorb_pair, self.mask)
                    skip = lambda running, *_: running  # noqa: E731
                    return jax.lax.cond(met, add, skip, running, queries, start, keys, place), None

                return jax.lax.scan(step, running, (keys, places))[0]

            return jax.lax.map(rows, (running, queries, starts))

        operands = (running, queries, keys)
        return jax.vmap(head)(operands) if self.together else jax.lax.map(head, operands)

    def pull(
        self,
        sums: Gradients,
        queries: Queries,
        starts: jax.Array,
        cotangents: Cotangents,
        keys: Keys,
        places: Places,
    ) -> Gradients:
        """Adds to `sums` the gradients of these queries and keys by each other."""
        size, count = queries.rows.shape[3], keys.keys.shape[2]

        def head(operands: Any) -> Gradients:
            queries, cotangents, keys = operands

            def rows(sums: tuple[jax.Array, jax.Array], block: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
                queries, start, cotangents = block

                def step(total: jax.Array, other: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                    keys, place, *sums = other
                    met = meet(self.mask, start, size, place.starts, count)
                    add = functools.partial(_pull_pair, self.mask)
                    skip = lambda sums, *_: sums  # noqa: E731
                    sums = Gradients(total, *sums)
                    out = jax.lax.cond(met, add, skip, sums, queries, start, cotangents, keys, place)
                    return out.queries, (out.keys, out.values)

                zero = jnp.zeros(queries.rows.shape, jnp.float32)
                total, sums = jax.lax.scan(step, zero, (keys, places, *sums))
                return sums, total

            zeros = jnp.zeros(keys.keys.shape, jnp.float32), jnp.zeros(keys.values.shape, jnp.float32)
            sums, total = jax.lax.scan(rows, zeros, (queries, starts, cotangents))
            return Gradients(total, *sums)

        operands = (queries, cotangents, keys)
        if self.together:
            return jax.tree.map(jnp.add, sums, jax.vmap(head)(operands))

        def add(sums: Gradients, item: Any) -> tuple[Gradients, None]:
            # In place, so that no second set of sums exists.
            index, operands = item
            return jax.tree.map(lambda x, part: x.at[index].add(part), sums, head(operands)), None

        return jax.lax.scan(add, sums, (jnp.arange(queries.rows.shape[0]), operands))[0]


def zero_gradients(queries: Queries, keys: Keys) -> Gradients:
    """Sums to begin with."""
    return Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (queries.rows, keys.keys, keys.values)))


def begin(queries: Queries, value_dim: int) -> Running:
    """An online softmax that has seen no key."""
    shape = queries.rows.shape[:-1]
    return Running(
        jnp.zeros((*shape, value_dim), jnp.float32), jnp.full(shape, FLOOR, jnp.float32), jnp.zeros(shape, jnp.float32)
    )


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
    """The normalised result (N, n, G, s, v) and the log normalisers (N, n, G, s), float32; 0 where nothing is seen."""
    some = running.total > 0
    total = jnp.where(some, running.total, 1.0)
    return running.out / total[..., None], jnp.where(some, running.top + jnp.log(total), 0.0)


# --- whole rows ------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What is known of the positions of queries and keys; either are `stretches` equal pieces of a row.

    segments_q, segments_k: (B, S) and (B, T) int32, or None.
    starts_q, starts_k: (stretches,) int32: the place in the row of each piece's first position.
    slopes: (H,) float32 or None, as of `Mask`; constants, to which no gradient is given.
    """

    segments_q: jax.Array | None
    segments_k: jax.Array | None
    starts_q: jax.Array
    starts_k: jax.Array
    slopes: jax.Array | None


class Way(Protocol):
    """How queries meet keys: `Blockwise` on one device, or the ways of `parallel/context.py`. Hashable."""

    def absorb(self, running: Running, queries: Queries, starts: jax.Array, keys: Keys, places: Places) -> Running: ...

    def pull(
        self,
        sums: Gradients,
        queries: Queries,
        starts: jax.Array,
        cotangents: Cotangents,
        keys: Keys,
        places: Places,
    ) -> Gradients: ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(way: Way, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> Attended:
    """Attention of q (B, S, H, h) over k (B, T, K, h) and v (B, T, K, v)."""
    return _attend_forward(way, q, k, v, rows)[0]


def _operands(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> tuple[Queries, jax.Array, Keys, Places]:
    cuts_q, cuts_k = rows.starts_q.shape[0], rows.starts_k.shape[0]
    return (
        query_blocks(q, rows, kv_heads=k.shape[2]),
        places(rows.starts_q, q.shape[1] // cuts_q, groups=q.shape[2] // k.shape[2]).starts,
        key_blocks(k, v, rows.segments_k, stretches=cuts_k),
        places(rows.starts_k, k.shape[1] // cuts_k),
    )


def _attend_forward(way: Way, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> tuple[Attended, Any]:
    # A remat policy that saves the outcome need not attend again.
    out = checkpoint_name(opaque(functools.partial(_attended, way))(q, k, v, rows), ATTENTION_NAME)
    return out, (q, k, v, rows, out)


def _attended(way: Way, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> Attended:
    queries, starts, keys, key_places = _operands(q, k, v, rows)
    running = way.absorb(begin(queries, v.shape[3]), queries, starts, keys, key_places)
    out, normaliser = finish(running)
    back = functools.partial(from_blocks, batch=q.shape[0], length=q.shape[1], stretches=rows.starts_q.shape[0])
    return Attended(back(out.astype(q.dtype)), back(normaliser[..., None])[..., 0])


def _attend_backward(way: Way, kept: Any, g: Attended) -> tuple[Any, ...]:
    q, k, v, rows, (out, normaliser) = kept
    queries, starts, keys, key_places = _operands(q, k, v, rows)
    delta = jnp.sum(out.astype(jnp.float32) * g.out.astype(jnp.float32), axis=-1) - g.normaliser
    split = functools.partial(to_blocks, kv_heads=k.shape[2], stretches=rows.starts_q.shape[0])
    cotangents = Cotangents(split(g.out), *(split(x[..., None])[..., 0] for x in (normaliser, delta)))
    d = way.pull(zero_gradients(queries, keys), queries, starts, cotangents, keys, key_places)
    back = functools.partial(from_blocks, batch=q.shape[0])
    dq = back(d.queries.astype(q.dtype), length=q.shape[1], stretches=rows.starts_q.shape[0])
    dk, dv = (
        back(x[:, :, None].astype(k.dtype), length=k.shape[1], stretches=rows.starts_k.shape[0])
        for x in (d.keys, d.values)
    )
    return dq, dk, dv, None


attend.defvjp(_attend_forward, _attend_backward)


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, together: bool) -> jax.Array:
    """Attention of q (B, S, H, h) over k (B, T, K, h) and v (B, T, K, v), to (B, S, H, v), as `attention.plain`.

    A query that sees no key gets zeros. `together` as of `Blockwise`.
    """
    zero = jnp.zeros(1, jnp.int32)
    offset = jnp.asarray(0 if mask.q_offset is None else mask.q_offset, jnp.int32)
    way = Blockwise(static(mask), together)
    rows = Rows(mask.segments_q, mask.segments_k, zero + offset, zero, mask.slopes)
    return with_sinks(*attend(way, q, k, v, rows), sinks=mask.sinks)
