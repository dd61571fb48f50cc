"""Everything that follows from a config and a mesh before the first step: model, optimizer, shardings, programs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxlm.chips import chip_of_kind
from maxlm.cluster import meet
from maxlm.compilation import compiler_options, longest_block
from maxlm.config import Config, OptimConfig
from maxlm.data.batch import Batch
from maxlm.kernels import grouped
from maxlm.kernels.attention import AttentionFn, choose, dispatch
from maxlm.kernels.bits import is_narrow
from maxlm.model.decoder import ModelParts, split_model
from maxlm.model.rotary import pays_by_products
from maxlm.model.runtime import Runtime
from maxlm.optim.optimizers import Optimizer, make_optimizer
from maxlm.optim.schedules import Rates, make_rates
from maxlm.parallel.context import arrange, choose_method, context_attention
from maxlm.parallel.experts import sharded_experts
from maxlm.parallel.islands import sharded_attention, sharded_lookup
from maxlm.parallel.loss import sharded_loss
from maxlm.parallel.pipeline.branches import refuse_permutes_in_branches
from maxlm.parallel.sharding import constrainer, named_sharding, shards
from maxlm.train.pipeline import make_pipeline
from maxlm.train.state import TrainState, abstract_state, state_shardings
from maxlm.train.step import (
    GradientsFn,
    Metrics,
    TrainStep,
    WatchFn,
    make_gradients,
    make_train_step,
    separates_documents,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step with the rates of its run, which it is called with."""

    compiled: jax.stages.Compiled
    rates: Rates

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The next state, and what `make_train_step` says of the step; the state that is given is donated."""
        return self.compiled(state, batch, self.rates)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the loop, the planner and the bench all start from. Nothing here has touched a parameter yet."""

    config: Config
    mesh: Mesh
    parts: ModelParts
    optimizer: Optimizer
    runtime: Runtime  # of training
    eval_runtime: Runtime
    attention: str  # the name of the attention back end that was chosen
    shardings: TrainState
    gradients: GradientsFn  # of the step
    train_step: TrainStep
    executables: dict[tuple[int, int], jax.stages.Compiled] = dataclasses.field(default_factory=dict)  # by batch shape

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.config, self.optimizer, self.shardings)

    def lower(self, rows: int, positions: int) -> jax.stages.Lowered:
        """The step for a global batch (rows, positions), traced and not compiled; the state it is given is donated."""
        replicated = named_sharding(self.mesh, ())
        jitted = jax.jit(self.train_step, donate_argnums=0, out_shardings=(self.shardings, replicated))
        rates = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), self.rates())
        return jitted.lower(self.abstract_state(), abstract_batch(self.mesh, rows, positions), rates)

    def rates(self) -> Rates:
        """The numbers of the run's schedule, on this machine."""
        return make_rates(self.config.optim, self.config.train.steps)

    def with_steps(self, steps: int) -> Setup:
        """That of a run of so many steps, with no time to measure any more: what is compiled serves both."""
        train = dataclasses.replace(self.config.train, steps=steps, budget_seconds=0.0)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, train=train))

    def compile(self, rows: int, positions: int, *, log: Callable[[str], None] | None = None) -> Program:
        """The step, compiled when it is first asked for, with the options that do its chip good.

        Every process asks for the same shapes in the same order: they wait for each other here.

        Args:
          log: is told, when it is compiled, how long that took and what memory it needs.

        Raises:
          RuntimeError: on CPU devices, if the program would hang (`refuse_permutes_in_branches`).
        """
        shape = (rows, positions)
        if shape not in self.executables:
            began = time.perf_counter()
            self.executables[shape] = self._executable(rows, positions)
            meet("compiled")
            if log:
                log(f"compiled the step for {rows} x {positions} tokens in {time.perf_counter() - began:.1f} s")
                log(memory_line(self.executables[shape]))
        replicated = named_sharding(self.mesh, ())

        def place(number: Any) -> jax.Array:
            return jax.make_array_from_callback((), replicated, lambda _: number)

        return Program(self.executables[shape], jax.tree.map(place, self.rates()))

    def _executable(self, rows: int, positions: int) -> jax.stages.Compiled:
        first = self.mesh.devices.flat[0]
        chip = chip_of_kind(first.device_kind)
        accumulation = self.config.train.accumulation
        options: dict[str, str | bool] = {**compiler_options(chip, accumulation=accumulation)} if chip else {}
        compiled = self.lower(rows, positions).compile(options or None)
        if self.mesh.shape["pipeline"] > 1 and first.platform == "cpu":
            refuse_permutes_in_branches(compiled.as_text() or "")
        return compiled


