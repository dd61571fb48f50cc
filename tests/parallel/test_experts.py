"""Experts over a mesh: one step's loss and every gradient are those of one device, and planted bugs are noticed."""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm import tree
from maxlm.config import MoeConfig, ParallelConfig
from maxlm.kernels import grouped
from maxlm.model import moe
from maxlm.model.attention import Sight
from maxlm.model.decoder import merge, split_model
from maxlm.parallel import experts
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.compare import drawn_params, loss_and_gradients
from maxlm.train.setup import make_setup
from tests.compared import too_far
from tests.tiny import MODEL, random_batch, tiny_config

ROWS, LENGTH = 8, 32
BATCH = random_batch(0, ROWS, LENGTH)
EXPERTS = MoeConfig(experts=8, active=2, dim=32, shared_dim=16, balance_loss=0.05, router_z_loss=0.01)
DROPLESS = dataclasses.replace(EXPERTS, selection_bias=True, router="sigmoid", bias_rate=0.01)
LIMITED = dataclasses.replace(EXPERTS, capacity_factor=1.0)

MESHES = {
    "expert 4, fsdp 2": (DROPLESS, dict(data=1, fsdp=2, expert=4), {}),
    "data 2, expert 2, tensor 2": (DROPLESS, dict(data=2, expert=2, tensor=2), {}),
    "fsdp 2, expert 2, tensor 2, accumulation 2, remat": (
        DROPLESS,
        dict(data=1, fsdp=2, expert=2, tensor=2),
        {"train__accumulation": 2, "train__remat": "full"},
    ),
    "fsdp 2, tensor 2, accumulation 4": (DROPLESS, dict(data=1, fsdp=2, tensor=2), {"train__accumulation": 4}),
    "context 2, expert 2, tensor 2": (DROPLESS, dict(data=1, context=2, expert=2, tensor=2), {}),
    "capacity, expert 8": (LIMITED, dict(data=1, expert=8), {}),
    "capacity, data 2, expert 2, accumulation 2": (LIMITED, dict(data=2, expert=2), {"train__accumulation": 2}),
}


DEFAULT = ("capacity, expert 8",)


def config_of(settings, parallel=None, **leaves):
    model = dataclasses.replace(MODEL, num_layers=2, moe=settings)
    return tiny_config(
        "unused",
        model=model,
        data__sequence_length=LENGTH,
        parallel=ParallelConfig(**(parallel or {"data": 1})),
        **{"train__norms_every": 0, **leaves},
    )


@functools.cache
def params_of(settings):
    """Drawn parameters whose biases, where there are any, are not all alike."""
    return drawn_params(split_model(resolve(config_of(settings)).model).specs, seed=2)


def step(settings, parallel=None, **leaves):
    config = config_of(settings, parallel, **leaves)
    count = math.prod(config.parallel.sizes.values())
    config = resolve(config, devices=count)
    return loss_and_gradients(config, BATCH, params=params_of(settings), devices=jax.devices()[:count])


@functools.cache
def reference(settings):
    return step(settings)


def computed(name):
    settings, parallel, leaves = MESHES[name]
    return step(settings, parallel, **leaves)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in DEFAULT else [pytest.mark.slow]) for n in MESHES])
def test_a_mesh_computes_what_one_device_does(name):
    expected, got = reference(MESHES[name][0]), computed(name)
    assert too_far(got, expected) == set()
    for metric in ("load_max_over_mean", "dropped"):
        np.testing.assert_allclose(got.metrics[metric], expected.metrics[metric], rtol=1e-6)
    assert (expected.metrics["dropped"] > 0) == bool(MESHES[name][0].capacity_factor)
    path = "layers/mlp/selection_bias"
    if path in expected.params:  # the step has moved it, by the counts of the whole batch
        np.testing.assert_array_equal(got.params[path], expected.params[path])
        moved = expected.params[path] - tree.paths(params_of(DROPLESS))[path]
        np.testing.assert_allclose(np.abs(moved)[moved != 0], DROPLESS.bias_rate, rtol=1e-4)
        assert np.mean(moved != 0) > 0.9
        assert not expected.gradients[path].any()
    if name == "capacity, expert 8":  # tokens travel a region at a time, and nothing brings all rows together
        assert re.search(r" all-to-all\(", got.program)
        assert not re.search(rf"\[{ROWS},{LENGTH}[,\]][^=]* all-gather\(", got.program)


