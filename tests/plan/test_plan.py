"""From a compiled step to a forecast, and to the pages that say it."""

import dataclasses
import html
import itertools
import json
import os
from types import SimpleNamespace

import pytest
from rich.console import Console

from maxlm import cli
from maxlm.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalConfig,
    LatentConfig,
    MlpConfig,
    ModelConfig,
    PhaseConfig,
    StoreConfig,
    TrainConfig,
)
from maxlm.configfile import source
from maxlm.model.flops import ledger
from maxlm.plan import child, hlo, network, predict
from maxlm.plan import compile as compiling
from maxlm.plan import forecast as forecasting
from maxlm.plan.compile import Request, Step, content_key
from maxlm.plan.explain import explanation
from maxlm.plan.html import render
from maxlm.plan.page import headlines, print_plan
from maxlm.plan.plan import as_json, make_plan
from maxlm.plan.topology import parse_topology
from maxlm.resolve import resolve
from maxlm.train.finish import foretold
from maxlm.train.report import Foretold
from tests.plan.test_memory import BUFFERS, RANGES
from tests.plan.test_plan_hlo import TPU
from tests.runs import ROOT
from tools import forecast as forecast_tool

MODEL = ModelConfig(
    vocab_size=512, embed_dim=32, num_layers=2, attention=AttentionConfig(q_heads=4, kv_heads=2), mlp=MlpConfig(dim=64)
)


def tiny(devices=8, batch=8, **parallel) -> Config:
    config = Config(
        name="tiny",
        model=MODEL,
        data=DataConfig(stores={"x": StoreConfig()}, sequence_length=16, batch_size=batch),
        train=TrainConfig(steps=1000),
        eval=EvalConfig(batch_size=batch),
    )
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))
    return resolve(config, devices=devices)


def fake_step(**changes) -> Step:
    places = tuple((0, x, y, 0) for x in range(2) for y in range(4))
    facts = {"mesh": {"data": 4, "fsdp": 2}, "places": places, "attention": "splash", "analysis": {}}
    facts |= {"seconds": (1.0, 2.0), "compiler_bytes": 10**9, "versions": {"jax": "1"}, "whole": True, "refused": ""}
    return Step(**{"program": TPU, "buffers": BUFFERS, "ranges": RANGES, **facts, **changes})


def test_a_plan_that_was_not_compiled_to_the_end_has_no_use_for_the_few_cycles_that_there_are():
    topology, config, step = parse_topology("v5p:2x4x1"), tiny(data=4, fsdp=2), fake_step(whole=False)
    bare = dataclasses.replace(step, program=TPU.replace('"estimated_cycles":"700"', ""))
    assert bare.program != step.program
    with_some, without = (make_plan(config, topology, one).forecast for one in (step, bare))
    assert with_some.seconds == without.seconds and not with_some.by_cycles


def test_a_step_takes_its_cycles_and_what_it_waits_for():
    topology = parse_topology("v5p:2x4x1")
    plan = make_plan(tiny(data=4, fsdp=2), topology, fake_step(), price=2.0)
    ahead, clock = plan.forecast, topology.chip.clock
    assert ahead.parts["other work"] == pytest.approx(5 * 700 / clock)
    # Of the permute, as much as the work issued beside it takes is hidden; for the rest the step waits.
    assert ahead.hidden == pytest.approx(5 * 700 / clock)
    assert ahead.seconds == pytest.approx(sum(ahead.parts.values()))
    assert set(ahead.parts) >= {"waiting for data", "waiting for data+fsdp", "kernels"}
    assert plan.days == pytest.approx(1000 * ahead.seconds / 86_400)
    assert plan.dollars == pytest.approx(plan.days * 24 * 8 * 2.0)
    assert ahead.mfu_causal == pytest.approx(ahead.model_flops / ahead.seconds / 459e12)


