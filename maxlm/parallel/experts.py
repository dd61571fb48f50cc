"""Experts over a mesh: tokens travel to the devices that hold their experts, and back.

Shapes: B batch, S sequence, T tokens of a device, k experts of a token, D embed, F mlp, E experts of all, p devices
along the mesh axis `expert`, C rows of the region that a device keeps for each sender.

Outside of the experts, `expert` spreads the batch as `data` does. Inside, every device holds E / p experts, of whose
hidden dims it has a part where `tensor` is above one, and whose matrices each product gathers from `fsdp`, in the
compute dtype and again in the backward pass: what the forward pass keeps is the device's own part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from maxlm.kernels.experts import (
    Experts,
    Hidden,
    Linear,
    Routes,
    from_rows,
    local_experts,
    order,
    through_experts,
    to_rows,
    weighted,
)
from maxlm.kernels.grouped import Backend
from maxlm.parallel import collectives
from maxlm.parallel.islands import island
from maxlm.parallel.sharding import RULES, partition, shards

(FSDP,) = RULES["embed"]

RAGGED_PLATFORMS = ("tpu", "gpu", "cuda")
"""Those on which XLA has an all-to-all that sends only the rows there are."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    devices: int  # p
    ragged: bool
    scattered: bool
    hidden: Hidden
    capacity: int
    dtype: Any
    backend: Backend
    gathered: str
    reduce_dtype: Any

    @property
    def products(self) -> dict[str, Any]:
        """What the products are told."""
        cut = {"gathered": self.gathered, "reduce_dtype": self.reduce_dtype}
        return {"hidden": self.hidden, "dtype": self.dtype, "backend": self.backend, **cut}


def sharded_experts(
    backend: Backend, mesh: Mesh, *, rows: str | None = "batch", reduce_dtype: Any = jnp.float32
) -> Callable[..., jax.Array]:
    """`kernels.experts.local_experts` over a mesh, with the same arguments and result.

    Each pair of devices exchanges up to C rows, which is enough for whatever is asked of it: T min(k, E / p), or with
    a capacity what that lets through, if it is less. Nothing is dropped here. On TPU and GPU only the rows that there
    are cross the network, out of T k rows and back into them; the CPU's XLA has no such collective, and whole regions
    are sent.

    Args:
      rows: the logical axis of the batch; None: every device has all rows, whole, and is given the whole result.
      reduce_dtype: in which the kernels' gradients are added up over `fsdp`. The sum of a device's own part over `data`
        and `context` is in float32.
    """
    tokens = partition((rows, "seq" if rows else None, None))
    ragged = mesh.devices.flat[0].platform in RAGGED_PLATFORMS
    gathered = FSDP if mesh.shape[FSDP] > 1 else ""  # else nothing is added up there, nor rounded for it

    def run(
        x: jax.Array, routes: Routes, experts: Experts, *, hidden: Hidden, capacity: int = 0, dtype: Any
    ) -> jax.Array:
        # The sum over `tensor` leaves each of its devices a part of the positions, as the stream has them.
        scattered = rows is not None and x.shape[1] % shards(mesh, "residual") == 0
        settings = _Settings(
            mesh.shape["expert"], ragged, scattered, hidden, capacity, dtype, backend, gathered, reduce_dtype
        )
        place: Any = Routes
        specs = (
            tokens,
            place(tokens, tokens),
            jax.tree.map(lambda _, axes: partition(axes), experts, _logical(experts)),
        )
        out = partition((rows, "residual", None)) if scattered else tokens
        function = functools.partial(_on_device, settings)
        return island(function, mesh, in_specs=specs, out_specs=out)(x.astype(dtype), routes, experts)

    return run


def _logical(experts: Experts) -> Any:
    """The logical axes of every array, in its place."""

    def axes(linear: Linear | None, inner: str, outer: str) -> Any:
        if linear is None:
            return None
        place: Any = Linear
        return place(("expert", inner, outer), None if linear.bias is None else ("expert", outer))

    place: Any = Experts
    return place(
        axes(experts.gate, "embed", "mlp"), axes(experts.up, "embed", "mlp"), axes(experts.down, "mlp", "embed")
    )


