"""The pipeline against the plain step on one device: loss, every gradient, what was executed, FLOPs, memory, size."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import Config, MoeConfig, ParallelConfig, RopeConfig
from maxlm.data.batch import Batch
from maxlm.jaxpr import subprograms
from maxlm.model import moe
from maxlm.model.decoder import init_params, longest_row, merge, split_model
from maxlm.model.flops import count_matmul_flops
from maxlm.model.runtime import Runtime
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.pipeline import executor
from maxlm.parallel.pipeline.branches import refuse_permutes_in_branches
from maxlm.parallel.pipeline.executor import PipelineOut
from maxlm.parallel.pipeline.schedule import Unit
from maxlm.parallel.pipeline.split import split_layer
from maxlm.parallel.sharding import named_sharding
from maxlm.resolve import resolve
from maxlm.train.pipeline import make_pipeline, plan
from maxlm.train.setup import make_runtime
from maxlm.train.step import head_loss
from tests.tiny import tiny_config

MICROBATCHES, ROWS, POSITIONS, LAYERS = 4, 2, 32, 4
SCALE = 8.0  # a loss scale, which has to reach every gradient once
# Rows of some microbatches are no longer than the original length; those of the batch are.
LONGROPE = RopeConfig(
    scaling="longrope", factor=4.0, original_length=24, short_factors=(1.0,) * 8, long_factors=(1.5,) * 4 + (4.0,) * 4
)


def config_of(parallel: ParallelConfig, **leaves) -> Config:
    leaves = {"train__accumulation": MICROBATCHES, "model__num_layers": LAYERS, **leaves}
    config = tiny_config("unused", parallel=parallel, **leaves)
    rows = config.train.accumulation * ROWS
    return resolve(dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows)))


def micros_of(count: int = MICROBATCHES) -> Batch:
    """Microbatches (A, B, S) of rows of two documents, which differ in how many positions bear loss."""
    rng = np.random.default_rng(0)
    shape = (count, ROWS, POSITIONS)
    tokens = rng.integers(1, 264, (*shape[:2], POSITIONS + 1), dtype=np.int32)
    places, cut = np.arange(POSITIONS), rng.integers(3, POSITIONS - 3, (*shape[:2], 1))
    after = places >= cut
    return Batch(
        tokens[..., :-1],
        tokens[..., 1:],
        1 + after.astype(np.int32),
        np.where(after, places - cut, places).astype(np.int32),
        (rng.random(shape) < 0.8).astype(np.float32),
    )


def plain(config: Config, params: dict, micros: Batch):
    """The sum over microbatches with nothing but `jax.value_and_grad`, on one device."""
    runtime, graphdef = Runtime(remat=config.train.remat), split_model(config.model).graphdef
    denominator, longest = micros.weights.sum(), longest_row(micros.positions)

    def loss(params, micro):
        model = merge(graphdef, params)
        rows = {"positions_BS": micro.positions, "segments_BS": micro.segments, "longest": longest}
        out = model.hidden(micro.tokens, **rows, runtime=runtime)
        total, terms = head_loss(config, model, out.hidden_BSD, micro, denominator=denominator, runtime=runtime)
        aux = moe.auxiliary_losses(config.model.moe, out.aux, rows=micros.tokens.shape[0] * micros.tokens.shape[1])
        return (total + aux.total) * SCALE, terms | {"experts": aux.terms, "activations": out.norms}

    def add(total, micro):
        (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
        return jax.tree.map(jnp.add, total, (terms, grads)), None

    shapes = jax.eval_shape(
        lambda: jax.value_and_grad(loss, has_aux=True)(params, jax.tree.map(lambda x: x[0], micros))
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
    return jax.lax.scan(add, zeros, micros)[0]


@functools.cache
def expected(**leaves):
    config = config_of(ParallelConfig(data=1), **{"train__accumulation": MICROBATCHES, **leaves})
    params = init_params(config.model, jax.random.key(1))
    device = jax.devices()[0]
    with jax.default_device(device):
        return jax.device_get(jax.jit(functools.partial(plain, config))(params, micros_of()))


class Piped:
    """A config's pipeline, traced and compiled on its mesh."""

    def __init__(self, parallel: ParallelConfig, **leaves):
        self.config = config_of(parallel, **leaves)
        self.mesh = make_mesh(self.config.parallel)
        self.plan = plan(self.config)
        parts = split_model(self.config.model)
        runtime, _ = make_runtime(self.config, self.mesh, segments=True)
        pipeline = make_pipeline(self.config, parts, runtime, self.mesh)
        assert pipeline is not None
        self.shardings = tree.map_paths(lambda _, spec: named_sharding(self.mesh, spec.logical), parts.specs)
        self.batch_sharding = named_sharding(self.mesh, (None, "batch", "seq"))

        def run(params, micros, rows):
            # As the step does with the whole batch: the order of positions that the context axis asks for.
            flat = jax.tree.map(lambda x: x.reshape(-1, POSITIONS), micros)
            micros = jax.tree.map(lambda x, y: y.reshape(x.shape), micros, runtime.arrange(flat))
            longest = longest_row(micros.positions)
            return pipeline.run(
                params, micros, rows, denominator=micros.weights.sum(), scale=jnp.float32(SCALE), longest=longest
            )

        self.run = run
        self.specs = parts.specs

    def abstract(self):
        def place(spec, sharding):
            return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

        micros = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.batch_sharding),
            micros_of(self.config.train.accumulation),
        )
        params = tree.map_paths(lambda _, spec, sharding: place(spec, sharding), self.specs, self.shardings)
        return params, micros, jax.tree.map(jnp.asarray, self.plan.slots.rows)

    @functools.cached_property
    def compiled(self):
        grads = PipelineOut(None, None, *self._places(), None)
        return jax.jit(self.run, out_shardings=grads).lower(*self.abstract()).compile()

    def _places(self):
        outer = {name: value for name, value in self.shardings.items() if name != "layers"}
        return outer, self.shardings["layers"]

    def __call__(self, rows=None) -> PipelineOut:
        params = jax.device_put(init_params(self.config.model, jax.random.key(1)), self.shardings)
        micros = jax.device_put(micros_of(self.config.train.accumulation), self.batch_sharding)
        rows = jax.tree.map(jnp.asarray, self.plan.slots.rows if rows is None else rows)
        return jax.device_get(self.compiled(params, micros, rows))