def test_collectives_take_what_the_links_of_their_group_allow():
    torus, mesh, nodes = parse_topology("v5p:4x4x4"), parse_topology("v5p:2x2x2"), parse_topology("h100x8x2")
    ring = network.span(torus, [(0, x, 0, 0) for x in range(4)])
    assert ring == network.Span(devices=4, slices=1, sides=((4, True),)) and ring.lanes == 2.0  # both ways round
    plane = network.span(torus, [(0, x, y, 0) for x in range(4) for y in range(4)])
    assert plane.lanes == 4.0
    assert network.span(mesh, [(0, x, 0, 0) for x in range(2)]).lanes == 1.0  # an open side ends
    size = 4e9
    once = network.seconds("all-gather", size, ring, torus)
    assert once == pytest.approx(size * 3 / 4 / 200e9, rel=1e-3)
    assert network.seconds("all-reduce", size, ring, torus) == pytest.approx(2 * once)
    both = network.span(nodes, [(node,) for node in (0, 1) for _ in range(8)])
    assert both == network.Span(devices=16, slices=2) and both.lanes == 1.0
    # Within the node behind the switch, then half of it between the nodes over eight interfaces.
    expected = size * 7 / 8 / 450e9 + size / 2 / (8 * 50e9)
    assert network.seconds("all-gather", size, both, nodes) == pytest.approx(expected, rel=1e-2)


def test_an_exchange_of_all_with_all_takes_what_its_busiest_link_does():
    torus, size = parse_topology("v5p:4x4x4"), 4e9
    sides = [range(4)] * 3

    def took(kind, topology, *spanned):
        """Over these sides of the first slice, in units of what a device holds over one link."""
        places = [(0, *(p[: len(spanned)]), *[0] * (3 - len(spanned))) for p in itertools.product(*spanned)]
        where = network.span(topology, places)
        return network.seconds(kind, size, where, topology) * topology.chip.link_bandwidth / size

    # A ring of four: parts go one hop on average, over two links. Every further side carries its own, beside it.
    for count in (1, 2, 3):
        assert took("all-to-all", torus, *sides[:count]) == pytest.approx(0.5, rel=1e-3)
    line = parse_topology("v5p:8x2x2")  # open: half of the eight sends half of what it has over the middle
    assert took("all-to-all", line, range(8)) == pytest.approx(2.0, rel=1e-3)
    assert took("ragged-all-to-all", line, range(2)) == pytest.approx(0.5, rel=1e-3)
    assert took("collective-permute", torus, *sides) == pytest.approx(1.0, rel=1e-3)  # to one neighbour, by one link
    nodes = parse_topology("h100x8x2")
    both = network.span(nodes, [(node,) for node in (0, 1) for _ in range(8)])
    # Half of it leaves the node through the device's own adapter; of the rest, an eighth stays where it is.
    expected = size / 2 / 50e9 + size / 2 * 7 / 8 / 450e9
    assert network.seconds("all-to-all", size, both, nodes) == pytest.approx(expected, rel=1e-3)
    assert network.seconds("collective-permute", size, both, nodes) == pytest.approx(size / 50e9, rel=1e-3)


def test_a_small_collective_takes_the_steps_of_its_rings():
    torus, nodes = parse_topology("v5p:4x4x4"), parse_topology("h100x8x2")
    cube = network.span(torus, [(0, x, y, z) for x in range(4) for y in range(4) for z in range(4)])
    assert network.seconds("all-gather", 0.0, cube, torus) == pytest.approx(6e-6)  # half way round each of three sides
    both = network.span(nodes, [(node,) for node in (0, 1) for _ in range(8)])
    assert network.seconds("all-reduce", 0.0, both, nodes) == pytest.approx(2 * (7 + 1) * 3e-6)


