"""The units of a layer: together they are its gradient, and none does another's work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from maxlm.model.flops import count_matmul_flops
from maxlm.parallel.pipeline.split import LayerOut, split_layer

DIM, HIDDEN, ROWS = 8, 16, 4
WEIGHTS = 2 * 2 * ROWS * DIM * HIDDEN  # FLOPs of the forward products with a weight
KEYS = 2 * 2 * ROWS * ROWS * DIM  # and of those without


def layer(params, x, shared):
    normed = x * params["scale"] * shared["angle"]
    mixed = jnp.tanh(normed @ normed.T) @ normed
    hidden = jax.nn.gelu(mixed @ params["up"].astype(jnp.float32))
    y = x + hidden @ params["down"]
    return LayerOut(y, jnp.sum(y**2), {"rms": jnp.mean(jax.lax.stop_gradient(y) ** 2)})


@functools.cache
def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (DIM, HIDDEN)),
        "down": jax.random.normal(keys[1], (HIDDEN, DIM)),
        "scale": jnp.linspace(0.5, 1.5, DIM),
        "unused": jnp.ones((3, 3)),
    }
    x, dy = jax.random.normal(keys[2], (2, ROWS, DIM))
    return params, x, {"angle": jnp.linspace(-1, 1, DIM)}, dy


def of(remat: bool):
    params, x, shared, _ = arguments()
    block = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    return split_layer(block, params, x, shared)


def test_what_is_used_of_jax_is_there_in_the_oldest_version_that_is_declared(monkeypatch):
    """`jaxprs_in_params` came with 0.10."""
    monkeypatch.delattr(core, "jaxprs_in_params", raising=False)
    assert of(remat=True).kept


@pytest.mark.parametrize("remat", [False, True])
def test_units_add_up_to_the_gradient(remat):
    params, x, shared, dy = arguments()
    split = of(remat)

    def total(params, x):
        out = layer(params, x, shared)
        return jnp.sum(out.x * dy) + out.loss

    grads, dx = jax.grad(total, (0, 1))(params, x)
    ahead = split.forward(params, x, shared)
    back = split.input(params, shared, ahead.kept, dy)
    late = split.weight(params, shared, ahead.kept, back.pairs)
    whole = split.backward(params, shared, ahead.kept, dy)
    np.testing.assert_allclose(ahead.out.x, layer(params, x, shared).x, rtol=1e-6)
    np.testing.assert_allclose(back.dx, dx, rtol=1e-5)
    assert np.array_equal(back.dx, whole.dx)
    for early, after, both, wanted in zip(back.grads, late, whole.grads, jax.tree.leaves(grads), strict=True):
        assert (early is None) != (after is None)
        np.testing.assert_allclose(both, wanted, rtol=1e-5, atol=1e-6)
        assert np.array_equal(early if after is None else after, both)
    # In the order of the leaves (down, scale, unused, up): the matrices wait, the vector does not.
    assert [grad is None for grad in late] == [False, True, True, False]


@pytest.mark.parametrize("remat", [False, True])
def test_no_unit_does_anothers_products(remat):
    params, x, shared, dy = arguments()
    split = of(remat)
    ahead = split.forward(params, x, shared)
    back = split.input(params, shared, ahead.kept, dy)

    def flops(unit, *args):
        return count_matmul_flops(jax.make_jaxpr(lambda *args: jax.tree.leaves(unit(*args)))(*args))

    again = KEYS + WEIGHTS if remat else 0  # all of it, as the loss's gradient needs the output too
    assert flops(split.forward, params, x, shared) == WEIGHTS + KEYS
    assert flops(split.input, params, shared, ahead.kept, dy) == WEIGHTS + 2 * KEYS + again
    assert flops(split.weight, params, shared, ahead.kept, back.pairs) == WEIGHTS
    assert flops(split.backward, params, shared, ahead.kept, dy) == 2 * WEIGHTS + 2 * KEYS + again
    weight = jax.make_jaxpr(lambda *args: jax.tree.leaves(split.weight(*args)))(params, shared, ahead.kept, back.pairs)
    assert not {"tanh", "erf", "exp", "logistic"} & {equation.primitive.name for equation in weight.eqns}


def test_what_is_handed_on_holds_no_parameters_and_under_remat_the_input_alone():
    shapes = [k.shape for k in of(remat=False).kept]
    assert (DIM, HIDDEN) not in shapes and (HIDDEN, DIM) not in shapes
    assert [k.shape for k in of(remat=True).kept] == [(ROWS, DIM)]
    pairs = sorted(p.shape for p in of(remat=False).pairs)
    assert pairs == [(ROWS, DIM), (ROWS, HIDDEN)]  # the gradients of both products; their inputs were kept


def spread_layer(params, x, shared):
    """The two matrices alone, in an island whose devices hold a part of the hidden dims each."""
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, up, down):
        scale = 1.0 + jax.lax.axis_index("tensor")  # follows nothing, and is made in both parts
        return jax.lax.psum(scale * jnp.tanh(x @ up) @ down, "tensor")

    specs = (jax.P(), jax.P(None, "tensor"), jax.P("tensor", None))
    island = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)
    return LayerOut(x + island(x * shared["angle"], params["up"], params["down"]), jnp.float32(0), {})


@pytest.mark.parametrize("remat", [False, True])
def test_an_island_is_cut_where_the_units_are(remat):
    params, x, shared, dy = arguments()
    params = {name: params[name] for name in ("up", "down")}
    block = jax.checkpoint(spread_layer, prevent_cse=False) if remat else spread_layer
    split = split_layer(block, params, x, shared)
    grads, dx = jax.jit(jax.grad(lambda p, x: jnp.sum(spread_layer(p, x, shared).x * dy), (0, 1)))(params, x)
    ahead = jax.jit(split.forward)(params, x, shared)
    back = jax.jit(split.input)(params, shared, ahead.kept, dy)
    late = jax.jit(split.weight)(params, shared, ahead.kept, back.pairs)
    whole = jax.jit(split.backward)(params, shared, ahead.kept, dy)
    np.testing.assert_allclose(back.dx, dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole.dx, dx, rtol=1e-5, atol=1e-6)
    assert back.grads == [None, None]
    for after, both, wanted in zip(late, whole.grads, jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(both, wanted, rtol=1e-5, atol=1e-6)

    def flops(unit, *args):
        return count_matmul_flops(jax.make_jaxpr(lambda *args: jax.tree.leaves(unit(*args)))(*args))

    again = WEIGHTS // 2 if remat else 0  # of the first matrix: nobody asks for the output
    assert flops(split.input, params, shared, ahead.kept, dy) == WEIGHTS + again
    assert flops(split.weight, params, shared, ahead.kept, back.pairs) == WEIGHTS
