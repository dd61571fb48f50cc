"""The step compiled by the TPU's own compiler. Needs libtpu (the extra `plan`), and no TPU."""

import dataclasses
import importlib.util
import re

import pytest

from maxlm.plan.compile import compile_step
from maxlm.plan.plan import make_plan
from maxlm.plan.topology import parse_topology
from tests.plan.test_plan import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed, so nothing here is proved; type: pip install 'maxlm[plan]'",
    ),
]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("plans"))
    config, topology = tiny(data=2, fsdp=4), parse_topology("v5e-8")
    step = compile_step(config, topology, cache=cache)
    assert compile_step(config, topology, cache=cache).cached
    return config, step, make_plan(config, topology, step)


def test_the_memory_is_what_the_compiler_reports(planned):
    _, step, plan = planned
    assert step.whole and not step.refused and plan.fits
    state = plan.memory.components["parameters"] + plan.memory.components["optimizer"]
    assert plan.memory.components["optimizer"] == pytest.approx(2 * plan.memory.components["parameters"], rel=0.05)
    # What is donated comes back as outputs; batch and metrics are small.
    assert state <= step.analysis["argument_size"] <= 1.1 * state
    # Of so small a step most of the region is what cannot be packed; what is in use at once is within it.
    used = plan.memory.total - plan.memory.components["gaps"]
    assert plan.memory.total >= step.analysis["peak_memory"] >= 0.9 * used


def test_the_step_gathers_weights_and_reduces_gradients_over_fsdp_and_sums_them_over_data(planned):
    _, _, plan = planned
    axes = {(row.kind, row.axes) for row in plan.traffic}
    assert ("all-gather", ("fsdp",)) in axes
    assert ("reduce-scatter", ("fsdp",)) in axes
    assert ("all-reduce", ("data",)) in axes or ("all-reduce", ("data", "fsdp")) in axes


def test_cycles_and_flops_are_there_and_no_figure_is_above_the_peak(planned):
    _, _, plan = planned
    assert plan.forecast.by_cycles and 0 < plan.forecast.mfu_causal < 1
    assert plan.forecast.compiled_flops > 0.9 * plan.forecast.model_flops


def test_no_sum_of_gradients_is_taken_out_of_the_loop_over_microbatches():
    """The compiler takes the option by which it leaves them there; by default it moves that of the embedding."""
    config = tiny(batch=16, data=2, fsdp=4)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=2))
    program = compile_step(config, parse_topology("v5e-8"), cache=None).program
    made = re.findall(r" = (.*?) all-reduce(?:-start)?\(", program[program.index("\nENTRY ") :])
    dims = [dims for shapes in made for dims in re.findall(r"\w\[([\d,]*)\]", shapes)]
    assert dims and not any(dims), made  # what is left are the scalars of norms


def test_memory_alone_takes_no_program_and_says_the_same(planned):
    config, _, plan = planned
    topology = parse_topology("v5e-8")
    early = compile_step(config, topology, whole=False, cache=None)
    assert not early.whole and early.program
    assert make_plan(config, topology, early).memory.total == plan.memory.total
