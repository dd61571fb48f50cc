"""Context parallelism: attention over a sequence that is spread over the `context` axis of the mesh.

A row is cut into 2c chunks for c devices, and device i holds the chunks i and 2c - 1 - i, one after the other (the
zigzag order: Brandon et al. 2023 and Llama 3, section 3.3.2). Under a causal mask every device then has the same number
of pairs of chunks to multiply; with contiguous pieces the last would have all keys and the first one piece.
`zigzag` brings a batch into this order once, at the start of a step; see docs/parallelism.md for what may rely on it.

Queries stay where they are. Their keys and values come by one of two ways, each with the same custom gradient:

- ring (Liu et al. 2023): they go round, a device at a time, and the next ones are under way while these are
  multiplied. In the backward pass their gradients travel with them, so that no hop's keys are kept.
- gather: every device is given all of them, once a pass; their gradients are summed and scattered. It moves no more
  bytes in one collective instead of c - 1 hops, but holds c devices' keys and values at once.

Shapes as in `kernels/chunked.py`; c devices along `context`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxlm.kernels import chunked
from maxlm.kernels.chunked import Blockwise, Cotangents, Gradients, Keys, Places, Queries, Rows, Running
from maxlm.kernels.mask import Mask, static, with_sinks
from maxlm.parallel.islands import AttentionFn, island, mask_specs
from maxlm.parallel.sharding import RULES, partition

(AXIS,) = RULES["seq"]


def zigzag(x: jax.Array, *, devices: int) -> jax.Array:
    """Brings the positions of x (B, S, ...) into the order in which `devices` along `context` hold them.

    Raises:
      ValueError: S does not divide into two chunks a device.
    """
    if devices == 1:
        return x
    batch, length, *rest = x.shape
    if length % (2 * devices):
        raise ValueError(f"rows of {length} positions do not divide into 2 x {devices} chunks; see parallel.context")
    chunks = x.reshape(batch, 2, devices, length // (2 * devices), *rest)
    return jnp.stack([chunks[:, 0], chunks[:, 1, ::-1]], axis=2).reshape(x.shape)


def arrange(tree: Any, *, devices: int) -> Any:
    """`zigzag` of every array of a tree."""
    return jax.tree.map(lambda x: zigzag(x, devices=devices), tree)


def starts(device: jax.Array | int, *, devices: int, length: int) -> jax.Array:
    """Where in its row each of the two chunks of a device begins; the device holds `length` positions in all."""
    return jnp.stack([device, 2 * devices - 1 - device]) * (length // 2)


class Ring(NamedTuple):
    """Keys and values go round; `near` multiplies those that are here. A `chunked.Way`."""

    near: Blockwise
    devices: int

    def _passed(self, tree: Any) -> Any:
        """What the device before holds."""
        onwards = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, onwards), tree)

    def absorb(self, running: Running, queries: Queries, starts: jax.Array, keys: Keys, places: Places) -> Running:
        def hop(carry: Any, _: None) -> tuple[Any, None]:
            running, held = carry
            coming = self._passed(held)  # before the products, which it does not wait for
            return (self.near.absorb(running, queries, starts, *held), coming), None

        (running, held), _ = jax.lax.scan(hop, (running, (keys, places)), None, length=self.devices - 1)
        return self.near.absorb(running, queries, starts, *held)

    def pull(
        self,
        sums: Gradients,
        queries: Queries,
        starts: jax.Array,
        cotangents: Cotangents,
        keys: Keys,
        places: Places,
    ) -> Gradients:
        def hop(carry: Any, _: None) -> tuple[Any, None]:
            sums, held = carry
            # The sums of the keys that are here now are one device behind and catch up during the products. (In the
            # last hop the keys are passed on for nothing; a hop less would need a third copy of the products.)
            behind, coming = self._passed((sums.keys, sums.values)), self._passed(held)
            sums = self.near.pull(Gradients(sums.queries, *behind), queries, starts, cotangents, *held)
            return (sums, coming), None

        coming = self._passed((keys, places))
        first = self.near.pull(sums, queries, starts, cotangents, keys, places)
        (sums, _), _ = jax.lax.scan(hop, (first, coming), None, length=self.devices - 1)
        return Gradients(sums.queries, *self._passed((sums.keys, sums.values)))


class Gather(NamedTuple):
    """Every device is given all keys and values, and `near` multiplies them. A `chunked.Way`."""

    near: Blockwise

    def _all(self, keys: Keys, places: Places) -> tuple[Keys, Places]:
        # Every block knows its place, so that the order in which devices hold them need not be undone.
        def gathered(tree: Any, axis: int) -> Any:
            return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=axis, tiled=True), tree)

        return gathered(keys, 1), gathered(places, 0)

    def absorb(self, running: Running, queries: Queries, starts: jax.Array, keys: Keys, places: Places) -> Running:
        return self.near.absorb(running, queries, starts, *self._all(keys, places))

    def pull(
        self,
        sums: Gradients,
        queries: Queries,
        starts: jax.Array,
        cotangents: Cotangents,
        keys: Keys,
        places: Places,
    ) -> Gradients:
        keys, places = self._all(keys, places)
        whole = chunked.zero_gradients(queries, keys)._replace(queries=sums.queries)
        whole = self.near.pull(whole, queries, starts, cotangents, keys, places)
        own = (jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True) for x in (whole.keys, whole.values))
        return Gradients(whole.queries, *map(jnp.add, (sums.keys, sums.values), own))


def choose_method(method: str, *, devices: int, q_heads: int, kv_heads: int) -> str:
    """`ring` or `gather`.

    `auto` gathers where all devices' keys and values take no more bytes than one device's queries and results do,
    which is devices * K <= H: there gathering cannot become the peak of memory, and one collective that moves the
    same bytes beats a chain of them. Else keys go round.
    """
    if method != "auto":
        return method
    return "gather" if devices * kv_heads <= q_heads else "ring"


def context_attention(mesh: Mesh, *, method: str, together: bool) -> AttentionFn:
    """Attention over a mesh that shards rows (`batch`), positions in zigzag order (`seq`) and heads.

    Takes and returns q (B, S, H, h), k (B, S, K, h), v (B, S, K, v), out (B, S, H, v), whose positions, and those of
    the mask's segments, are in the order of `zigzag`. Windows and causality go by the true positions.

    Args:
      method: ring, gather or auto.
      together: as of `chunked.Blockwise`.
    """
    devices = mesh.shape[AXIS]
    queries, keys = partition(("batch", "seq", "q_heads", None)), partition(("batch", "seq", "kv_heads", None))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        if mask.q_offset is not None:
            raise ValueError("attention over a sharded sequence cannot decode; generate on a mesh with context=1")
        if q.shape[1] != k.shape[1] or q.shape[1] % (2 * devices):
            raise ValueError(
                f"{q.shape[1]} queries and {k.shape[1]} keys do not divide into 2 x {devices} chunks each; "
                "give rows a length that is a multiple of 2 x parallel.context"
            )
        near = Blockwise(static(mask), together)
        chosen = choose_method(method, devices=devices, q_heads=q.shape[2], kv_heads=k.shape[2])
        way = Ring(near, devices) if chosen == "ring" else Gather(near)

        def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
            here = starts(jax.lax.axis_index(AXIS), devices=devices, length=q.shape[1])
            rows = Rows(mask.segments_q, mask.segments_k, here, here, mask.slopes)
            return with_sinks(*chunked.attend(way, q, k, v, rows), sinks=mask.sinks)

        specs = (queries, keys, keys, mask_specs(mask, seq="seq"))
        return island(local, mesh, in_specs=specs, out_specs=queries)(q, k, v, mask)

    return attend