@pytest.mark.parametrize(
    ("name", "products", "of_values"),
    [
        ("splash_mha_fwd_residuals", 1, 1),
        ("splash_mha_dkv", 2, 2),
        ("splash_mha_dq", 2, 1),
        ("mha_backward", 4, 3),
    ],
)
@pytest.mark.parametrize("value_dim", [0, 48])  # 0: an attention whose values are as long as its keys
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_kernels_cost_the_positions_that_causality_leaves(name, products, of_values, value_dim, rows):
    heads, length, dim = 8, 128, 64
    shape = (rows, length, heads, dim) if name.startswith("mha") else (rows, heads, length, dim)
    text = ",".join(map(str, shape[rows == 1 :]))  # on GPUs positions come before heads; of one row there is no dim
    call = f'  %{name}.1 = bf16[{text}] custom-call(%q), custom_call_target="tpu_custom_call"'
    shapes = {"q": f"bf16[{text}]"}
    config = tiny(data=8)
    latent = LatentConfig(kv_dim=16, rope_dim=8, value_dim=value_dim) if value_dim else LatentConfig()
    attention = dataclasses.replace(config.model.attention, head_dim=dim, latent=latent)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
    kind, flops = predict._kernel_flops(name, hlo._instruction(call), shapes, config)
    dims = products * dim + of_values * (value_dim or dim)
    assert (kind, flops) == ("attention", 2 * rows * heads * dims * length * (length + 1) / 2)


@pytest.mark.parametrize(("target", "products"), [("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 5)])
def test_cudnns_attention_is_a_kernel_of_its_own(target, products):
    """As XLA calls it: it has no name, and statistics and workspace beside its result."""
    shape = "bf16[2,128,8,64]{3,2,1,0}"
    line = (
        f"  %custom-call.7 = ({shape}, f32[2,8,128]{{2,1,0}}, u8[4096]{{0}}) custom-call(%q, %k, %v), "
        f'custom_call_target="{target}", metadata={{op_name="jit(train_step)/attention/custom"}}'
    )
    topology, config = parse_topology("h100x8"), tiny(data=8)
    attention = dataclasses.replace(config.model.attention, head_dim=64)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
    program = "HloModule m\n\nENTRY %main (q: bf16[1]) -> bf16[1] {\n"
    program += "".join(f"  %{name} = {shape} parameter({i})\n" for i, name in enumerate("qkv"))
    program += line.replace("  %", "  ROOT %", 1) + "\n}\n"
    step = dataclasses.replace(fake_step(mesh={"data": 8}), program=program)
    ahead = predict.forecast(config, topology, step, hlo.parse(step.program), [])
    flops = products * 2 * 2 * 8 * 64 * 128 * (128 + 1) / 2
    assert [(kernel.runs, kernel.flops) for kernel in ahead.kernels] == [(1, flops)]
    assert ahead.compiled_flops == flops and ahead.parts["kernels"] > 0
    assert ahead.kernels[0].rule == "attention, bytes at the memory's bandwidth"  # of so short a row they take longer
    fast = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, hbm_bandwidth=1e18))
    ruled = predict.forecast(config, fast, step, hlo.parse(step.program), []).kernels[0]
    assert ruled.rule == "attention, 50% of the peak"
    assert ruled.seconds == pytest.approx(flops / (0.5 * topology.chip.peak("bfloat16")))


def test_a_grouped_product_costs_the_rows_of_an_even_load():
    config = tiny(data=2, fsdp=4)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, moe=dataclasses.replace(config.model.moe, experts=4, active=2))
    )
    call = '  %gmm.1 = bf16[256,64]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call"'
    shapes = {"x": "bf16[256,32]{1,0}", "w": "bf16[1,32,64]{2,1,0}"}
    kind, flops = predict._kernel_flops("gmm", hlo._instruction(call), shapes, config)
    assert (kind, flops) == (
        "grouped product",
        2 * (8 * 16 * 2 / 8) * 32 * 64,
    )  # of the 256 rows that there is room for