def make_runtime(
    config: Config, mesh: Mesh, *, segments: bool, experts_limited: bool = False, training: bool = False
) -> tuple[Runtime, str]:
    """How the model is run on this mesh, and the name of its attention back end.

    Args:
      segments: whether rows hold several documents that must not see each other.
      experts_limited: as of `Runtime`.
      training: whether it is compiled with the options of a training step.
    """
    attend, name = _make_attention(config, mesh, segments=segments, training=training)
    devices = mesh.shape["context"]
    # Where no devices share the batch's positions nothing is added up, and nothing is to be rounded for it.
    together = shards(mesh, "batch") * shards(mesh, "seq") > 1
    reduced = jnp.dtype(config.train.reduce_dtype if together else "float32")
    outermost = outermost_label(config.model.embed_dim, mesh, reduced)
    platform = mesh.devices.flat[0].platform
    backend = grouped.choose(platform, config.train.precision)
    runtime = Runtime(
        dtype=jnp.dtype(config.train.precision),
        reduce_dtype=reduced,
        outermost=outermost,
        constrain=constrainer(mesh),
        lookup=sharded_lookup(mesh, reduce_dtype=reduced, pieces=bool(outermost)),
        attend=attend,
        arrange=functools.partial(arrange, devices=devices),
        experts=sharded_experts(backend, mesh, reduce_dtype=reduced),
        spread_loss=sharded_loss(mesh, reduce_dtype=reduced),
        experts_limited=experts_limited,
        remat=config.train.remat,
        turn_by_products=pays_by_products(platform, config.train.precision),
        keep_integers=platform == "cpu" and is_narrow(config.train.precision),
    )
    return runtime, name