def _on_device(settings: _Settings, x: jax.Array, routes: Routes, experts: Experts) -> jax.Array:
    """(B, S, D) of this device -> the same, float32, or the device's part of its positions."""
    if experts.down.bias is not None:
        bias = collectives.gather(experts.down.bias, FSDP, dim=1)
        # is added by one of those whose parts are summed
        bias = jnp.where(collectives.index("tensor") == 0, bias, 0.0)
        experts = experts._replace(down=experts.down._replace(bias=bias))
    if settings.devices == 1:
        y = local_experts(x, routes, experts, **settings.products)
    else:
        y = _travelling(settings, x, routes, experts)
    return collectives.scatter(y, "tensor", dim=1) if settings.scattered else collectives.add(y, "tensor")


def _travelling(settings: _Settings, x: jax.Array, routes: Routes, experts: Experts) -> jax.Array:
    tokens, chosen = x.reshape(-1, x.shape[-1]), routes.experts.reshape(-1)
    held, choices = experts.up.kernel.shape[0], routes.experts.shape[-1]
    region = tokens.shape[0] * min(choices, held)
    if settings.capacity:
        region = min(region, x.shape[0] * held * settings.capacity)

    # Experts are numbered device by device; the number E, nowhere, becomes device p, which is none. Within a region
    # rows lie by expert, so that their numbers say which are whose.
    counts = jnp.zeros(settings.devices * held, jnp.int32).at[chosen].add(1, mode="drop").reshape(-1, held)
    arriving = lax.all_to_all(counts, "expert", 0, 0, tiled=True)
    ends = jnp.cumsum(arriving, axis=1)
    wanted = jnp.sum(ends[:, :, None] <= jnp.arange(region), axis=1, dtype=jnp.int32).reshape(-1)

    outbound = order(chosen // held, settings.devices, within=chosen, region=0 if settings.ragged else region)
    regions = (jnp.arange(settings.devices) * region).astype(jnp.int32)
    there = _Buffer(settings.devices * region, regions, ends[:, -1])
    begins = jnp.cumsum(outbound.sizes) - outbound.sizes if settings.ragged else regions
    here = _Buffer(outbound.entries.shape[0], begins, outbound.sizes)
    rows = _exchanged(settings.ragged, to_rows(tokens, outbound), here, there)

    place = order(wanted, held)  # of the rows of none nothing comes back: what they hold does not matter
    sorted_rows = to_rows(rows, place, fill=False)
    y = through_experts(sorted_rows, place.sizes, experts, **settings.products)
    y = _exchanged(settings.ragged, from_rows(y, place, fill=False), there, here)
    return weighted(from_rows(y, outbound), routes.weights.reshape(-1, choices)).reshape(x.shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["begins", "sizes"], meta_fields=["rows"])
@dataclasses.dataclass(frozen=True)
class _Buffer:
    """Where rows to or from each device lie: from row begins[j] on sizes[j] of them, both (p,) int32."""

    rows: int
    begins: jax.Array
    sizes: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(ragged: bool, x: jax.Array, source: _Buffer, target: _Buffer) -> jax.Array:
    """Each device's rows for device j, (rows, D), go to device j, which has them where its rows from the sender lie.

    What lies between them is undefined, and so it is in the gradient: to fill it with zeros takes XLA:TPU longer, by
    its own count, than any product of a layer.
    """
    if not ragged:
        return lax.all_to_all(x, "expert", 0, 0, tiled=True)
    places = lax.all_to_all(target.begins, "expert", 0, 0, tiled=True)
    into = lax.empty((target.rows, x.shape[1]), x.dtype)
    return lax.ragged_all_to_all(x, into, source.begins, source.sizes, places, target.sizes, axis_name="expert")


def _exchanged_forward(ragged: bool, x: jax.Array, source: _Buffer, target: _Buffer) -> Any:
    return _exchanged(ragged, x, source, target), (source, target)


def _exchanged_backward(ragged: bool, kept: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    source, target = kept
    return _exchanged(ragged, g, target, source), None, None


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)