def test_a_layer_put_into_a_stack_or_taken_from_it_moves_alone():
    shapes = {"stack": "bf16[32,100]{1,0}", "layer": "bf16[1,100]{1,0}"}
    lines = {
        "put": "  %put = bf16[32,100]{1,0} fusion(%stack, %layer), metadata={op_name='x/dynamic_update_slice'}",
        "take": "  %take = bf16[1,100]{1,0} fusion(%stack), metadata={op_name='x/dynamic_slice'}",
        "add": "  %add = bf16[32,100]{1,0} add(%stack, %stack)",
    }
    none = hlo.Module({}, "")
    moved = {n: predict._moved(hlo._instruction(line.replace("'", '"')), shapes, none) for n, line in lines.items()}
    assert moved == {"put": 2 * 200, "take": 2 * 200, "add": 3 * 32 * 200}


def test_a_product_that_is_fused_with_its_place_in_a_stack_moves_a_layer():
    """It takes a layer's 2,000 bytes from one stack, and 60 of an input, and puts 120 into another, beside a copy."""
    module = hlo.parse("""HloModule m

%inside (x: bf16[3,10], w: bf16[32,10,100], stack: bf16[32,3,20], i: s32[]) -> (bf16[32,3,20], bf16[3,20]) {
  %x = bf16[3,10]{1,0} parameter(0)
  %w = bf16[32,10,100]{2,1,0} parameter(1)
  %stack = bf16[32,3,20]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %own = bf16[1,10,100]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,10,100}
  %flat = bf16[10,100]{1,0} bitcast(%own)
  %product = bf16[3,20]{1,0} dot(%x, %flat)
  %layer = bf16[1,3,20]{2,1,0} bitcast(%product)
  %put = bf16[32,3,20]{2,1,0} dynamic-update-slice(%stack, %layer, %i, %i, %i)
  ROOT %both = (bf16[32,3,20]{2,1,0}, bf16[3,20]{1,0}) tuple(%put, %product)
}

ENTRY %main (x: bf16[3,10], w: bf16[32,10,100], stack: bf16[32,3,20], i: s32[]) -> (bf16[32,3,20], bf16[3,20]) {
  %x = bf16[3,10]{1,0} parameter(0)
  %w = bf16[32,10,100]{2,1,0} parameter(1)
  %stack = bf16[32,3,20]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  ROOT %f = (bf16[32,3,20]{2,1,0}, bf16[3,20]{1,0}) fusion(%x, %w, %stack, %i), kind=kOutput, calls=%inside
}
""")
    assert predict._moved(module.computations["main"][-1], {}, module) == 60 + 2000 + 4 + 120 + 120


def test_a_fusion_within_a_fusion_that_takes_or_puts_a_layer_moves_it_alone():
    module = hlo.parse("""HloModule m

%take (w: bf16[32,10,100], i: s32[]) -> bf16[10,100] {
  %w = bf16[32,10,100]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %own = bf16[1,10,100]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,10,100}
  ROOT %flat = bf16[10,100]{1,0} bitcast(%own)
}

%place (i: s32[], stack: bf16[32,3,20], new: bf16[3,20]) -> bf16[32,3,20] {
  %i = s32[] parameter(0)
  %stack = bf16[32,3,20]{2,1,0} parameter(1)
  %new = bf16[3,20]{1,0} parameter(2)
  %layer = bf16[1,3,20]{2,1,0} bitcast(%new)
  ROOT %put = bf16[32,3,20]{2,1,0} dynamic-update-slice(%stack, %layer, %i, %i, %i)
}

%inside (x: bf16[3,10], i: s32[], w: bf16[32,10,100], stack: bf16[32,3,20]) -> bf16[32,3,20] {
  %x = bf16[3,10]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = bf16[32,10,100]{2,1,0} parameter(2)
  %stack = bf16[32,3,20]{2,1,0} parameter(3)
  %taken = bf16[10,100]{1,0} fusion(%w, %i), kind=kLoop, calls=%take
  %product = bf16[3,20]{1,0} dot(%x, %taken)
  ROOT %placed = bf16[32,3,20]{2,1,0} fusion(%i, %stack, %product), kind=kLoop, calls=%place
}

ENTRY %main (x: bf16[3,10], i: s32[], w: bf16[32,10,100], stack: bf16[32,3,20]) -> bf16[32,3,20] {
  %x = bf16[3,10]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = bf16[32,10,100]{2,1,0} parameter(2)
  %stack = bf16[32,3,20]{2,1,0} parameter(3)
  ROOT %f = bf16[32,3,20]{2,1,0} fusion(%x, %i, %w, %stack), kind=kOutput, calls=%inside
}
""")
    assert predict._moved(module.computations["main"][-1], {}, module) == 60 + 4 + 2000 + 120


