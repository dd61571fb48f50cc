"""16-bit floats that a loop keeps as integers: the same numbers, and no float32 copy of all that it keeps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.kernels.bits import as_floats, as_integers, kept_as_integers

LAYERS, ROWS, WIDTH = 3, 8, 16


def body(x, layer):
    """A layer with an argument that has no gradient, and a second result."""
    w, shift = layer
    y = jnp.tanh(jnp.dot(x, w.astype(x.dtype)))
    return x + y * shift.astype(x.dtype), y.astype(jnp.float32).mean()


def gradients(function, dtype):
    w = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH))
    x = jax.random.normal(jax.random.key(1), (ROWS, WIDTH)).astype(dtype)

    def loss(x, w):
        out, means = jax.lax.scan(function, x, (w, jnp.arange(LAYERS)))
        return out.astype(jnp.float32).sum() + means.sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, w).compile(), (x, w)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
@pytest.mark.parametrize("wrap", (lambda f: f, jax.checkpoint), ids=("kept", "recomputed"))
def test_a_loop_that_keeps_integers_has_the_same_gradients_to_the_last_bit(dtype, wrap):
    plain, given = gradients(wrap(body), dtype)
    found, _ = gradients(kept_as_integers(wrap(body)), dtype)
    for a, b in zip(*map(jax.tree.leaves, (plain(*given), found(*given))), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_the_loop_keeps_is_no_longer_there_in_float32():
    """Should the plain loop come to keep no float32 either, this module may go."""

    def kept(function):
        program = gradients(function, "bfloat16")[0].as_text()
        return {kind for kind in ("f32", "bf16", "u16") if re.search(rf"\b{kind}\[{LAYERS},{ROWS},{WIDTH}\]", program)}

    assert "f32" in kept(body)
    assert kept(kept_as_integers(body)) == {"u16"}


def test_integers_are_floats_again_bit_for_bit():
    bits = jnp.arange(2**16, dtype=jnp.uint16)
    tree = {"a": jax.lax.bitcast_convert_type(bits, jnp.bfloat16), "b": jnp.ones(2), "c": jnp.arange(3)}
    turned = as_integers(tree)
    assert turned["a"].dtype == jnp.uint16 and turned["b"] is tree["b"] and turned["c"] is tree["c"]
    back = as_floats(turned, tree)
    assert back["a"].dtype == jnp.bfloat16 and np.array_equal(jax.lax.bitcast_convert_type(back["a"], jnp.uint16), bits)
