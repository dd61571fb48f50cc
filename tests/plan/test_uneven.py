"""Parts of a step that run as often as places or data say: counted as often as they run, on average."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest

from maxlm import programs
from maxlm.config import AttentionConfig, MoeConfig
from maxlm.model.flops import ledger
from maxlm.plan import collectives, hlo, network, uneven
from maxlm.plan.plan import make_plan
from maxlm.plan.topology import parse_topology
from maxlm.resolve import resolve
from tests.plan.test_plan import fake_step, tiny
from tests.plan.test_stages import planned, program


def flops_of_a_device(given):
    """Of the products that the model asks for."""
    counts = ledger(given.model, sequence_length=given.data.sequence_length)
    return counts.causal_exact * given.data.batch_size * given.data.sequence_length / 8


def spread_mixture(*, active, **tiny_settings):
    """Eight experts on a mesh of eight devices, two of them over `expert`."""
    base = tiny(data=8, **tiny_settings)
    mixture = dataclasses.replace(base.model, moe=MoeConfig(experts=8, active=active, dim=64))
    mesh = dataclasses.replace(base.parallel, data=2, fsdp=2, expert=2)
    return resolve(dataclasses.replace(base, model=mixture, parallel=mesh), devices=8)


def test_a_mixture_on_cpus_is_planned_at_even_load():
    given = spread_mixture(active=2)
    text = program(given)
    found = planned(given, text)
    # On CPUs attention multiplies somewhat more than causality leaves: rows are short.
    assert found.forecast.compiled_flops == pytest.approx(flops_of_a_device(given), rel=0.05)
    assert not any("how often these loops turn" in note for note in found.notes)
    other = planned(given, re.sub(r"grouped_(rows|outer)", "unheard_of", text))
    assert other.forecast.compiled_flops < found.forecast.compiled_flops
    assert any("counted as if once" in note and "unheard_of" in note for note in other.notes)


@pytest.fixture(scope="module")
def spread():
    """Long rows over two devices each, of which one layer sees all and the other the last 512 positions."""
    base = tiny(data=8)
    attention = AttentionConfig(q_heads=4, kv_heads=2, windows=(0, 512))
    return resolve(
        dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, attention=attention),
            data=dataclasses.replace(base.data, sequence_length=4096),
            train=dataclasses.replace(base.train, remat="none"),
            parallel=dataclasses.replace(base.parallel, data=2, fsdp=2, context=2),
        ),
        devices=8,
    )


@pytest.mark.slow
def test_attention_over_context_costs_what_it_does_on_one_device(spread):
    alone = dataclasses.replace(spread, parallel=dataclasses.replace(spread.parallel, data=4, context=1))
    flops = [planned(one, program(one)).forecast.compiled_flops for one in (spread, alone)]
    assert flops[0] == pytest.approx(flops[1], rel=0.03)
    assert flops[0] > flops_of_a_device(spread)  # whole blocks are multiplied


def test_the_blocks_that_meet_are_those_with_a_pair_that_is_seen(spread):
    """Counted position by position, in blocks of 256 queries (two heads a kv head) and 512 keys."""
    length, shares = 4096, []
    back = np.arange(length)[:, None] - np.arange(length)
    for window in (length, 512):
        seen = (back >= 0) & (back < window)
        shares.append(seen.reshape(length // 256, 256, length // 512, 512).any(axis=(1, 3)).mean())
    assert uneven.meeting(spread) == pytest.approx(np.mean(shares))


def test_counting_the_blocks_that_meet_starts_no_devices():
    """A forecast for CPUs then says how many there are, and measures collectives on as many."""
    asked = "import jax; from maxlm.plan import uneven; assert 0 < uneven._meeting(512, 4096, 4, 2) < 1; "
    asked += "jax.config.update('jax_num_cpu_devices', 8); assert jax.device_count() == 8"
    environment = programs.environment() | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr


EXCHANGE = """HloModule m

ENTRY %main (a: bf16[4096,2,16], s: s32[2]) -> bf16[4096,2,16] {
  %a = bf16[4096,2,16]{2,1,0} parameter(0)
  %s = s32[2]{0} parameter(1)
  ROOT %x = bf16[4096,2,16]{2,1,0} ragged-all-to-all(%a, %a, %s, %s, %s, %s), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}
