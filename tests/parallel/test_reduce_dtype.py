"""Gradients that cross the mesh in bfloat16: on every mesh those of float32 sums, but for that rounding."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import (
    AttentionConfig,
    Config,
    DataConfig,
    MoeConfig,
    ParallelConfig,
    StoreConfig,
    TokenizerConfig,
    TrainConfig,
)
from maxlm.kernels.experts import Experts, Linear, Routes
from maxlm.kernels.matmul import einsum
from maxlm.model.decoder import split_model
from maxlm.model.loss import chunked_cross_entropy
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train import setup
from maxlm.train.compare import drawn_params, example_batch, loss_and_gradients
from maxlm.train.setup import make_runtime, outermost_label
from tests.tiny import MODEL

ROWS, LENGTH = 16, 16
MESHES = {
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "experts": {"data": 2, "fsdp": 2, "expert": 2},
    "pipeline": {"data": 1, "pipeline": 2, "fsdp": 2, "context": 2},
}


def config_of(reduce_dtype, mesh, *, experts, model=MODEL):
    moe = MoeConfig(experts=4, active=2, dim=16) if experts else MoeConfig()
    return resolve(
        Config(
            name="reduced",
            model=dataclasses.replace(model, moe=moe),
            data=DataConfig(
                stores={"none": StoreConfig(source="text:none")},
                tokenizer=TokenizerConfig(kind="bytes"),
                sequence_length=LENGTH,
                batch_size=ROWS,
            ),
            parallel=ParallelConfig(**mesh),
            train=TrainConfig(reduce_dtype=reduce_dtype, accumulation=4 if "pipeline" in mesh else 1),
        ),
        devices=8,
    )


@pytest.mark.parametrize("name, outermost", [*((name, "") for name in MESHES), ("fsdp", "d"), ("tensor", "d")])
def test_gradients_are_those_of_wide_sums_but_for_one_rounding(monkeypatch, name, outermost):
    monkeypatch.setattr(setup, "outermost_label", lambda *_: outermost)
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = config_of(dtype, MESHES[name], experts=name == "experts")
        batch = example_batch(1, rows=ROWS, length=LENGTH, vocab=config.model.vocab_size)
        params = drawn_params(split_model(config.model).specs, seed=2)
        found[dtype] = loss_and_gradients(config, batch, params=params)
    wide, narrow = found["float32"], found["bfloat16"]
    assert narrow.metrics["loss"] == wide.metrics["loss"]  # the forward pass is the same, to the bit
    for path, expected in wide.gradients.items():
        distance = np.linalg.norm(narrow.gradients[path] - expected) / np.linalg.norm(expected)
        weight = expected.ndim > 1 and not path.endswith(("scale", "router"))
        assert distance < 2**-7 and (distance > 2**-12) == weight, (path, distance)


def test_experts_are_not_rounded_where_fsdp_adds_nothing_up():
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = config_of(dtype, {"data": 2, "fsdp": 1, "expert": 4}, experts=True)
        batch = example_batch(1, rows=ROWS, length=LENGTH, vocab=config.model.vocab_size)
        params = drawn_params(split_model(config.model).specs, seed=2)
        found[dtype] = loss_and_gradients(config, batch, params=params).gradients
    experts = [f"layers/mlp/{name}" for name in ("gate", "up", "down")]
    for path in experts:
        np.testing.assert_array_equal(found["bfloat16"][path], found["float32"][path], err_msg=path)


def sums(function, *args):
    """Shapes and dtypes of what is scattered, as XLA is asked for it (CPUs widen it after)."""
    text = jax.jit(function).lower(*args).as_text()
    scattered = r'stablehlo\.reduce_scatter".*?\}\) : \(tensor<([\dx]+)x(\w+)>\)'
    return {(*map(int, dims.split("x")), dtype) for dims, dtype in re.findall(scattered, text, re.DOTALL)}


@pytest.mark.parametrize("dtype, written", [("float32", "f32"), ("bfloat16", "bf16")])
def test_table_head_and_experts_send_what_they_say(monkeypatch, dtype, written):
    config = config_of(dtype, {"data": 1, "fsdp": 8}, experts=True)
    runtime, _ = make_runtime(config, make_mesh(config.parallel), segments=False)
    hidden, table = jnp.ones((8, 4, 16), jnp.bfloat16), jnp.ones((24, 16))
    tokens, weights = jnp.zeros((8, 4), jnp.int32), jnp.ones((8, 4))

    def looked_up(table):
        return jnp.sum(runtime.lookup(table, tokens, scale=1.0, dtype=jnp.float32))

    def nll(head):
        how = {"chunk": 8, "softcap": 0.0, "z_loss": 0.0, "spread": runtime.spread_loss}
        return chunked_cross_entropy(hidden, head, tokens, weights, **how).nll_sum

    def through(kernel):
        linear = Linear(kernel), Linear(kernel.swapaxes(1, 2))
        routes = Routes(tokens[..., None], weights[..., None])
        how = {"hidden": lambda _, up: up, "dtype": jnp.bfloat16}
        return jnp.sum(runtime.experts(hidden, routes, Experts(None, *linear), **how))

    assert (24, 16, written) in sums(jax.grad(looked_up), table)
    monkeypatch.setattr(setup, "outermost_label", lambda *_: "d")
    runtime, _ = make_runtime(config, make_mesh(config.parallel), segments=False)
    assert (8, 24, 2, written) in sums(jax.grad(looked_up), table)  # part by part
    assert (2, 16, 12, written) in sums(jax.grad(nll), table.T)  # half by half
    assert {(4, 16, 8, written), (4, 8, 16, written)} <= sums(jax.grad(through), jnp.ones((4, 16, 8)))


def test_nothing_is_rounded_where_nothing_is_added_up():
    for mesh, expected in (({"data": 1, "tensor": 8}, "float32"), ({"data": 4, "tensor": 2}, "bfloat16")):
        model = dataclasses.replace(MODEL, attention=AttentionConfig(q_heads=8, kv_heads=8, head_dim=8))
        config = config_of("bfloat16", mesh, experts=False, model=model)
        runtime, _ = make_runtime(config, make_mesh(config.parallel), segments=False)
        assert runtime.reduce_dtype == expected


@pytest.mark.parametrize(
    "platform, fsdp, dtype, expected",
    [
        ("tpu", 64, "bfloat16", "d"),
        ("tpu", 32, "bfloat16", ""),
        ("tpu", 64, "float32", ""),
        ("gpu", 64, "bfloat16", ""),
        ("tpu", 1, "bfloat16", ""),
    ],
)
def test_what_would_be_summed_whole_is_written_with_the_width_outermost(platform, fsdp, dtype, expected):
    """Llama 3 70B, 8,192 wide; gpt-oss on one device, 2,880 wide."""
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device], dtype=object), shape={"fsdp": fsdp})
    assert outermost_label(8192 if fsdp > 1 else 2880, mesh, dtype) == expected


@pytest.mark.parametrize("spec, order", [("bsf,fd->bsd", "8x16"), ("bsd,df->bsf", "8x16"), ("bsnh,nhd->bsd", "8x2x8")])
def test_a_gradient_that_is_written_with_another_dim_outermost_is_the_same(spec, order):
    """`d` is 8; what the products write is looked at too."""
    sizes = {"b": 2, "s": 4, "d": 8, "f": 16, "n": 2, "h": 8}
    left, right = spec.split("->")[0].split(",")
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = (jax.random.normal(key, [sizes[c] for c in term]) for key, term in zip(keys, (left, right), strict=True))

    def gradient(outermost):
        def total(w):
            y = einsum(spec, x, w, dtype=jnp.bfloat16, reduce_dtype="bfloat16", outermost=outermost)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        return jax.jit(jax.grad(total))

    np.testing.assert_allclose(gradient("d")(w), gradient("")(w), rtol=1e-2)
    pinned, free = (gradient(label).lower(w).as_text() for label in ("d", ""))
    assert f"-> tensor<{order}xbf16>" in pinned
    assert ("LayoutConstraint" in pinned) == (right[0] != "d") and "LayoutConstraint" not in free


@pytest.mark.parametrize("dtype, written", [("float32", "f32"), ("bfloat16", "bf16")])
def test_a_product_writes_its_weights_gradient_in_what_the_mesh_adds_up(dtype, written):
    """XLA adds up right behind the product."""
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 16))

    def total(w):
        return jnp.sum(einsum("bd,df->bf", x, w, dtype=jnp.bfloat16, reduce_dtype=dtype).astype(jnp.float32))

    text = jax.jit(jax.grad(total)).lower(w).as_text()
    (product,) = [line for line in text.splitlines() if "dot_general" in line]
    assert product.endswith(f"-> tensor<8x16x{written}>") and jax.eval_shape(jax.grad(total), w).dtype == jnp.float32
