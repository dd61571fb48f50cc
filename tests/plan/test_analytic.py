"""The analytical model against what it models: declared shardings, the FLOP ledger, compiled programs."""

import dataclasses
import math

import jax
import numpy as np
import pytest

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
    StoreConfig,
    TokenizerConfig,
    TrainConfig,
)
from maxlm.jaxpr import subprograms
from maxlm.model.flops import ledger
from maxlm.parallel.mesh import make_mesh
from maxlm.plan.analytic import Estimator, timing
from maxlm.plan.analytic.memory import facts, memory, state_bytes, state_leaves
from maxlm.plan.analytic.symbols import COLUMNS, values
from maxlm.plan.analytic.timing import SCORE_BYTES, _attention_flops, _scores_bytes, axis_spans
from maxlm.plan.analytic.walk import KINDS
from maxlm.plan.topology import parse_topology
from maxlm.resolve import resolve
from maxlm.train.setup import abstract_batch, make_setup

ROWS, LENGTH = 16, 256
TOPOLOGY = parse_topology("v5p-16")


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
    # Splash computes the scores again for dK and dV, and for dQ; the CPU's kernels once.
    for platform, backward in (("tpu", 3.5), ("cpu", 2.5)):
        found = _attention_flops(resolved, amounts, platform)
        assert found == pytest.approx((1 + backward) * scores * ROWS * LENGTH / 8)


def test_scores_that_no_kernel_keeps_go_through_memory():
    """Else a ring, whose blocks XLA multiplies, looks faster than the kernel that it takes the place of."""
    fused, ring = config(remat="none"), config(remat="none", mesh={"fsdp": 4, "context": 2})
    assert _scores_bytes(fused, done(fused), "tpu") == 0
    assert _scores_bytes(ring, done(ring), "cpu") == 0
    seen = 2 * 8 * (LENGTH + 1) / 2  # layers, heads, and positions that a query sees on average
    assert _scores_bytes(ring, done(ring), "tpu") == pytest.approx(sum(SCORE_BYTES) * seen * ROWS * LENGTH / 8)


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
    for experts in (0, 8):
        of = {"experts": experts, "precision": "bfloat16"}
        wide, narrow = (done(config(reduce_dtype=dtype, **of)) for dtype in ("float32", "bfloat16"))
        assert narrow["reduce_weights"] == pytest.approx(wide["reduce_weights"] / 2)
        assert narrow["gather_weights"] == wide["gather_weights"]
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
    # Half a side is not closed, and neither is what is left of it.
    assert lanes(fsdp=32, tensor=2) == {"fsdp": 5, "tensor": 1}


def test_a_pipeline_pays_for_tensor_and_once_for_its_optimizer():
    mesh = {"fsdp": 2, "pipeline": 2, "tensor": 2}
    flat, staged = config(remat="none", mesh={"fsdp": 4, "tensor": 2}), config(mesh=mesh, remat="none", accumulation=8)
    # Without a cut stream the sums over `tensor` are all-reduces, of half the layers on twice the rows a device.
    assert done(staged)["reduce_stream"] == pytest.approx(done(flat)["reduce_stream"])
    assert done(staged)["gather_stream"] == pytest.approx(done(flat)["gather_stream"], rel=0.1)
    few, many = (
        dataclasses.replace(config(mesh=mesh, remat="none", accumulation=count), optim=OptimConfig(optimizer="muon"))
        for count in (2, 4)
    )
    plain, more = (dataclasses.replace(one, optim=OptimConfig(optimizer="adamw")) for one in (few, many))
    own = done(few)["product"] - done(plain)["product"]
    assert own > 0 and done(many)["product"] - done(more)["product"] == pytest.approx(own)


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
