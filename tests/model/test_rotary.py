"""Rotary positions by products, as on TPUs, are those by slices: values and gradients, to the last bit of bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import RopeConfig
from maxlm.model.rotary import rotary

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
            out, pull = jax.vjp(lambda x: rotary(x, PLACES[name], **how), x)
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


def test_products_move_half_precision_exactly():
    """All positive bfloat16 numbers there are, turned by nothing: position 0."""
    bits = np.arange(2**15, dtype=np.uint16)
    x = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    x = jnp.where(jnp.isfinite(x), x, 0).reshape(1, -1, 1, 16)
    out = rotary(x, RopeConfig(), positions=jnp.zeros((1, x.shape[1]), jnp.int32), windowed=False, by_products=True)
    normal = np.abs(np.asarray(x, np.float32)) >= np.finfo(np.float32).tiny  # CPUs may flush what is smaller
    assert np.array_equal(np.asarray(out, np.float32)[normal], np.asarray(x, np.float32)[normal])
