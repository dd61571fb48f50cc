"""What a run carries from step to step, as a plain pytree, and how it starts out sharded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm import tree
from maxlm.config import Config
from maxlm.model.decoder import ModelParts, init_params, split_model
from maxlm.optim import guard, scaling
from maxlm.optim.optimizers import Optimizer
from maxlm.parallel.sharding import named_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds; every leaf is an array.

    step: batches consumed, int32 (); drives data and schedule.
    updates: steps whose update was applied, int32 ().
    params: nested dict of float32 arrays.
    opt_state: the optimizer's own.
    average: moving average of params, same tree; {} when there is none.
    guard: what the guard judges by.
    scale: dynamic loss scale; of interest under float16 only.
    """

    step: jax.Array
    updates: jax.Array
    params: dict[str, Any]
    opt_state: Any
    average: dict[str, Any]
    guard: guard.GuardState
    scale: scaling.ScaleState

    def evaluated(self) -> dict[str, Any]:
        """The parameters that are evaluated and sampled from: the average where there is one."""
        return self.average or self.params


def initial_state(config: Config, optimizer: Optimizer, params: dict[str, Any]) -> TrainState:
    """The state at step 0 with these parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if config.optim.ema_decay else {},
        guard=guard.init_guard(config.optim.guard),
        scale=scaling.init_scale(config.train.precision),
    )


def abstract_shapes(config: Config, optimizer: Optimizer) -> TrainState:
    """Shapes and dtypes of the state, without computing anything."""
    specs = split_model(config.model).specs
    params = tree.map_paths(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
    return jax.eval_shape(lambda params: initial_state(config, optimizer, params=params), params)


def state_shardings(config: Config, parts: ModelParts, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """The sharding of every leaf of the state, derived from the declarations of the parameters."""
    abstract = abstract_shapes(config, optimizer)
    params = tree.map_paths(lambda _, spec: named_sharding(mesh, spec.logical), parts.specs)
    replicated = named_sharding(mesh, ())
    place: Any = TrainState  # its fields hold shardings here
    return place(
        step=replicated,
        updates=replicated,
        params=params,
        opt_state=optimizer.shardings(abstract.opt_state, lambda logical: named_sharding(mesh, logical)),
        average=params if config.optim.ema_decay else {},
        guard=jax.tree.map(lambda _: replicated, abstract.guard),
        scale=jax.tree.map(lambda _: replicated, abstract.scale),
    )


def abstract_state(config: Config, optimizer: Optimizer, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a restore is asked for."""

    def place(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(place, abstract_shapes(config, optimizer), shardings)


def make_state(
    config: Config, optimizer: Optimizer, shardings: TrainState, params: dict[str, Any] | None = None
) -> TrainState:
    """The state at step 0, made in place on the devices that hold it.

    Args:
      params: to begin with, donated; None: a pure function of the config's seed, whatever the mesh.
    """
    program = lower_start(config, optimizer, shardings, params)
    on_cpu = jax.tree.leaves(shardings)[0].mesh.devices.flat[0].platform == "cpu"
    # A program of random numbers that runs once: at this level it compiles in half the time to the same bits.
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}
    return program.compile(options if on_cpu else None)(params, _key_words(config.seed))


def lower_start(
    config: Config, optimizer: Optimizer, shardings: TrainState, params: dict[str, Any] | None = None
) -> jax.stages.Lowered:
    """The program of `make_state`, traced: of parameters to begin with or None, and of the words of the seed's key,
    an operand, so that runs with other seeds share it."""

    def start(params: dict[str, Any] | None, key_words: jax.Array) -> TrainState:
        drawn = params or init_params(config.model, jax.random.wrap_key_data(key_words))
        return initial_state(config, optimizer, drawn)

    jitted = jax.jit(start, out_shardings=shardings, donate_argnums=0)
    return jitted.lower(params, _key_words(config.seed))


def _key_words(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def as_configured(state: TrainState, config: Config, metadata: Mapping[str, Any]) -> TrainState:
    """A restored state as the config wants it: the loss scale of another precision means nothing here.

    Args:
      metadata: of the checkpoint that it comes from.
    """
    if metadata["config"]["train"]["precision"] == config.train.precision:
        return state
    sharding = state.scale.scale.sharding
    return dataclasses.replace(state, scale=jax.device_put(scaling.init_scale(config.train.precision), sharding))
