"""The step's model and loss in the parts that a pipeline places on its stages.

Shapes: A microbatches, B rows of a microbatch, S positions, L layers, c layers of a cycle of windows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from maxlm import tree
from maxlm.config import Config
from maxlm.data.batch import Batch
from maxlm.model import moe
from maxlm.model.attention import Sight
from maxlm.model.decoder import Decoder, ModelParts, merge
from maxlm.model.runtime import Runtime
from maxlm.model.stack import make_cycle
from maxlm.parallel.pipeline.executor import PipelineOut, Stages, pipelined
from maxlm.parallel.pipeline.schedule import Schedule, build
from maxlm.parallel.pipeline.slots import Row, Slots, assign
from maxlm.parallel.pipeline.split import LayerOut
from maxlm.train.step import Metrics, head_loss, separates_documents


class Plan(NamedTuple):
    """Who does what when, and where it is kept."""

    schedule: Schedule
    slots: Slots


def plan(config: Config) -> Plan:
    """The schedule of a resolved config."""
    parallel = config.parallel
    schedule = build(
        parallel.pipeline_schedule,
        stages=parallel.pipeline,
        microbatches=config.train.accumulation,
        virtual=parallel.virtual_stages,
    )
    return Plan(schedule, assign(schedule))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Gradients of a step whose layers are spread over stages; called by the step in place of accumulation."""

    config: Config
    parts: ModelParts
    runtime: Runtime
    mesh: Mesh
    plan: Plan

    def __call__(
        self, params: dict, micros: Batch, denominator: jax.Array, scale: jax.Array, longest: jax.Array
    ) -> tuple[Metrics, dict[str, Any]]:
        """Loss terms and gradients; arguments as of `run`."""
        rows = jax.tree.map(jnp.asarray, self.plan.slots.rows)
        out = self.run(params, micros, rows, denominator=denominator, scale=scale, longest=longest)
        # (cycles, layers of a cycle, ...), summed over microbatches
        rms, aux = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out.watched)
        rows_of_all = micros.tokens.shape[0] * micros.tokens.shape[1]
        terms = out.terms | {
            "experts": moe.auxiliary_losses(self.config.model.moe, aux, rows=rows_of_all).terms,
            "activations": {"residual": rms / self.plan.schedule.microbatches},
        }
        return terms, out.outer | {"layers": out.layers}

    def run(
        self, params: dict, micros: Batch, rows: Row, *, denominator: jax.Array, scale: jax.Array, longest: jax.Array
    ) -> PipelineOut:
        """All that the pipeline gives.

        Args:
          micros: (A, B, S) arrays.
          rows: of the plan's slots.
          denominator, scale: of the loss, () float32.
          longest: `longest_row` of the whole batch, () int32. In a stage's branch a maximum over devices would wait for
            stages that do something else.
        """

        def constrain(layers: dict[str, Any]) -> dict[str, Any]:
            specs = self.parts.specs["layers"]
            return tree.map_paths(lambda _, x, spec: self.runtime.constrain(x, spec.logical), layers, specs)

        run = pipelined(
            self.plan.schedule,
            self.plan.slots,
            make_stages(self.config, self.parts, self.runtime, denominator=denominator, scale=scale, longest=longest),
            mesh=self.mesh,
            cycle=len(self.config.model.attention.windows),
            constrain=constrain,
        )
        outer = {name: value for name, value in params.items() if name != "layers"}
        return run(outer, params["layers"], micros, rows)


def make_pipeline(config: Config, parts: ModelParts, runtime: Runtime, mesh: Mesh) -> Pipeline | None:
    """What the step calls for gradients; None if all layers are on one stage."""
    return Pipeline(config, parts, runtime, mesh, plan(config)) if config.parallel.pipeline > 1 else None


def make_stages(
    config: Config,
    parts: ModelParts,
    runtime: Runtime,
    *,
    denominator: jax.Array,
    scale: jax.Array,
    longest: jax.Array,
) -> Stages:
    """The parts; arguments as of the step's loss."""
    separate = separates_documents(config.data)
    layerless = {"layers": tree.map_paths(lambda _, spec: None, parts.specs["layers"])}

    def model(outer: dict) -> Decoder:
        return merge(parts.graphdef, outer | layerless)

    cycle_def = nnx.graphdef(model({name: specs for name, specs in parts.specs.items() if name != "layers"}).layers)

    def embed(outer: dict, micro: Batch) -> jax.Array:
        return model(outer).embed(micro.tokens, micro.positions, runtime=runtime)

    def layer(params: dict, x: jax.Array, micro: Batch) -> LayerOut:
        segments = micro.segments if separate else None
        sight = Sight(micro.positions, segments, segments, real=micro.segments > 0, longest=longest)
        cycle = make_cycle(cycle_def, sight=sight, windows=config.model.attention.windows, runtime=runtime)
        x, (rms, _, aux) = cycle(x, (params, None))
        rows = micro.tokens.shape[0] * config.train.accumulation
        return LayerOut(x, moe.auxiliary_losses(config.model.moe, aux, rows=rows).total * scale, (rms, aux))

    def head(outer: dict, x: jax.Array, micro: Batch) -> tuple[jax.Array, Metrics]:
        whole = model(outer)
        hidden = whole.finish(x, runtime=runtime)
        total, terms = head_loss(config, whole, hidden, micro, denominator=denominator, runtime=runtime)
        return total * scale, terms

    return Stages(embed, layer, head, pin=lambda x: runtime.constrain(x, ("batch", "residual", None)))
