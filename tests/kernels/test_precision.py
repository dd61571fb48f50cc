"""Float32 operands are multiplied in float32 on every platform: read off the programs that XLA is given.

A TPU rounds the operands of a product to bfloat16 and an NVIDIA GPU to TF32 unless the product says otherwise.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from maxlm.config import MoeConfig
from maxlm.kernels import attention, grouped, splash
from maxlm.kernels.matmul import einsum
from maxlm.model.attention import Sight
from maxlm.model.moe import MoeMlp
from maxlm.model.runtime import Runtime
from tests.tiny import tiny_config


def products(function, *args):
    """Whether each product of the function and of its gradient keeps all bits."""
    text = jax.jit(jax.grad(lambda *args: jnp.sum(function(*args).astype(jnp.float32)), argnums=(0, 1))).lower(*args)
    lines = [line for line in text.as_text().splitlines() if "dot_general" in line or "ragged_dot" in line]
    lines = [line for line in lines if "=" in line]
    assert lines
    return ["HIGHEST" in line and "DEFAULT" not in line for line in lines]


def product(dtype):
    x, w = jnp.ones((2, 3, 8), dtype), jnp.ones((8, 4))
    return functools.partial(einsum, "bsd,df->bsf", dtype=dtype), x, w


def attend(name, dtype):
    q = jnp.ones((1, 128, 2, 8), dtype)
    backend = next(backend for backend in attention.BACKENDS if backend.name == name)
    kernel = functools.partial(splash.splash, interpret=True) if name == "splash" else backend.kernel
    return lambda q, k: kernel(q, k, k, attention.Mask(scale=0.4)), q, q


def rows(backend, dtype):
    x, w, sizes = jnp.ones((16, 8), dtype), jnp.ones((2, 8, 4)), jnp.array([9, 7], jnp.int32)
    return lambda x, w: grouped.grouped_product(x, w, sizes, backend=backend, dtype=dtype), x, w


GROUPED = [grouped.PLAIN, grouped.megablox(interpret=True), *(b for b in grouped.BACKENDS if b.name != "megablox")]
MAKERS = {
    "product": product,
    **{name: functools.partial(attend, name) for name in ("plain", "heads_loop", "chunked", "splash")},
    **{f"grouped {backend.name}": functools.partial(rows, backend) for backend in GROUPED},
}


@pytest.mark.parametrize("name", MAKERS)
def test_float32_products_keep_all_bits_and_others_are_as_they_were(name):
    function, *args = MAKERS[name](jnp.float32)
    assert all(products(function, *args))
    function, *args = MAKERS[name](jnp.bfloat16)
    assert not any(products(function, *args))


def test_the_router_keeps_all_bits_in_a_run_that_computes_in_bfloat16():
    model = tiny_config("unused", model__moe=MoeConfig(experts=4, active=2, dim=8, shared_dim=0)).model
    graphdef, state = nnx.split(MoeMlp(model, rngs=nnx.Rngs(params=0)))
    sight = Sight(jnp.arange(16)[None], None, None)

    def run(x, state):
        layer = nnx.merge(graphdef, state)
        return layer(x, sight=sight, runtime=Runtime(dtype=jnp.bfloat16)).out

    kept = products(run, jnp.ones((1, 16, model.embed_dim), jnp.bfloat16), state)
    assert sum(kept) == 3  # the logits, and the gradients of tokens and router
    assert len(kept) > 3  # the experts', in bfloat16
