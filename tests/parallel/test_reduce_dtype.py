"""Gradients that cross the mesh in bfloat16: on every mesh those of float32 sums, but for that rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import Config, DataConfig, MoeConfig, ParallelConfig, StoreConfig, TokenizerConfig, TrainConfig
from maxlm.kernels.matmul import einsum
from maxlm.model.decoder import split_model
from maxlm.resolve import resolve
from maxlm.train.compare import drawn_params, example_batch, loss_and_gradients
from tests.tiny import MODEL

ROWS, LENGTH = 16, 16
MESHES = {
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "experts": {"data": 2, "fsdp": 2, "expert": 2},
    "pipeline": {"data": 1, "pipeline": 2, "fsdp": 2, "context": 2},
}


def config_of(reduce_dtype, mesh, *, experts):
    moe = MoeConfig(experts=4, active=2, dim=16) if experts else MoeConfig()
    return resolve(
        Config(
            name="reduced",
            model=dataclasses.replace(MODEL, moe=moe),
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


@pytest.mark.parametrize("name", MESHES)
def test_gradients_are_those_of_wide_sums_but_for_one_rounding(name):
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


@pytest.mark.parametrize("dtype, written", [("float32", "f32"), ("bfloat16", "bf16")])
def test_a_product_writes_its_weights_gradient_in_what_the_mesh_adds_up(dtype, written):
    """XLA adds up right behind the product."""
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 16))

    def total(w):
        return jnp.sum(einsum("bd,df->bf", x, w, dtype=jnp.bfloat16, reduce_dtype=dtype).astype(jnp.float32))

    text = jax.jit(jax.grad(total)).lower(w).as_text()
    (product,) = [line for line in text.splitlines() if "dot_general" in line]
    assert product.endswith(f"-> tensor<8x16x{written}>") and jax.eval_shape(jax.grad(total), w).dtype == jnp.float32
