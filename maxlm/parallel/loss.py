"""The loss over a mesh: every device has its own positions, and its own part of the vocabulary where `tensor` cuts it.

The head comes together along `fsdp` once, in the compute dtype, and its gradient is added up on each device over all of
the device's positions before it is spread again. Left to itself XLA adds the whole gradient up over the mesh, 2 GB of
an 8B model with 128,256 pieces, once for each chunk of positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxlm.kernels.cross_entropy import Device, LocalFn, SpreadFn
from maxlm.parallel import collectives
from maxlm.parallel.islands import island
from maxlm.parallel.sharding import RULES, partition

_LOGICAL: dict[str, tuple[str | None, ...]] = {
    "sum": (),
    "token": ("batch", "seq"),
    "hidden": ("batch", "seq", None),
    "head": ("embed", "vocab"),
}
PIECE = 2**26
"""Bytes of the head's gradient that are added up over `fsdp` at a time. Of four times as many XLA:TPU makes an
all-reduce for Llama 3.1 405B, twice the bytes on the wire, and for the 70B holes in memory, 2.7 GiB of them."""
_POSITIONS = RULES["batch"] + RULES["seq"]


def sharded_loss(mesh: Mesh, *, reduce_dtype: Any = jnp.float32) -> SpreadFn:
    """`kernels.cross_entropy.alone` over a mesh, with the same arguments and results.

    Args:
      reduce_dtype: in which the head's gradient is added up over the mesh.
    """
    together = _TOGETHER | {"head": functools.partial(_head_gradient, mesh=mesh, dtype=reduce_dtype)}

    def spread(
        local: LocalFn, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, kinds: Any
    ) -> Any:
        def on_device(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
            (vocab,), (embed,) = RULES["vocab"], RULES["embed"]
            wide = collectives.gather(head.astype(hidden.dtype), embed, dim=0)
            device = Device((vocab,) if mesh.shape[vocab] > 1 else (), mesh.devices.flat[0].platform == "cpu")
            out = local(hidden, wide, targets, weights, device)
            return jax.tree.map(lambda kind, x: together[kind](x).astype(_dtype(kind, x, hidden)), kinds, out)

        inner = [partition(_LOGICAL[kind]) for kind in ("hidden", "head", "token", "token")]
        outer = jax.tree.map(lambda kind: partition(_LOGICAL[kind]), kinds)
        return island(on_device, mesh, in_specs=tuple(inner), out_specs=outer)(hidden, head, targets, weights)

    return spread


def _dtype(kind: str, x: jax.Array, hidden: jax.Array) -> Any:
    return hidden.dtype if kind == "hidden" else x.dtype


def _head_gradient(x: jax.Array, *, mesh: Mesh, dtype: Any) -> jax.Array:
    """(D, V) of a device's positions -> its part of the sum, added up in `dtype`.

    In pieces, of which one at a time is there twice. What is scattered along its first dim, XLA:TPU fills up by an
    eighth, whatever its size: the halves of a piece lie one behind the other, and are cut along their second.
    """
    (embed,) = RULES["embed"]
    count = -(-x.size * x.dtype.itemsize // PIECE)
    cuts = [i * x.shape[1] // count // 2 * 2 for i in range(1, count)]

    def scattered(part: jax.Array) -> jax.Array:
        halves = jnp.split(part.astype(dtype), 1 if part.shape[1] % 2 else 2, axis=1)
        own = collectives.scatter(jnp.stack(halves), embed, dim=1)
        return jnp.concatenate(own, axis=1)

    if mesh.shape[embed] > 1:
        own = jnp.concatenate([scattered(part) for part in jnp.split(x, cuts, axis=1)], axis=1)
    else:
        own = x.astype(dtype)
    return collectives.add(own, [axis for axis in _POSITIONS if axis != embed]).astype(x.dtype)


_TOGETHER: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sum": lambda x: collectives.add(x, _POSITIONS),
    "token": lambda x: x,
    "hidden": lambda x: collectives.add(x, RULES["vocab"]),
}
"""How the results of the devices make the whole, by kind; of `head` it is `_head_gradient`."""