def worst(found: PipelineOut, wanted: dict) -> float:
    """Largest ||difference|| over what is allowed: 1e-4 ||g|| + 1e-7 ||all g||, as some true gradients are zero."""
    grads, wanted = tree.paths(found.outer | {"layers": found.layers}), tree.paths(wanted)
    assert grads.keys() == wanted.keys()
    total = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in wanted.values()))
    return max(
        np.linalg.norm((grads[path] - g).ravel()) / (1e-4 * np.linalg.norm(g.ravel()) + 1e-7 * total)
        for path, g in wanted.items()
    )


CASES = {
    "gpipe": (dict(pipeline=4, fsdp=2, pipeline_schedule="gpipe"), {}),
    "1f1b": (
        dict(pipeline=2, fsdp=2, tensor=2, pipeline_schedule="1f1b"),
        {"model__tie_embeddings": True, "model__attention__windows": (7, 0), "model__rope": LONGROPE},
    ),
    "interleaved": (
        dict(pipeline=2, fsdp=2, tensor=2, pipeline_schedule="interleaved", virtual_stages=2),
        {"train__remat": "full"},
    ),
    "zero_bubble": (dict(pipeline=4, tensor=2, pipeline_schedule="zero_bubble"), {}),
}
EXPERTS = MoeConfig(experts=4, active=2, dim=24, router_z_loss=0.01, shared_dim=16)
GATHERED = dict(pipeline=2, fsdp=2, tensor=2, pipeline_schedule="zero_bubble")
MORE = {
    "experts": (dict(pipeline=2, expert=2, tensor=2, pipeline_schedule="zero_bubble"), {"model__moe": EXPERTS}),
    "experts over fsdp": (GATHERED, {"model__moe": EXPERTS, "train__remat": "full"}),
    "context": (dict(pipeline=2, context=2, tensor=2, pipeline_schedule="1f1b"), {}),
    "gpipe of 2": (dict(pipeline=2, tensor=4, pipeline_schedule="gpipe"), {"model__attention__kv_heads": 4}),
    "1f1b of 4": (dict(pipeline=4, fsdp=2, pipeline_schedule="1f1b"), {"train__remat": "matmuls"}),
    "interleaved of 4": (
        dict(pipeline=4, tensor=2, pipeline_schedule="interleaved", virtual_stages=2),
        {"model__num_layers": 8},
    ),
    "zero_bubble of 2": (dict(pipeline=2, fsdp=2, tensor=2, pipeline_schedule="zero_bubble"), {"train__remat": "full"}),
}
RUN = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@functools.cache
def piped(name: str) -> Piped:
    parallel, leaves = (CASES | MORE)[name]
    return Piped(ParallelConfig(data=1, **parallel), **leaves)