def test_the_pages_say_whether_it_fits_and_by_how_much():
    topology = parse_topology("v5p:2x4x1")
    fits = make_plan(tiny(data=4, fsdp=2), topology, fake_step())
    assert fits.fits and "it fits: " in headlines(fits)[1]
    small = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, usable_bytes=4000.0))
    full = make_plan(tiny(data=4, fsdp=2), small, fake_step(refused="Ran out of memory"))
    assert not full.fits and "1.6 KiB too much; the compiler says: Ran out of memory" in headlines(full)[1]
    refused = make_plan(tiny(data=4, fsdp=2), topology, fake_step(refused="Ran out of memory"))
    assert not refused.fits and refused.spare > 0 and "too much" not in headlines(refused)[1]
    assert "the compiler says: Ran out of memory" in headlines(refused)[1]
    console = Console(record=True, width=130)
    print_plan(fits, console)
    text = console.export_text()
    for part in ("optimizer", "reduce-scatter (written as all-reduce)", "waiting for data+fsdp"):
        assert part in text
    page = render(fits)
    assert page.count("<svg") == 3 and "optimizer" in page and "http" not in page
    rule = html.escape(fits.forecast.kernels[0].rule)
    for part in ("reduce-scatter (written as all-reduce)", "Kernels, priced by rule", rule):
        assert part in page
    said = json.loads(as_json(fits))
    assert said["memory"]["total"] == sum(said["memory"]["components"].values())
    assert said["fits"] and said["traffic"][0]["kind"] == "all-gather"
    assert said["forecast"]["busiest"][0]["kind"]
    assert said["forecast"]["kernels"][0]["rule"] == "other, bytes at the memory's bandwidth"


def test_a_run_with_phases_is_planned_at_its_heaviest_and_paid_phase_by_phase():
    config, topology = tiny(data=4, fsdp=2), parse_topology("v5p:2x4x1")
    phases = {"long": PhaseConfig(from_step=900, sequence_length=64)}
    phased = dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases))
    plan, short = (make_plan(given, topology, fake_step(), price=2.0) for given in (phased, config))
    assert (plan.rows, plan.positions, plan.forecast.tokens) == (8, 64, 8 * 64)
    assert plan.phase == "steps 900 to 999, the heaviest of the run's 2 phases" and not short.phase
    assert plan.phase in headlines(plan)[0] and "its phases by their FLOPs" in headlines(plan)[-1]
    assert "phase" not in " ".join(headlines(short))
    costs = [ledger(config.model, sequence_length=length).causal_exact for length in (16, 64)]
    steps = 100 + 900 * 16 * costs[0] / (64 * costs[1])
    assert plan.days == pytest.approx(steps * plan.forecast.seconds / 86_400)
    assert plan.run_tokens == 8 * (900 * 16 + 100 * 64)


