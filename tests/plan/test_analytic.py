"""The analytical model against what it models (declared shardings, the FLOP ledger, compiled programs), and what it
serves: the search, and the changes that make a run fit. One file, since tests of one file share what was traced."""

import dataclasses
import json
import math
import shlex
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import maxlm.plan.candidates
import maxlm.plan.changes
import maxlm.plan.compile
from maxlm import cli
from maxlm.chips import CHIPS
from maxlm.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    StoreConfig,
    TokenizerConfig,
    TrainConfig,
)
from maxlm.configfile import source
from maxlm.jaxpr import subprograms
from maxlm.model.flops import ledger
from maxlm.parallel.mesh import make_mesh
from maxlm.plan import forecast as forecasting
from maxlm.plan import searching, shortage
from maxlm.plan.analytic import Estimator, timing
from maxlm.plan.analytic.memory import facts, memory, state_bytes, state_leaves
from maxlm.plan.analytic.symbols import COLUMNS, values
from maxlm.plan.analytic.timing import BACKWARD, _attention_flops, axis_spans
from maxlm.plan.analytic.walk import KINDS
from maxlm.plan.candidates import candidates, leanest, overrides
from maxlm.plan.changes import cheapest, sentences
from maxlm.plan.compile import OutOfTime
from maxlm.plan.forecast import Rates, calibrate, forecast
from maxlm.plan.search import SearchError, Verdict, search, why
from maxlm.plan.topology import parse_topology
from maxlm.plan.uncompiled import figures
from maxlm.resolve import resolve
from maxlm.train.finish import foretold
from maxlm.train.report import Foretold
from maxlm.train.setup import abstract_batch, make_setup

ROWS, LENGTH = 16, 256


def config(*, layers=2, experts=0, mtp=0, mesh=None, **train):
    """A model of which activations are most of the memory, on eight devices."""
    model = ModelConfig(
        vocab_size=512,
        embed_dim=128,
        num_layers=layers,
        mtp_layers=mtp,
        attention=AttentionConfig(q_heads=8, kv_heads=2, head_dim=16),
        mlp=MlpConfig(dim=2048),
        moe=MoeConfig(experts=experts, active=2, dim=256) if experts else MoeConfig(),
    )
    sizes = {"data": 1, "fsdp": 8} | (mesh or {})
    given = Config(
        model=model,
        data=DataConfig(
            stores={"a": StoreConfig()},
            tokenizer=TokenizerConfig(kind="bytes"),
            sequence_length=LENGTH,
            batch_size=ROWS,
            mask_documents=False,
        ),
        optim=OptimConfig(optimizer="adamw"),
        parallel=ParallelConfig(**sizes),
        train=TrainConfig(**{"precision": "float32", "norms_every": 0, "loss_chunk": 1024} | train),
        eval=EvalConfig(batch_size=8),
    )
    return resolve(given, devices=math.prod(max(size, 1) for size in sizes.values()))


def done(resolved):
    """Amounts of work by kind, on a device."""
    anatomy = facts(resolved).anatomy
    return dict(zip(KINDS, anatomy.kinds @ anatomy.amounts(values(resolved)), strict=True))


def _exchanged(program):
    """The rows of every array that an all-to-all of (rows, D) exchanges."""
    for equation in program.eqns:
        if equation.primitive.name == "all_to_all" and equation.invars[0].aval.shape[1:] == (128,):
            yield equation.invars[0].aval.shape[0]
        for inner in subprograms(equation.params):
            yield from _exchanged(inner)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5, 8.0])