def outermost_label(width: int, mesh: Mesh, reduced: Any) -> str:
    """`Runtime.outermost`: the model's width, where XLA:TPU would else sum whole gradients up on every device; that of
    the table is then scattered in pieces (`collectives.scatter`).

    Sums in 16 bits it scatters along the last dim if every device gets 256 of it, or a multiple; of less it makes an
    all-reduce, with twice the bytes (as of libtpu 0.0.48; in float32 it does not).
    """
    narrow = mesh.devices.flat[0].platform == "tpu" and jnp.dtype(reduced).itemsize == 2
    return "d" if narrow and mesh.shape["fsdp"] > 1 and (width // mesh.shape["fsdp"]) % 256 else ""


def _make_attention(config: Config, mesh: Mesh, *, segments: bool, training: bool) -> tuple[AttentionFn, str]:
    """The attention of this mesh, and its name; that of several back ends where layers or phases differ."""
    attention, platform = config.model.attention, mesh.devices.flat[0].platform
    devices, method = mesh.shape["context"], config.parallel.context_method
    if devices > 1:
        # In a pipeline stages take different branches, in which a permute deadlocks on a CPU (and is risky elsewhere).
        if config.parallel.pipeline > 1:
            method = "gather"
        chosen = choose_method(method, devices=devices, q_heads=attention.q_heads, kv_heads=attention.kv_heads)
        return context_attention(mesh, method=method, together=platform != "cpu"), f"chunked {chosen}"
    names: dict[str, None] = {}
    lengths = [config.data.sequence_length, *(phase.sequence_length for phase in config.data.phases.values())]
    for window, length in itertools.product(attention.windows, filter(None, lengths)):
        backend = choose(
            platform=platform,
            dtype=jnp.dtype(config.train.precision),
            head_dim=attention.head_dim,
            needs=attention_needs(config, window=window, segments=segments),
            queries=length,
            keys=length,
        )
        names[backend.name] = None
    chip = chip_of_kind(mesh.devices.flat[0].device_kind) if training else None
    kernel = dispatch(platform, longest_block=longest_block(chip, config.train.precision))
    return sharded_attention(kernel, mesh), " and ".join(names)


def attention_needs(config: Config, *, window: int, segments: bool) -> frozenset[str]:
    """What a layer with this window asks of an attention back end (`kernels.attention.FEATURES`)."""
    attention = config.model.attention
    asked = {
        "segments": segments,
        "windows": bool(window),
        "softcap": bool(attention.softcap),
        "sinks": attention.sinks,
        "alibi": attention.alibi,
        "value_dim": attention.value_dim != attention.head_dim,
    }
    return frozenset(name for name, wanted in asked.items() if wanted)


def make_setup(
    config: Config,
    mesh: Mesh,
    *,
    make_optimizer: Callable[[OptimConfig, dict[str, Any]], Any] = make_optimizer,
    runtime: Runtime | None = None,
    watch: WatchFn | None = None,
) -> Setup:
    """The setup of a resolved config on a mesh; another optimizer or training runtime may take the config's place.

    Args:
      watch: as of `make_train_step`.
    """
    parts = split_model(config.model)
    optimizer = make_optimizer(config.optim, parts.specs)
    own_runtime, backend = make_runtime(
        config,
        mesh,
        segments=separates_documents(config.data),
        experts_limited=bool(config.model.moe.capacity_factor),
        training=True,
    )
    runtime = runtime or own_runtime
    pipeline = make_pipeline(config, parts, runtime, mesh)
    eval_runtime, _ = make_runtime(config, mesh, segments=True)  # several windows share a row
    return Setup(
        config=config,
        mesh=mesh,
        parts=parts,
        optimizer=optimizer,
        runtime=runtime,
        eval_runtime=eval_runtime,
        attention=backend,
        shardings=state_shardings(config, parts, optimizer, mesh),
        gradients=make_gradients(config, parts, runtime, pipeline=pipeline),
        train_step=make_train_step(config, parts, optimizer, runtime, pipeline=pipeline, watch=watch),
    )


def abstract_batch(mesh: Mesh, rows: int, positions: int) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    sharding = named_sharding(mesh, ("batch", "seq"))
    ints = jax.ShapeDtypeStruct((rows, positions), jnp.int32, sharding=sharding)
    floats = jax.ShapeDtypeStruct((rows, positions), jnp.float32, sharding=sharding)
    return Batch(tokens=ints, targets=ints, segments=ints, positions=ints, weights=floats)


def place_batch(mesh: Mesh, shape: tuple[int, int], read: Callable[[slice], Batch]) -> Batch:
    """A global batch on the mesh, of which this process reads only the rows of its own devices.

    Args:
      shape: (rows, positions) of the global batch.
      read: gives the rows of a slice as NumPy arrays.
    """
    sharding = named_sharding(mesh, ("batch", "seq"))
    indices = [index for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
    spans = [index[0].indices(shape[0])[:2] for index in indices]
    start, stop = min(s for s, _ in spans), max(s for _, s in spans)
    local = read(slice(start, stop))

    def put(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            return array[first - start : last - start, index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, local)


def memory_line(compiled: jax.stages.Compiled) -> str:
    """What a device holds while a step runs, as the compiler has planned it."""
    analysis: Any = compiled.memory_analysis()
    if analysis is None:
        return "memory a device: this compiler does not say"
    mib = 1 / 2**20
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return (
        f"memory a device: {held * mib:,.1f} MiB state, batch and metrics, "
        f"{analysis.temp_size_in_bytes * mib:,.1f} MiB temporaries, "
        f"{(held + analysis.temp_size_in_bytes) * mib:,.1f} MiB in all"
    )