def test_the_heaviest_step_is_what_is_compiled(tmp_path, monkeypatch):
    config, asked = tiny(data=8), []
    phases = {"long": PhaseConfig(from_step=900, sequence_length=64)}
    phased = dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases))

    def lower(*shape):
        asked.append(shape)
        raise InterruptedError

    monkeypatch.setattr(child, "make_setup", lambda *_: SimpleNamespace(attention="plain", lower=lower))
    for given in (config, phased):
        (tmp_path / "request.json").write_text(Request(given, parse_topology("cpu-8"), {}, True).as_json())
        with pytest.raises(InterruptedError):
            child.run(tmp_path)
    assert asked == [(8, 16), (8, 64)]


def test_no_utilisation_is_told_of_hardware_whose_peak_is_not_known():
    config, step = tiny(data=8), fake_step()
    known = make_plan(config, parse_topology("v5p:2x4x1"), step)
    assert "MFU" in headlines(known)[2]
    program = "HloModule m\n\nENTRY %main (q: bf16[1]) -> bf16[1] {\n  ROOT %q = bf16[1] parameter(0)\n}\n"
    ahead = predict.forecast(config, parse_topology("cpu-8"), step, hlo.parse(program), [])
    assert ahead.mfu_causal is None and ahead.mfu_6n is None
    foretold = dataclasses.replace(known.forecast, mfu_causal=ahead.mfu_causal, mfu_6n=ahead.mfu_6n)
    plan = dataclasses.replace(known, forecast=foretold)
    assert "tokens/s" in headlines(plan)[2] and "MFU" not in " ".join(headlines(plan)) + render(plan)
    assert json.loads(as_json(plan))["forecast"]["mfu_6n"] is None


def test_all_figures_of_a_plan_for_cpus_are_of_the_time_that_was_calibrated(monkeypatch):
    foretold = forecasting.Forecast({"products": 2e-3, "loss": 1e-3}, 0.0)
    monkeypatch.setattr(forecasting, "calibrate", lambda config: SimpleNamespace(scratch=5e6, meet=1e-5))
    monkeypatch.setattr(forecasting, "forecast", lambda config, rates, device_bytes, traffic: foretold)
    config, topology = tiny(data=4, fsdp=2), parse_topology("v5p:2x4x1")  # as if a file of chips gave a CPU its peak
    made = make_plan(config, topology, fake_step())
    plan = forecasting.on_this_machine(made, config)
    ahead, peak = plan.forecast, topology.chip.peak("bfloat16")
    assert made.forecast.hidden and made.forecast.kernels and made.forecast.busiest
    assert not (ahead.hidden or ahead.kernels or ahead.busiest)
    assert plan.memory.total == sum(plan.memory.components.values()) == made.memory.total + 5_000_000
    assert ahead.seconds == sum(ahead.parts.values()) == 3e-3 != made.forecast.seconds
    assert ahead.mfu_causal == pytest.approx(ahead.model_flops / ahead.seconds / peak)
    assert ahead.mfu_6n / ahead.mfu_causal == pytest.approx(made.forecast.mfu_6n / made.forecast.mfu_causal)
    console = Console(record=True, width=130)
    print_plan(plan, console)
    for text in (console.export_text(), render(plan)):
        assert "calibrated" in text and "priced by" not in text and "behind other work" not in text
        assert "collectives are not in the time" not in text
    peakless = dataclasses.replace(made.forecast, mfu_causal=None, mfu_6n=None, tokens_per_second=0.0)
    unknown = forecasting.on_this_machine(dataclasses.replace(made, forecast=peakless), config).forecast
    assert unknown.seconds == ahead.seconds and unknown.mfu_causal is None and unknown.mfu_6n is None