def test_a_device_keeps_the_rows_for_its_experts_that_the_model_says(factor):
    plain = config(mesh={"fsdp": 2, "expert": 4}, experts=8)
    moe = dataclasses.replace(plain.model.moe, capacity_factor=factor)
    resolved = dataclasses.replace(plain, model=dataclasses.replace(plain.model, moe=moe))
    setup = make_setup(resolved, make_mesh(resolved.parallel))
    batch = abstract_batch(setup.mesh, ROWS, LENGTH)
    (rows,) = set(_exchanged(jax.make_jaxpr(setup.train_step)(setup.abstract_state(), batch, setup.rates()).jaxpr))
    named = dict(zip(COLUMNS, values(resolved), strict=True))
    entries = named["rows"] * named["chunks"] * named["chunk"] * moe.active
    assert rows == pytest.approx(entries * named["regions"])


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize(
    "mesh", [{}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "pipeline": 2, "data": 2}, {"fsdp": 4, "expert": 2}]
)
def test_the_state_takes_what_its_shardings_say(mesh, experts):
    if mesh.get("expert") and not experts:
        pytest.skip("experts only")
    resolved = config(mesh=mesh, experts=experts, accumulation=2)
    setup = make_setup(resolved, make_mesh(resolved.parallel))
    state = setup.abstract_state()

    def held(tree):
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)

    found = state_bytes(resolved, state_leaves(resolved.model, resolved.optim))
    assert found == {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "moving average": held(state.average),
    }


def test_every_axis_of_the_batch_sums_the_gradients_of_what_it_does_not_cut(monkeypatch):
    """Of a mixture over `context`, all of them; over `expert`, all but those of the experts."""
    resolved = config(mesh={"fsdp": 2, "context": 2, "expert": 2}, experts=8)
    leaves = state_leaves(resolved.model, resolved.optim)
    held = state_bytes(resolved, leaves)["parameters"]
    moe, layers = resolved.model.moe, resolved.model.num_layers
    experts = 4 * layers * 3 * resolved.model.embed_dim * moe.dim * moe.experts / 2 / 2  # of fsdp 2 x expert 2
    taken = []

    def seconds(kind, payload, where, topology):
        taken.append((kind, payload))
        return 1.0

    monkeypatch.setattr(timing.network, "seconds", seconds)
    found = Estimator(resolved, TOPOLOGY)(resolved).time.parts
    sums = [payload for kind, payload in taken if kind == "all-reduce"]
    assert sums == pytest.approx([held - experts, held])
    assert found["network: expert"] == 2.0  # and what goes to the experts and back


