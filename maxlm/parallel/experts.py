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
    are cross the network; the CPU's XLA has no such collective, and whole regions are sent.

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
        how = (hidden, capacity, dtype, backend, gathered, reduce_dtype)
        settings = _Settings(mesh.shape["expert"], ragged, scattered, *how)
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

    # Experts are numbered device by device; the number E, nowhere, becomes device p, which is none.
    outbound = order(chosen // held, settings.devices, region=region)
    wanted = jnp.take(chosen % held, outbound.entries, mode="fill", fill_value=held)
    arrived = lax.all_to_all(outbound.sizes, "expert", 0, 0, tiled=True)
    wanted = lax.all_to_all(wanted, "expert", 0, 0, tiled=True)
    rows = _exchanged(settings, to_rows(tokens, outbound), outbound.sizes, arrived)

    place = order(wanted, held)
    sorted_rows = to_rows(rows, place)
    y = through_experts(sorted_rows, place.sizes, experts, **settings.products)
    y = _exchanged(settings, from_rows(y, place), arrived, outbound.sizes)
    return weighted(from_rows(y, outbound), routes.weights.reshape(-1, choices)).reshape(x.shape)


def _exchanged(settings: _Settings, rows: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """Region j of each device's rows (p C, D) goes to device j, which has it as the region of its sender.

    Args:
      sent, received: (p,) int32: rows in use at the beginning of each region, before and after.
    """
    if not settings.ragged:
        return lax.all_to_all(rows, "expert", 0, 0, tiled=True)
    region = rows.shape[0] // settings.devices
    begins = (jnp.arange(settings.devices) * region).astype(jnp.int32)
    own = jnp.full(settings.devices, lax.axis_index("expert") * region, jnp.int32)
    return lax.ragged_all_to_all(rows, jnp.zeros_like(rows), begins, sent, own, received, axis_name="expert")