def test_a_plan_for_cpus_says_where_its_collectives_have_no_price(monkeypatch):
    monkeypatch.setattr(forecasting, "calibrate", lambda config: SimpleNamespace(scratch=0.0, meet=0.0))
    monkeypatch.setattr(forecasting, "forecast", lambda *_, **__: forecasting.Forecast({"products": 1.0}, 0.0))
    config = tiny(data=4, fsdp=2)
    made = make_plan(config, parse_topology("v5p:2x4x1"), fake_step())
    console = Console(record=True, width=300)
    print_plan(forecasting.on_this_machine(made, config), console)
    said = console.export_text()
    assert "collectives are not in the time: they are measured on 8 devices" in said and "device_count=8" in said
    alone = forecasting.on_this_machine(dataclasses.replace(made, traffic=()), config)  # nothing is left out
    assert not any("collectives" in note for note in alone.notes)


def test_what_was_compiled_to_the_end_serves_a_question_of_memory_alone(tmp_path, monkeypatch, capsys):
    """Which would have it compiled again, until its memory is laid out."""
    monkeypatch.setattr(compiling, "check_installed", lambda *_: None)
    file, topology = tmp_path / "config.py", parse_topology("v5p:2x4x1")
    file.write_text(source(tiny(data=4, fsdp=2)))
    options = compiling.compiler_options(topology.chip, accumulation=1)
    key = content_key(Request(tiny(data=4, fsdp=2), topology, options, True))
    compiling._write(fake_step(), tmp_path / "plans" / key)
    args = [f"--config={file}", "--topology=v5p:2x4x1", "--memory_only", f"--plan_cache={tmp_path / 'plans'}"]
    assert cli.main(["plan", *args, f"--json={tmp_path / 'plan.json'}"]) == 0
    assert "compiled to the end before: that is read, and times are by the compiler's cycles" in capsys.readouterr().out
    said = json.loads((tmp_path / "plan.json").read_text())
    assert said["compiler"]["cached"] and said["compiler"]["to the end"] and said["forecast"]["by_cycles"]


def test_a_forecast_beside_which_nothing_was_measured_says_so(tmp_path, monkeypatch, capsys):
    """The peak of a process cannot be cleared everywhere."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which the tool sets, for its process
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    figures = {"peak memory": (100.0, 92.0, "MiB"), "step": (1.2, 1.0, "s")}
    found = {"figures": figures, "parts": {"products": 1.2}, "calibration": 9.0}
    monkeypatch.setattr(forecast_tool, "compare", lambda args, devices, steps: found)
    for memory, code, told in ((92.0, 0, "1.087"), (None, 1, "not measured"), (90.0, 1, "1.111")):
        figures["peak memory"] = (100.0, memory, "MiB")
        assert forecast_tool.main([f"--json={tmp_path / 'x.json'}"]) == code
        assert told in capsys.readouterr().out
    promise = (ROOT / "docs" / "plan.md").read_text()
    assert all(f"{limit:.0%}" in promise for limit in forecast_tool.LIMITS.values())


def test_a_compiled_plan_is_what_a_runs_report_reads(tmp_path):
    plan = make_plan(tiny(data=4, fsdp=2), parse_topology("v5p:2x4x1"), fake_step())
    (tmp_path / "plan.json").write_text(as_json(plan))
    setup = SimpleNamespace(mesh=SimpleNamespace(size=8))
    run = SimpleNamespace(workdir=tmp_path, setup=setup, device_bytes=7.0, log=pytest.fail)
    assert foretold(run) == Foretold("v5p:2x4x1", plan.forecast.seconds, plan.memory.total, 7.0)


def test_explain_gives_every_array_its_axes_and_a_devices_share():
    told = explanation(tiny(data=2, fsdp=2, tensor=2))
    held = {item.what: item for item in told.parameters}
    query = held["layers/attention/query"]
    assert query.mesh_axes == ("", "fsdp 2", "tensor 2", "")
    assert query.device_bytes * 4 == query.bytes == 2 * 32 * 4 * 8 * 4
    stream = [item for item in told.activations if item.logical == ("batch", "residual", "")]
    assert stream and stream[0].mesh_axes == ("data 2 + fsdp 2", "tensor 2", "")
    assert told.rules["vocab"] == "tensor 2" and told.rules["expert"] == ""
