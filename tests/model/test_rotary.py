"""Rotary positions by products, as on TPUs, are those by slices: values and gradients, to the last bit of bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.config import AttentionConfig, LatentConfig, RopeConfig
from maxlm.model import attention, rotary
from maxlm.model.attention import GroupedQueryAttention, Sight
from maxlm.model.latent import LatentAttention
from maxlm.model.runtime import Runtime
from tests.tiny import MODEL

LATENT = AttentionConfig(
    q_heads=4, kv_heads=4, head_dim=16, latent=LatentConfig(kv_dim=12, query_dim=10, rope_dim=4, value_dim=6)
)

PLACES = {
    "halves": RopeConfig(),
    "in turn": RopeConfig(interleaved=True),
    "a part of the dims": RopeConfig(fraction=0.25),
    "a part, in turn": RopeConfig(fraction=0.5, interleaved=True),
    "longer texts": RopeConfig(scaling="yarn", factor=4.0, original_length=16),
    "no dims": RopeConfig(fraction=0.0),
}


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
@pytest.mark.parametrize("name", PLACES)
def test_products_turn_as_slices_do(name, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    x, g = (jax.random.normal(key, (2, 32, 3, 16)).astype(dtype) for key in keys)
    positions = jnp.stack([jnp.arange(32), jnp.arange(32) + 1000])

    @jax.jit
    def both(x, g):
        def turn(by_products):
            how = {"positions": positions, "windowed": False, "by_products": by_products}
            out, pull = jax.vjp(lambda x: rotary.rotary(x, PLACES[name], **how), x)
            return out, *pull(g)

        return turn(False), turn(True)

    plain, found = both(x, g)
    for a, b in zip(plain, found, strict=True):
        assert a.dtype == b.dtype == jnp.dtype(dtype)
        if dtype == "float32":  # XLA contracts sums and products differently
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        else:
            same = np.asarray(a, np.float32) == np.asarray(b, np.float32)
            assert same.mean() > 0.999  # the rest lies on the edge of two roundings
            np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (a, b)), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("interleaved", (False, True))
def test_products_move_dims_exactly(interleaved, dtype):
    """All finite numbers there are, but for those that CPUs may flush to zero."""
    x = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).reshape(1, -1, 1, 16)
    x = np.where(np.isfinite(x.astype(np.float32)), x, 0)
    normal = np.abs(x.astype(np.float32)) >= np.finfo(np.float32).tiny
    for order in rotary._orders(interleaved, 16, pairs=6):
        for places in (order, np.argsort(order)):
            moved = np.asarray(rotary._moved(jnp.asarray(x), places))
            assert moved.dtype == np.float32
            where = normal[..., places]
            assert np.array_equal(moved[where], x[..., places].astype(np.float32)[where])
    assert sorted(order) == list(range(16)) and list(order) != list(range(16))


@pytest.mark.parametrize("module", (GroupedQueryAttention, LatentAttention))
def test_attention_turns_by_products_where_it_is_told_to(module, monkeypatch):
    asked = []
    config = dataclasses.replace(MODEL, attention=LATENT if module is LatentAttention else MODEL.attention)
    layer, x = module(config, rngs=nnx.Rngs(0)), jnp.ones((1, 4, config.embed_dim), jnp.bfloat16)
    positions = jnp.arange(4)[None]
    monkeypatch.setattr(attention, "rotary", lambda y, *_, by_products, **__: asked.append(by_products) or y)
    for told in (False, True):
        runtime = Runtime(dtype=jnp.bfloat16, turn_by_products=told)
        layer(x, sight=Sight(positions, None, None), window=0, runtime=runtime)
    assert asked == [False, False, True, True]


def test_products_pay_on_tpus_in_half_precision():
    pays = rotary.pays_by_products
    assert pays("tpu", "bfloat16") and pays("tpu", jnp.float16)
    assert not (pays("tpu", "float32") or pays("gpu", "bfloat16") or pays("cpu", "bfloat16"))
