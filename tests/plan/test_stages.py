"""What is predicted of a pipeline: a tick is one unit of a stage, though the program has a branch for every kind."""

import dataclasses

import jax
import pytest

from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.pipeline.schedule import COSTS, NAMES, build, report
from maxlm.plan import collectives, hlo, stages
from maxlm.plan.analytic import timing
from maxlm.plan.analytic.memory import state_leaves
from maxlm.plan.analytic.walk import KINDS
from maxlm.plan.plan import make_plan
from maxlm.plan.topology import parse_topology
from maxlm.resolve import resolve
from maxlm.train.setup import make_setup
from tests.plan.test_plan import fake_step, tiny

MICROBATCHES, LAYERS = 4, 4
TOPOLOGY = parse_topology("v5p:2x2x2")
# On which products take the time of their FLOPs: at these sizes their bytes would be most of it.
QUICK = dataclasses.replace(TOPOLOGY, chip=dataclasses.replace(TOPOLOGY.chip, hbm_bandwidth=1e18))
PLACES = tuple((0, x, y, z) for x in range(2) for y in range(2) for z in range(2))


def config(**parallel):
    given = tiny(data=8)
    return resolve(
        dataclasses.replace(
            given,
            model=dataclasses.replace(given.model, num_layers=LAYERS),
            data=dataclasses.replace(given.data, batch_size=8 * MICROBATCHES),
            train=dataclasses.replace(given.train, accumulation=MICROBATCHES, remat="none"),
            parallel=dataclasses.replace(given.parallel, **parallel),
        ),
        devices=8,
    )


def program(given):
    """Compiled anew: JAX's cache gives what another version of the code named otherwise."""
    mesh = make_mesh(given.parallel)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        setup = make_setup(given, mesh)
        return setup.lower(given.data.batch_size, given.data.sequence_length).compile().as_text()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def planned(given, text):
    step = fake_step(mesh=given.parallel.sizes, places=PLACES)
    return make_plan(given, QUICK, dataclasses.replace(step, program=text))


@pytest.fixture(scope="module")
def unpiped():
    """A step without a pipeline: (config, program)."""
    given = config(data=2, fsdp=4)
    return given, program(given)


def test_gradients_are_summed_over_the_mesh_once_for_each_microbatch(unpiped):
    given, text = unpiped
    sent = [c for c in collectives.find(hlo.parse(text), given.parallel.sizes) if "data" in c.axes]
    assert {c.kind for c in sent} == {"all-reduce"}
    state = state_leaves(given.model, given.optim)
    # Norms are summed over `data` and `fsdp` together, whole.
    once = timing._summed(given, state, "data")
    assert sum(c.times * c.payload for c in sent) == pytest.approx(MICROBATCHES * once, rel=0.03)

    def waited(accumulation):
        train = dataclasses.replace(given.train, accumulation=accumulation)
        nothing = dict.fromkeys(KINDS, 0.0)
        return timing._network(dataclasses.replace(given, train=train), TOPOLOGY, nothing, state=state, hidden=0.0)[
            "data"
        ]

    assert waited(MICROBATCHES) == pytest.approx(MICROBATCHES * waited(1))


def test_a_pipelines_step_costs_the_work_of_one_without_and_the_bubble(unpiped):
    piped = config(data=1, fsdp=2, pipeline=4)
    text = program(piped)
    alone, staged = planned(*unpiped).forecast, planned(piped, text).forecast
    assert staged.compiled_flops == pytest.approx(alone.compiled_flops, rel=0.01)
    found = report(stages.table_of(piped))
    # The last stage's head makes its ticks longer than the others', here by the products of about one layer.
    least = alone.parts["products"] / (1 - found.bubble)
    assert 0.99 * least < staged.parts["products"] < 1.6 * least
    sent = collectives.find(stages.weighted(hlo.parse(text), piped), piped.parallel.sizes)
    ticks = len(stages.table_of(piped).ticks)
    assert {c.times for c in sent if c.axes == ("pipeline",) and "hand_over" in c.op_name} == {ticks}
    layers = {c.times for c in sent if "/weight_backward/while/" in c.op_name}
    assert layers == {MICROBATCHES * LAYERS / 4}
    # Head and loss are on the last stage alone: of four, the average one has a quarter of them.
    head = {c.times for c in sent if "/last_chunk/" in c.op_name and "while" not in c.op_name.split("/last_chunk/")[1]}
    assert head == {MICROBATCHES / 4}


@pytest.mark.parametrize("name", NAMES)
def test_the_slowest_of_every_tick_make_the_schedules_time(name):
    table = build(name, stages=4, microbatches=8, virtual=2 if name == "interleaved" else 1)
    parts = stages.parts(table, lambda place: COSTS[place.unit] / table.virtual)
    ticks = len(table.ticks)
    time = sum(part.slowest * ticks * COSTS[place.unit] / table.virtual for place, part in parts.items())
    assert time == pytest.approx(report(table).makespan)
    assert sum(part.average for part in parts.values()) * ticks * 4 == pytest.approx(len(list(table.cells())))
    # What only the last chunk does is waited for wherever it is the dearest.
    heavy = stages.parts(table, lambda place: COSTS[place.unit] + 100 * place.last)
    assert sum(part.slowest for place, part in heavy.items() if place.last) > 0.2