def routes(settings, parallel):
    """The experts of every layer's tokens, and by how much the last of them beat the best one left out."""
    config = resolve(config_of(settings, parallel), devices=int(np.prod(list(parallel.values()))))
    setup = make_setup(config, make_mesh(config.parallel, jax.devices()[: int(np.prod(list(parallel.values())))]))
    found = []

    def recorded(logits, bias, moe_config):
        routed = route(logits, bias, moe_config)
        scores = jax.nn.softmax(logits) if moe_config.router == "softmax" else jax.nn.sigmoid(logits)
        best = jax.lax.top_k(scores if bias is None else scores + bias, moe_config.active + 1)[0]
        found.append((routed.experts, best[..., -2] - best[..., -1]))
        return routed

    @jax.jit
    def run(params):
        model = merge(setup.parts.graphdef, params)
        sight = Sight(BATCH.positions, BATCH.segments, BATCH.segments, real=BATCH.segments > 0)
        x = model.embedding(jnp.asarray(BATCH.tokens), sight.positions, runtime=setup.runtime)
        graphdef, state = nnx.split(model.layers)
        for layer in range(config.model.num_layers):
            block = nnx.merge(graphdef, jax.tree.map(lambda p, i=layer: p[i], nnx.to_pure_dict(state)))
            x = block(x, sight=sight, window=0, runtime=setup.runtime).out
        return found

    route = moe.route
    with mock.patch("maxlm.model.moe.route", recorded):
        return jax.device_get(run(jax.device_put(params_of(settings), setup.shardings.params)))