@pytest.mark.parametrize("name", RUN)
def test_loss_gradients_and_norms_equal_one_devices(name):
    found = piped(name)()
    model = {path: value for path, value in (CASES | MORE)[name][1].items() if path.startswith("model")}
    terms, grads = expected(**model)
    np.testing.assert_allclose(found.terms["loss"], terms["loss"], rtol=1e-5)
    assert worst(found, grads) < 1
    rms, aux = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found.watched)
    np.testing.assert_allclose(rms, terms["activations"]["residual"], rtol=1e-5)
    if aux:
        np.testing.assert_array_equal(aux["load"], terms["experts"]["load"])


@pytest.mark.parametrize("name", RUN)
def test_what_was_executed_is_what_the_table_says(name):
    """The first column is written by the unit that ran, inside its branch of the conditional."""
    schedule, executed = piped(name).plan.schedule, piped(name)().executed
    table = np.zeros_like(executed)
    for tick, stage, cell in schedule.cells():
        table[tick, stage] = cell
    assert np.array_equal(executed[..., 0], table[..., 0])
    ran = executed[..., 0] != Unit.IDLE
    assert np.array_equal(executed[ran], table[ran])
    assert ((~ran).sum(axis=0) == [column.count(None) for column in zip(*schedule.ticks, strict=True)]).all()


def test_some_microbatches_alone_would_have_taken_the_short_factors():
    longest = [int(longest_row(jnp.asarray(rows))) for rows in micros_of().positions]
    assert min(longest) <= LONGROPE.original_length < max(longest)


def test_planted_bugs_are_caught():
    """A weight's part that is dropped, and activations of another microbatch, each break many gradients."""
    one = piped("zero_bubble")
    _, grads = expected()
    rows = one.plan.slots.rows
    dropped = rows.unit.copy()
    tick, stage = np.argwhere(dropped == Unit.WEIGHT)[5]
    dropped[tick, stage] = Unit.IDLE
    found = one(rows._replace(unit=dropped))
    assert worst(found, grads) > 100
    assert found.executed[tick, stage, 0] == Unit.IDLE
    assert worst(one(rows._replace(kept=np.zeros_like(rows.kept))), grads) > 100
    assert worst(one(rows._replace(pair=np.zeros_like(rows.pair))), grads) > 100


def branches_of(one: Piped):
    """The traced program of every unit that the schedule has."""
    params, micros, rows = one.abstract()
    traced = jax.make_jaxpr(one.run)(params, micros, rows)
    (island,) = [e for e in equations(traced.jaxpr) if e.primitive.name == "shard_map" and "pipeline" in str(e.params)]
    ticks = next(
        e for e in island.params["jaxpr"].eqns if e.primitive.name == "scan" and e.params["length"] == len(rows.unit)
    )
    branches = [e.params["branches"][1] for e in ticks.params["jaxpr"].jaxpr.eqns if e.primitive.name == "cond"]
    used = sorted({cell.unit for _, _, cell in one.plan.schedule.cells()})
    return dict(zip(used, branches, strict=True))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero_bubble", "experts"])