"""


def test_an_exchange_sends_the_rows_that_there_are_at_even_load():
    """A device has 32 tokens, of which each goes to four experts, and room for 4,096."""
    rows = 128
    given = spread_mixture(active=4, batch=16)
    topology = parse_topology("v5p:2x4x1")
    plan = make_plan(given, topology, fake_step(program=EXCHANGE, mesh=given.parallel.sizes))
    (sent,) = plan.traffic
    assert (sent.kind, sent.axes, sent.payload) == ("ragged-all-to-all", ("expert",), rows * 32 * 2)
    took = network.seconds(sent.kind, sent.payload, network.Span(2, 1, ((2, False),)), topology)
    assert plan.forecast.parts["waiting for expert"] == pytest.approx(took)
    few = EXCHANGE.replace("4096", "48")  # of what a capacity lets through there is room for less
    plan = make_plan(given, topology, fake_step(program=few, mesh=given.parallel.sizes))
    assert plan.traffic[0].payload == 48 * 32 * 2
    start = "((bf16[96,32]{1,0}), bf16[128,32]{1,0}) ragged-all-to-all-start(%a, %a)"
    assert collectives._used(hlo._instruction(f"  %x = {start}"), 64) == 0.5


DOT = "dot(X, X), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def conditional(one, other, *, op_name="jit(train_step)/layers/attention/cond"):
    """A program that runs one of two bodies."""
    bodies = "".join(
        f"%{name} (x.{name}: f32[8,8]) -> f32[8,8] {{\n  %x.{name} = f32[8,8]{{1,0}} parameter(0)\n"
        f"  ROOT %y.{name} = f32[8,8]{{1,0}} {line.replace('X', f'%x.{name}')}\n}}\n\n"
        for name, line in (("one", one), ("other", other))
    )
    return hlo.parse(
        f"HloModule m\n\n{bodies}ENTRY %main (p: s32[], q: f32[8,8]) -> f32[8,8] {{\n  %p = s32[] parameter(0)\n"
        "  %q = f32[8,8]{1,0} parameter(1)\n  ROOT %c = f32[8,8]{1,0} conditional(%p, %q, %q), "
        f'branch_computations={{%one, %other}}, metadata={{op_name="{op_name}"}}\n}}\n'
    )


def test_only_a_conditional_that_passes_work_over_has_a_share(spread):
    met = uneven.meeting(spread)
    passing = uneven.settled(conditional("copy(X)", DOT), spread)
    assert dict(passing.shares) == {"one": 1 - met, "other": met} and 0 < met < 0.6
    assert hlo.total_flops(passing) == pytest.approx(met * 2 * 8**3)
    assert not uneven.settled(conditional(DOT, DOT), spread).shares


def test_norms_count_for_as_many_steps_as_they_are_made_in(spread):
    given = dataclasses.replace(spread, train=dataclasses.replace(spread.train, norms_every=10))
    more = f"{DOT}\n  %more = f32[8,8]{{1,0}} copy(X)"
    for bodies in (("copy(X)", more), (more, "copy(X)")):  # whichever the compiler lists first
        module = uneven.settled(conditional(*bodies, op_name="jit(train_step)/metrics/cond"), given)
        assert hlo.total_flops(module) == pytest.approx(0.1 * 2 * 8**3)


def test_the_step_writes_norms_as_the_planner_reads_them():
    """Under that name, and in the longer of two branches."""
    base = tiny(data=8)
    config = resolve(dataclasses.replace(base, train=dataclasses.replace(base.train, norms_every=4)), devices=8)
    module = hlo.parse(program(config))
    (one,) = [i for i, _, _ in module.scheduled() if i.opcode == "conditional" and "metrics" in i.op_name]
    shares = uneven.settled(module, config).shares
    fusions = {shares[name]: sum(i.opcode == "fusion" for i in module.computations[name]) for name in one.called}
    assert fusions[0.25] > 5 * fusions[0.75]