def test_choices_are_clear_and_alike():
    """What the comparison of gradients rests on: no tie that another order of float32 sums could break."""
    real = BATCH.segments > 0
    for settings in (DROPLESS, LIMITED):
        one, mesh = routes(settings, {"data": 1}), routes(settings, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
        assert len(one) == len(mesh) == 2
        for (chosen, margin), (other, _) in zip(one, mesh, strict=True):
            assert margin[real].min() > 1e-4, margin[real].min()
            np.testing.assert_array_equal(chosen[real], other[real])


def test_a_token_that_goes_elsewhere_is_noticed():
    """Also where the busiest expert, which the metrics tell of, is as busy as before."""
    expected = reference(LIMITED)
    load = expected.metrics["load"].copy()
    assert load.shape == (2, LIMITED.experts)
    np.testing.assert_array_equal(load.sum(axis=1), 2 * (BATCH.segments > 0).sum())
    idle, next_idle = np.argsort(load[1])[:2]
    load[1, [idle, next_idle]] += -1, 1
    got = expected._replace(metrics={**expected.metrics, "load": load})
    assert too_far(got, expected) == {"which experts the tokens went to"}


def test_experts_are_really_sharded():
    settings, parallel = DROPLESS, dict(data=1, fsdp=2, expert=2, tensor=2)
    config = resolve(config_of(settings, parallel), devices=8)
    shardings = make_setup(config, make_mesh(config.parallel)).shardings
    up = shardings.params["layers"]["mlp"]["up"]
    assert up.shard_shape((2, 8, 32, 32)) == (2, 4, 16, 16)


WIDE = MoeConfig(experts=32, active=1, dim=128)
GATHERED = 3 * 4 * WIDE.experts * MODEL.embed_dim * WIDE.dim  # bytes of a layer's experts, float32 and whole


def wide_setup(**leaves):
    config = resolve(config_of(WIDE, dict(data=1, fsdp=4), **leaves), devices=4)
    return make_setup(config, make_mesh(config.parallel, jax.devices()[:4]))


def test_no_layers_gathered_experts_are_kept_for_the_backward_pass():
    """Without remat a step has of all layers' experts what one with remat has, whose layers are gathered again."""
    layers = 6

    def temporaries(remat):
        leaves = {"model__num_layers": layers, "train__remat": remat}
        compiled = wide_setup(**leaves).lower(4, LENGTH).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # What is kept of the tokens is far less than the experts: the hidden dims of a device's 32 tokens, 16 KiB each.
    assert temporaries("none") - temporaries("full") < layers * GATHERED / 4


def test_experts_are_gathered_in_the_compute_dtype_and_their_gradients_added_up_in_float32():
    text = wide_setup(train__precision="bfloat16").lower(ROWS, LENGTH).as_text()
    whole = rf"{WIDE.experts}x(?:{MODEL.embed_dim}x{WIDE.dim}|{WIDE.dim}x{MODEL.embed_dim})"
    gathers = re.findall(rf"all_gather.*-> tensor<{whole}x(\w+)>", text)
    assert len(gathers) == 6 and set(gathers) == {"bf16"}  # three matrices, forwards and backwards
    summed = re.findall(rf"reduce_scatter[^>]*?.*?\n(?:.*\n)*?.*\(tensor<{whole}x(\w+)>\)", text)
    assert len(summed) == 3 and set(summed) == {"f32"}


def ragged_by_gathers(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `lax.ragged_all_to_all` is documented to do, for CPUs: every device has all, and picks out its own.

    NaN comes where a device was told of another number of rows than it is sent.
    """
    whole = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    operands, begins, sizes, places = map(whole, (operand, input_offsets, send_sizes, output_offsets))
    me, rows = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for sender in range(operands.shape[0]):
        first, count = places[sender, me], sizes[sender, me]
        sent = jnp.take(operands[sender], begins[sender, me] + rows - first, axis=0, mode="fill", fill_value=0)
        sent = jnp.where(recv_sizes[sender] == count, sent, jnp.nan)
        output = jnp.where(((rows >= first) & (rows < first + count))[:, None], sent, output)
    return output


@pytest.mark.parametrize("settings", [DROPLESS, pytest.param(LIMITED, marks=pytest.mark.slow)])
def test_sending_only_the_rows_there_are_computes_the_same(settings):
    """What TPUs and GPUs run, with a stand-in for the one collective that XLA has not for CPUs.

    Memory that nothing is written to is NaN, so that nothing may come of it.
    """
    calls = []

    def counted(*args, **rest):
        calls.append(args)
        return ragged_by_gathers(*args, **rest)

    with (
        mock.patch.object(experts, "RAGGED_PLATFORMS", ("cpu",)),
        mock.patch.object(jax.lax, "ragged_all_to_all", counted),
        mock.patch.object(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype)),
    ):
        got = step(settings, {"data": 1, "expert": 4})
    assert calls
    assert too_far(got, reference(settings)) == set()


# --- planted bugs, which the same comparison has to notice -----------------------------------------------------------


def test_a_doubled_auxiliary_loss_is_noticed():
    """Accumulation that adds each microbatch's mean, instead of its share of the whole batch's."""
    right, expected = moe.auxiliary_losses, reference(LIMITED)

    def doubled(config, aux, *, rows):
        return right(config, aux, rows=rows // 2)

    with mock.patch("maxlm.model.moe.auxiliary_losses", doubled):
        found = too_far(step(LIMITED, train__accumulation=2), expected)
    assert found >= {"balance_loss", "layers/mlp/router"}


def test_a_missing_reduction_of_gradients_is_noticed():
    """The gradient of gathered weights without the sum over the devices that gathered them."""

    def unreduced(dw, cut):
        size = dw.shape[cut.dim] // jax.lax.axis_size(cut.axis)
        start = jax.lax.axis_index(cut.axis) * size
        return jax.lax.dynamic_slice_in_dim(dw, start, size, axis=cut.dim)

    expected = reference(DROPLESS)
    with mock.patch.object(grouped, "_own", unreduced):
        found = too_far(computed("fsdp 2, expert 2, tensor 2, accumulation 2, remat"), expected)
    assert found >= {f"layers/mlp/{name}" for name in ("gate", "up", "down")}