def test_executed_products_are_those_of_the_plain_step(name, remat):
    """FLOPs of every unit's branch, times how often the table has it; head and loss on the last chunk alone."""
    parallel = GATHERED if name == "experts" else CASES[name][0]
    leaves = {"model__moe": EXPERTS} if name == "experts" else {}
    one = Piped(ParallelConfig(data=1, **parallel), train__remat=remat, **leaves)
    params, micros, _ = one.abstract()
    schedule, total = one.plan.schedule, 0
    for unit, branch in branches_of(one).items():
        often = sum(cell.unit == unit for _, _, cell in schedule.cells())
        ends = sum(count_matmul_flops(b) for e in branch.jaxpr.eqns if e.primitive.name == "cond"
                   for b in e.params["branches"])  # fmt: skip
        total += often * (count_matmul_flops(branch) - ends) + MICROBATCHES * ends
    wanted = count_matmul_flops(jax.make_jaxpr(functools.partial(plain, one.config))(params, micros))
    # The plain step runs `attention.plain`, whose scores are products of the same size as the CPU kernel's.
    assert total == pytest.approx(wanted, rel=0.05)


def equations(jaxpr, *, islands=False):
    for equation in jaxpr.eqns:
        yield equation
        if islands or equation.primitive.name != "shard_map":
            for inner in subprograms(equation.params):
                yield from equations(inner, islands=islands)


def test_experts_matrices_are_not_handed_on_and_their_gradients_wait_for_the_weight_unit(monkeypatch):
    """On a mesh that gathers them over fsdp, a microbatch keeps none, neither whole nor as they are."""
    found = []

    def recorded(*args):
        found.append(split_layer(*args))
        return found[-1]

    monkeypatch.setattr(executor, "split_layer", recorded)
    one = Piped(ParallelConfig(data=1, **GATHERED), model__moe=EXPERTS)
    units, embed = branches_of(one), one.config.model.embed_dim
    (split,) = found
    assert split.kept and split.pairs
    for shape in (*split.kept, *split.pairs):
        assert len(shape.shape) != 3 or set(shape.shape[1:]) not in ({embed, EXPERTS.dim}, {embed, EXPERTS.dim // 2})
    # Three matrices, one after the other in the scan over a stage's layers.
    names = {
        unit: [e.params.get("name") for e in equations(branch.jaxpr, islands=True) if "name" in e.params]
        for unit, branch in units.items()
    }
    counts = {unit: (of.count("grouped_rows"), of.count("grouped_outer")) for unit, of in names.items()}
    assert counts == {Unit.FORWARD: (3, 0), Unit.INPUT: (3, 0), Unit.WEIGHT: (0, 3)}


def compiled(name: str, *, microbatches: int, layers: int = 8):
    parallel = ParallelConfig(data=1, fsdp=2, pipeline=4, pipeline_schedule=name)
    return Piped(parallel, train__accumulation=microbatches, model__num_layers=layers).compiled


def test_memory_and_size_of_the_compiled_program():
    """1F1B holds as many microbatches as there are stages, however many there are; depth costs no instructions."""
    few, many, gpipe = (
        compiled("1f1b", microbatches=16),
        compiled("1f1b", microbatches=64),
        compiled("gpipe", microbatches=16),
    )
    held, longer, all_of_them = (c.memory_analysis().temp_size_in_bytes for c in (few, many, gpipe))
    assert held < 0.40 * all_of_them
    assert longer < 1.05 * held
    shallow, deep = (instructions(c.as_text()) for c in (few, compiled("1f1b", microbatches=16, layers=64)))
    assert abs(deep - shallow) <= 0.02 * shallow


def instructions(text: str) -> int:
    return len(re.findall(r"^\s+(?:ROOT )?%?\S+ = ", text, re.MULTILINE))


@pytest.mark.parametrize("name", RUN)
def test_no_permute_stands_in_a_branch(name):
    """A permute waits for every device, and in a tick stages do different things."""
    text = piped(name).compiled.as_text()
    assert " conditional(" in text and " collective-permute" in text
    refuse_permutes_in_branches(text)
