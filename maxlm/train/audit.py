"""Looking for devices that compute wrongly without a word: one microbatch again on other devices, to the same bits.

The loss and all gradients of a microbatch are computed on the run's mesh, and on a mesh of the same shape in which each
device has its neighbour's place. The program and its shards are the same, so the digests must be. Where they are not,
both are done again: what does not repeat itself is a fault that comes and goes.

On machines whose collectives sum in the order of the wiring, another placement may change the last bits by itself. The
first audit of a process finds that out: where the two placements differ from each other, each the same twice, the
audits compare two executions on the same devices from there on, and say so; for each batch shape anew, as the wiring
may go by the size of what is summed. If they differ so only later, a device has begun to compute something else, the
same every time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.checkpoint.digest import array_paths, digest_array
from maxlm.cluster import meet
from maxlm.data.batch import Batch
from maxlm.errors import UserError
from maxlm.parallel.sharding import named_sharding
from maxlm.train.setup import Setup, make_setup
from maxlm.train.state import TrainState

_SHOWN = 6  # arrays that a message names


class SilentCorruption(UserError):
    """Devices of the run do not compute the same twice."""


class Audit:
    """Compares computations of one microbatch. Nothing is compiled before the first `check`."""

    def __init__(self, setup: Setup, *, log: Callable[[str], None]):
        self._setup, self._log = setup, log
        self._here: _Program | None = None
        self._there: _Program | None = None
        self._alike: dict[tuple[int, ...], bool] = {}  # by batch shape, once seen: the placement does not matter

    def check(self, state: TrainState, batch: Batch, *, step: int) -> None:
        """Computes the loss and gradients of a microbatch of `batch` (B, S) on both placements; changes nothing.

        Raises:
          SilentCorruption: the bits differ, and not because of how the collectives are wired.
        """
        with jax.transfer_guard("allow"):  # a few digests come to the host
            self._here = self._here or _Program(self._setup, self._setup.mesh)
            first, shape = self._here(state, batch), batch.tokens.shape
            alike = self._alike.get(shape)
            if self._setup.mesh.size == 1 or alike is False:
                self._judge(first, self._here(state, batch), step, where="on the same devices")
                return
            self._there = self._there or _Program(self._setup, turned(self._setup.mesh))
            other = self._there(state, batch)
            if not _differing(first, other):
                self._alike[shape] = True
                return
            self._judge(first, self._here(state, batch), step, where="on the same devices")
            self._judge(other, self._there(state, batch), step, where="on the devices beside them")
        if alike:
            raise SilentCorruption(
                f"audit after step {step}: {_named(_differing(first, other))} come out differently on the devices "
                "beside those that compute them, the same each time, and did not before: a device of this run has "
                "begun to compute wrongly. Run the vendor's diagnostics; the run goes on from a checkpoint without it"
            )
        self._alike[shape] = False
        self._log(
            "audit: on these devices sums depend on the placement; audits compare two executions on the same devices"
        )

    def _judge(self, one: dict[str, Any], other: dict[str, Any], step: int, *, where: str) -> None:
        if differing := _differing(one, other):
            raise SilentCorruption(
                f"audit after step {step}: two executions of one microbatch {where} give other bits in "
                f"{_named(differing)}: a device computes wrongly, now and then. Run the vendor's diagnostics on the "
                "hosts of this run; it goes on from a checkpoint without them"
            )


class _Program:
    """(state, batch) -> the digest of the loss and of each gradient of a microbatch, computed on a mesh."""

    def __init__(self, setup: Setup, mesh: Mesh):
        self._count = setup.config.train.accumulation
        pipelined = setup.config.parallel.pipeline > 1  # whose microbatches are computed together
        self._cut = not pipelined
        train = dataclasses.replace(setup.config.train, accumulation=1 if self._cut else self._count)
        own = make_setup(dataclasses.replace(setup.config, train=train), mesh)
        self._shardings = own.shardings
        self._batch = named_sharding(mesh, ("batch", "seq"))

        def digests(params: dict[str, Any], batch: Batch, scale: jax.Array) -> dict[str, jax.Array]:
            # The gradients as they are: of two that the guard refuses, what it leaves is the same.
            terms, grads, _ = own.gradients(params, batch, scale)
            found = {"the loss": terms["loss"], **array_paths(grads)}
            return {path: digest_array(_one_nan(x)) for path, x in found.items()}

        self._digests = jax.jit(digests, out_shardings=named_sharding(mesh, ()))
        self._compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}  # by batch shape

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, np.ndarray]:
        count, shape = self._count if self._cut else 1, batch.tokens.shape
        places = (self._shardings.params, jax.tree.map(lambda _: self._batch, batch), self._shardings.scale.scale)
        if shape not in self._compiled:  # before anything that is computed together
            rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // count, *x.shape[1:]), x.dtype), batch)
            given = jax.tree.map(_placed, (state.params, rows, state.scale.scale), places)
            self._compiled[shape] = self._digests.lower(*given).compile()
            meet("audit")
        if count > 1:
            batch = jax.tree.map(lambda x: jax.device_put(first_of(x, count), x.sharding), batch)
        return jax.device_get(self._compiled[shape](*jax.device_put((state.params, batch, state.scale.scale), places)))


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def first_of(x: jax.Array, count: int) -> jax.Array:
    """The rows (B / count, S) of the first of `count` microbatches."""
    return x.reshape(-1, count, *x.shape[1:])[:, 0]


def turned(mesh: Mesh) -> Mesh:
    """The mesh in which each device has the place of the one before it."""
    devices = np.roll(mesh.devices.ravel(), 1).reshape(mesh.devices.shape)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def _one_nan(x: jax.Array) -> jax.Array:
    """The array with the same bits for every nan: which of them a sum leaves depends on the order of its terms."""
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def _differing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    return [path for path in one if not np.array_equal(one[path], other[path])]


def _named(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{', '.join(paths[:_SHOWN])}{more}"