@pytest.mark.parametrize("experts", [0, 8])
def test_products_are_those_of_the_ledger(experts):
    resolved = config(experts=experts, remat="none", loss_chunk=LENGTH * ROWS // 4)
    counts = ledger(resolved.model, sequence_length=LENGTH)
    besides_scores = counts.causal_exact - 3 * counts.forward["scores"]
    assert done(resolved)["product"] == pytest.approx(besides_scores * ROWS * LENGTH / 8, rel=1e-6)


def test_attention_of_layers_that_predict_further_tokens_counts_once():
    resolved = config(mtp=1, remat="none")
    amounts = done(resolved)
    assert amounts["attention_forward"] == amounts["attention_backward"] == 2 + 1
    scores = ledger(resolved.model, sequence_length=LENGTH).forward["scores"]
    assert _attention_flops(resolved, amounts) == pytest.approx((1 + BACKWARD) * scores * ROWS * LENGTH / 8)


@pytest.mark.parametrize(
    ("mesh", "train"),
    [
        ({}, {}),
        ({}, {"accumulation": 2}),
        ({"fsdp": 4, "pipeline": 2}, {"accumulation": 2}),
        ({"fsdp": 4, "context": 2}, {}),
        ({"fsdp": 2, "context": 2, "pipeline": 2}, {"accumulation": 4}),
        ({"fsdp": 4, "tensor": 2}, {}),
    ],
)
def test_on_cpus_every_row_is_attended_to_once_a_layer(mesh, train):
    resolved = config(mesh=mesh, remat="none", **train)
    rates = Rates(products=1e9, attend=1.0, attend_back=2.0, loss=0.0, elementwise=1e9, optimizer=0.0, seconds=0.0)
    parts = forecast(resolved, rates, device_bytes=0.0).parts
    # The rates are of the heads of one device.
    assert parts["attention"] == pytest.approx(ROWS * 2 * (1.0 + 2.0) * mesh.get("tensor", 1))


@pytest.mark.parametrize("context", [1, 2])
def test_attention_on_cpus_is_measured_on_whole_rows(context, monkeypatch):
    measured = []

    def note(function, *args, seconds):
        measured.append((jax.eval_shape(function, *args), [x.shape for x in args]))
        return 1.0

    monkeypatch.setattr(forecasting, "_measured", note)
    calibrate(config(mesh={"fsdp": 8 // context, "context": context}), seconds=0.0)
    attended = [shapes for _, shapes in measured if len(shapes[0]) == 4]
    assert attended == [[(1, LENGTH, 8, 16), (1, LENGTH, 2, 16), (1, LENGTH, 2, 16)]] * 2


def test_attention_on_cpus_is_measured_with_every_window_of_the_layers(monkeypatch):
    base = config(layers=3)
    attention = dataclasses.replace(base.model.attention, windows=(16, 0))  # two layers of the one, one of the other
    resolved = dataclasses.replace(base, model=dataclasses.replace(base.model, attention=attention))
    took = iter([1.0, 4.0, 3.0, 10.0])  # forward with each, and there and back

    def measured(function, *args, seconds):
        return next(took) if args[0].ndim == 4 else 1.0

    monkeypatch.setattr(forecasting, "_measured", measured)
    rates = calibrate(resolved, seconds=0.0)
    assert rates.attend == pytest.approx(2 / 3 * 1 + 1 / 3 * 4)
    assert rates.attend + rates.attend_back == pytest.approx(2 / 3 * 3 + 1 / 3 * 10)
    assert next(took, None) is None


def test_work_is_shared_out_and_done_again_as_the_mesh_and_the_policy_say():
    plain, again = done(config(remat="none")), done(config(remat="full"))
    assert plain["attention_forward"] == 2 and again["attention_forward"] == 4  # layers
    assert plain["attention_backward"] == again["attention_backward"] == 2
    assert plain["product"] * 1.2 < again["product"] < plain["product"] * 4 / 3
    halves = done(config(remat="full", accumulation=2))
    assert halves["product"] == pytest.approx(again["product"])
    assert halves["reduce_weights"] == pytest.approx(2 * again["reduce_weights"])  # each microbatch's gradients
    # A layer's matrices are gathered forwards and backwards; table and head once each.
    model = config().model
    layers = sum(spec_size for spec_size in _matrices(model))
    tables = 2 * model.vocab_size * model.embed_dim
    assert plain["gather_weights"] == pytest.approx(4 * (2 * layers + tables), rel=0.03)
    assert done(config(remat="none", mesh={"fsdp": 1, "data": 8}))["gather_weights"] == 0
    assert done(config(remat="none", mesh={"fsdp": 4, "tensor": 2}))["gather_stream"] > 0
    assert plain["gather_stream"] == 0


def _matrices(model):
    """Scalars of each layer's matrices, over layers."""
    attention, width = model.attention, model.embed_dim
    heads = (attention.q_heads * 2 + attention.kv_heads * 2) * attention.head_dim
    return [width * heads + 3 * width * model.mlp.dim] * model.num_layers


def test_what_is_kept_falls_with_the_policy_and_with_microbatches():
    kept = [
        memory(config(layers=8, **policy), facts(config(layers=8, **policy))).parts["activations"]
        for policy in (
            {"remat": "none"},
            {"remat": "matmuls"},
            {"remat": "full"},
        )
    ]
    assert kept == sorted(kept, reverse=True) and kept[0] > 4 * kept[-1] > 0
    # With remat full it is the stream before each layer, float32.
    assert kept[-1] == pytest.approx(8 * (ROWS // 8) * LENGTH * 128 * 4)
    halves = config(layers=8, remat="full", accumulation=2)
    assert memory(halves, facts(halves)).parts["activations"] == pytest.approx(kept[-1] / 2)


def test_a_layer_takes_what_the_compiler_says():
    # Attention on CPUs keeps its result in two layouts, which the model does not know: a few hundredths here.
    compiled, modelled = [], []
    for layers in (2, 4):
        resolved = config(layers=layers, remat="none")
        program = make_setup(resolved, make_mesh(resolved.parallel)).compile(ROWS, LENGTH).compiled
        sizes = program.memory_analysis()
        held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        compiled.append(held + sizes.temp_size_in_bytes)
        modelled.append(memory(resolved, facts(resolved)).total)
    slope = modelled[1] - modelled[0]
    assert slope == pytest.approx(compiled[1] - compiled[0], rel=0.05)


def test_groups_take_sides_of_the_torus():
    sides = ((4, True), (4, True), (4, True))

    def lanes(**sizes):
        found = axis_spans(tuple(sizes.items()), "data", slices=1, sides=sides)
        return {axis: found[axis].lanes for axis in sizes}

    assert lanes(data=1, fsdp=64) == {"data": 1, "fsdp": 6}
    assert lanes(data=4, fsdp=16) == {"data": 2, "fsdp": 4}
    assert lanes(fsdp=32, tensor=2)["tensor"] == 1  # half a side is not closed


def test_a_pipeline_pays_its_bubble_and_keeps_its_microbatches():
    mesh = {"fsdp": 2, "pipeline": 4}
    few, many = (config(layers=4, mesh=mesh, accumulation=a, remat="full") for a in (4, 8))
    estimate = Estimator(few, TOPOLOGY)
    assert estimate(few).time.parts["bubble"] > estimate(many).time.parts["bubble"] > 0
    gpipe = dataclasses.replace(many, parallel=dataclasses.replace(many.parallel, pipeline_schedule="gpipe"))
    held = [estimate(one).memory.parts["activations"] for one in (gpipe, many)]
    assert held[0] == pytest.approx(2 * held[1])


def test_no_figure_is_above_the_peak():
    resolved = config(remat="none")
    found = Estimator(resolved, TOPOLOGY)(resolved)
    flops = ledger(resolved.model, sequence_length=LENGTH).causal_exact * ROWS * LENGTH / 8
    assert found.time.total > flops / CHIPS["v5p"].peak("float32")


# --- the search and the changes ------------------------------------------------------------------------------------

TOPOLOGY = parse_topology("v5p-16")
ALL_REMATS = maxlm.plan.candidates.REMATS  # before the tests cut them down


@pytest.fixture(scope="module")
def large():
    """About 8 billion parameters, which eight chips hold, but not with everything kept for the backward pass.

    Of the structure of the small model, so that nothing has to be traced anew.
    """
    model = ModelConfig(
        vocab_size=128_256,
        embed_dim=4096,
        num_layers=32,
        attention=AttentionConfig(q_heads=256, kv_heads=64, head_dim=16),
        mlp=MlpConfig(dim=14_336),
    )
    given = Config(
        model=model,
        data=DataConfig(stores={"a": StoreConfig()}, sequence_length=8192, batch_size=16, mask_documents=False),
        parallel=ParallelConfig(data=1, fsdp=8),
        train=TrainConfig(remat="none", loss_chunk=8192, precision="float32", norms_every=0),
        eval=EvalConfig(batch_size=8),
    )
    return resolve(given, devices=TOPOLOGY.devices)


@pytest.fixture(scope="module", autouse=True)
def two_policies():
    """Each policy is traced, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (maxlm.plan.candidates, maxlm.plan.changes):
            patch.setattr(module, "REMATS", (("none", ()), ("full", ())))
        yield


@pytest.fixture(scope="module")
def found(large):
    return search(large, TOPOLOGY, None, budget_seconds=0.0)


def applied(large, words):
    """The config after overrides of the command line, as `maxlm train` reads them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.py"
        path.write_text(source(large))
        args = ["maxlm train", f"--config={path}", *words]
        values = cli._flags(args, config=True)
        cli._parse(values, args, required=("config",))
    return resolve(values.config, devices=TOPOLOGY.devices)


def test_the_winner_fits_keeps_the_batch_and_is_had_by_its_overrides(large, found):
    winner = found.winner
    assert winner.estimate.fits and found.judged > 500
    assert winner.config.data == large.data and winner.config.model == large.model
    assert winner.seconds == min(ranked.seconds for ranked in found.best)
    words = overrides(large, winner.config)
    assert words and applied(large, words) == winner.config
    assert why(found, TOPOLOGY)


@pytest.mark.parametrize("names", [("attention_qkv", "attention_out"), ("attention_out",)])
def test_the_winners_file_and_line_go_through_a_shell(large, found, names, tmp_path, monkeypatch):
    train = dataclasses.replace(large.train, remat="custom", remat_names=names)
    other = dataclasses.replace(large, train=train, parallel=dataclasses.replace(large.parallel, fsdp=4, tensor=2))
    won = dataclasses.replace(found, best=(dataclasses.replace(found.winner, config=other), *found.best))
    monkeypatch.setattr(searching, "search", lambda *_, **__: won)
    file, said = tmp_path / "winner.flags", []
    asked = SimpleNamespace(budget_minutes=0.0, winner=str(file), json=None)
    assert searching.run_search(asked, large, TOPOLOGY, options=None, log=said.append) == 0

    def words(typed):  # in a folder where a pattern would find something
        (tmp_path / "a").touch()
        command = ["bash", "-c", f"printf '%s\\n' {typed}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()

    assert applied(large, words(f"$(cat {file})")) == other
    line = next(line for line in said if line.startswith("add to maxlm train: "))
    assert applied(large, words(line.partition(": ")[2])) == other


def test_compiled_figures_rank_and_the_time_is_kept(large):
    clock = iter(range(0, 100_000, 40)).__next__  # every look at the clock is 40 s later
    asked = []

    def judge(candidate, topology, seconds):  # finds every later candidate faster, and the first too large
        assert 0 <= seconds < 400
        asked.append(candidate)
        return Verdict(1e15 if len(asked) == 1 else 1e9, 10.0 - len(asked), {})

    found = search(large, TOPOLOGY, judge, budget_seconds=400.0, clock=clock)
    assert 2 <= len(asked) <= 6 and not found.late
    assert found.winner.config == asked[-1] and found.winner.verdict is not None
    assert asked[0] not in [ranked.config for ranked in found.best if ranked.verdict]


def test_a_first_compilation_that_takes_too_long_is_ended_and_the_model_answers(large):
    def judge(candidate, topology, seconds):
        assert seconds < 60.0
        raise OutOfTime("enough")

    found = search(large, TOPOLOGY, judge, budget_seconds=60.0)
    assert found.late and all(ranked.verdict is None and not ranked.refused for ranked in found.best)
    assert found.winner.seconds == min(ranked.seconds for ranked in found.best)


def test_without_a_compiler_the_model_answers_alone(large, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(maxlm.plan.compile, "_installed", lambda package: False)
    file, said = tmp_path / "config.py", tmp_path / "plan.json"
    file.write_text(source(large))
    code = cli.main(["plan", f"--config={file}", f"--topology={TOPOLOGY.name}", f"--json={said}", "--price=2"])
    out = " ".join(capsys.readouterr().out.split())
    guess, told = Estimator(large, TOPOLOGY)(large), json.loads(said.read_text())
    assert code == 1 and not guess.fits and not told["fits"]  # keeps everything; it needs remat
    assert "libtpu has to be installed" in out and "answers alone: within 3% of the compiler" in out
    assert "these changes would make it fit" in out
    assert told["memory"]["total"] == pytest.approx(guess.memory.total)
    assert told["forecast"]["seconds"] == pytest.approx(guess.time.total) and not told["compiled"]
    assert told["dollars"] == pytest.approx(told["days"] * 24 * 8 * 2)
    assert told["days"] == pytest.approx(large.train.steps * guess.time.total / 86_400)
    mesh = SimpleNamespace(size=TOPOLOGY.devices)  # the report of a run reads it as it does a compiled plan
    run = SimpleNamespace(workdir=tmp_path, setup=SimpleNamespace(mesh=mesh), device_bytes=None, log=pytest.fail)
    found = foretold(run)
    assert found == Foretold(TOPOLOGY.name, guess.time.total, pytest.approx(guess.memory.total), None)


def test_of_phases_the_heaviest_is_judged(large):
    phases = {"long": PhaseConfig(from_step=9_000, sequence_length=32_768, batch_size=8)}
    phased = dataclasses.replace(
        large,
        data=dataclasses.replace(large.data, phases=phases),
        train=dataclasses.replace(large.train, steps=10_000),
    )
    longer = dataclasses.replace(
        large, data=dataclasses.replace(large.data, sequence_length=32_768, batch_size=8, phases={})
    )
    estimator = Estimator(large, TOPOLOGY)
    assert estimator(phased) == estimator(longer) != estimator(large)
    said = figures(phased, TOPOLOGY, estimator(phased), price=None)
    assert (said["rows"], said["positions"]) == (8, 32_768)
    assert said["phase"] == "steps 9,000 to 9,999, the heaviest of the run's 2 phases"
    assert 1_000 < said["run_steps"] < 1_000 + 9_000 / 2  # a short step has half the tokens, and cheaper ones


def test_what_cannot_fit_is_told_the_smallest_slice_that_can(large):
    small = parse_topology("v5e-4")
    there = resolve(
        dataclasses.replace(large, parallel=ParallelConfig(data=1, fsdp=4), eval=EvalConfig(batch_size=4)), devices=4
    )
    with pytest.raises(SearchError, match=r"does not fit v5e-4: .* the smallest slice that can hold it is v5e-\d+"):
        search(there, small, None, budget_seconds=0.0)


def test_where_none_of_the_leanest_fits_none_of_the_candidates_does(large):
    """Of every mesh, one of them takes as little as any."""
    judge, least = Estimator(large, TOPOLOGY), [{}, {}]
    for place, ways in enumerate((leanest, candidates)):
        for one in ways(large, TOPOLOGY):
            mesh, held = tuple(one.parallel.sizes.values()), judge(one).memory.total
            least[place][mesh] = min(least[place].get(mesh, math.inf), held)
    assert least[0].keys() == least[1].keys()
    for mesh, held in least[0].items():
        assert held == pytest.approx(least[1][mesh], rel=0.01), mesh


def test_three_changes_that_fit_are_named_with_their_cost(large):
    assert not Estimator(large, TOPOLOGY)(large).fits
    changes = cheapest(large, TOPOLOGY)
    assert len(changes) == 3 and [c.slower for c in changes] == sorted(c.slower for c in changes)
    for change in changes:
        after = applied(large, change.overrides)
        assert Estimator(large, TOPOLOGY)(after).fits, change.words
    assert all("--config." in line and "GiB" in line for line in sentences(changes))


def test_changes_keep_to_what_several_slices_can_share_out(large, monkeypatch):
    monkeypatch.setattr(maxlm.plan.changes, "SHOWN", 100)
    sizes = {"data": 2, "fsdp": 4}
    there = dataclasses.replace(large, parallel=dataclasses.replace(large.parallel, **sizes))
    found = {
        name: [change.words for change in cheapest(there, parse_topology(name), usable=200e9)]
        for name in ("v5p-16", "2*v5p-8")
    }
    assert any("from data" in words for words in found["v5p-16"])
    assert found["2*v5p-8"] and not any("from data" in words for words in found["2*v5p-8"])


def test_a_known_need_scales_the_model(large):
    full = dataclasses.replace(large, train=dataclasses.replace(large.train, remat="full"))
    need = 2 * Estimator(full, TOPOLOGY)(full).memory.total
    usable = 1.2 * Estimator(full, TOPOLOGY)(full).memory.total
    assert all(change.bytes <= usable for change in cheapest(full, TOPOLOGY, needs=need, usable=usable))


def test_a_run_that_ran_out_is_told_of_nothing_that_takes_more(large, monkeypatch):
    """Though by the model it would have fitted: the model is known to be wrong there."""
    full = dataclasses.replace(large, train=dataclasses.replace(large.train, remat="full"))
    before = Estimator(full, TOPOLOGY)(full).memory.total
    one = SimpleNamespace(
        platform="tpu", device_kind=CHIPS["v5p"].kinds[0], memory_stats=lambda: {"bytes_limit": 2 * before}
    )
    monkeypatch.setattr(shortage, "jax", SimpleNamespace(devices=lambda: [one] * 8, local_devices=lambda: [one] * 8))
    monkeypatch.setattr(maxlm.plan.changes, "SHOWN", 100)
    lines = [line for line in shortage._advice(full) if "--config." in line]
    assert lines
    for line in lines:
        after = applied(large, shlex.split(line[line.index("--config.") :]) + ["--config.train.remat=full"])
        assert Estimator(full, TOPOLOGY)(after).memory.total < before, line


def test_every_policy_is_one_that_resolve_takes():
    for remat, names in ALL_REMATS:
        resolve(
            dataclasses.replace(config(), train=dataclasses.replace(config().train, remat=remat, remat_names=names))
        )


def test_every_candidate_has_the_devices_and_the_tokens(large):
    for candidate in candidates(large, TOPOLOGY):
        product = 1
        for size in candidate.parallel.sizes.values():
            product *= size
        assert product == TOPOLOGY.devices
        assert candidate.data == large.data
