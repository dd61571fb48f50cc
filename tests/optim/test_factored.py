import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maxlm import tree
from maxlm.model.param import ParamSpec
from maxlm.optim.factored import matrix_axes, scale_by_factored_moment

B2 = 0.9
STACKED = tuple(f"layers/{p}" for p in ("attention/output", "attention/query", "attention/query_bias", "mlp/down"))


def run(transform, gradients):
    """The last update of a transform over gradient trees that are stacked along a first axis."""

    def step(state, gradient):
        updates, state = transform.update(gradient, state, gradient)
        return state, updates

    state = transform.init(jax.tree.map(lambda g: g[0], gradients))
    return jax.tree.map(lambda u: u[-1], jax.lax.scan(step, state, gradients)[1])


def reference():
    """Optax's factored transform on one plain matrix or vector, with the same cap of the decay and clipping."""

    def decay(step, exponent):
        return jnp.minimum(1.0 - (step + 1.0) ** -exponent, B2)

    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1, decay_rate_fn=decay), optax.clip_by_block_rms(1.0)
    )


def test_every_layer_equals_optax_on_its_own_matrix(specs, draw):
    sizes = 10.0 ** np.arange(-2, 4)
    gradients = jax.tree.map(
        lambda *gs: jnp.stack([g * size for g, size in zip(gs, sizes, strict=True)]), *map(draw, range(6))
    )
    updates = tree.paths(jax.jit(functools.partial(run, scale_by_factored_moment(tree.paths(specs), b2=B2)))(gradients))
    on_one = jax.jit(functools.partial(run, reference()))
    for path in ("embedding/table", *STACKED):
        spec = tree.paths(specs)[path]
        fan_in, _ = matrix_axes(spec)
        layers = spec.shape[0] if path.startswith("layers/") else 1
        own = (math.prod(spec.shape[i] for i in fan_in), -1) if fan_in else (-1,)
        history = tree.paths(gradients)[path].reshape(6, layers, *own)
        for layer, update in enumerate(updates[path].reshape(layers, *own)):
            # Both are a handful of float32 operations on the same numbers.
            np.testing.assert_allclose(
                update, on_one({"x": history[:, layer]})["x"], rtol=2e-5, atol=1e-6, err_msg=f"{path} {layer}"
            )


def test_state_is_factored_per_layer(specs, draw):
    state = scale_by_factored_moment(tree.paths(specs), b2=B2).init(draw(0))
    shapes = {f: {p: x.shape for p, x in tree.paths(getattr(state, f)).items()} for f in ("rows", "cols", "full")}
    assert shapes["rows"] == {
        "embedding/table": (14,),
        "head/kernel": (8,),
        "layers/attention/output": (3, 2, 6),
        "layers/attention/query": (3, 8),
        "layers/mlp/down": (3, 10),
        "layers/mlp/up": (3, 8),
    }
    assert shapes["cols"]["layers/attention/query"] == (3, 2, 6)
    assert shapes["cols"]["layers/attention/output"] == (3, 8)
    assert set(shapes["full"]) == {
        "final_norm/scale",
        "layers/attention/query_bias",
        "layers/attention_norm/scale",
    }


def test_experts_are_matrices_of_their_own():
    spec = ParamSpec((2, 4, 5, 6), jnp.float32, ("layers", "expert", "embed", "mlp"), ("embed",))
    assert matrix_axes(spec) == ((2,), (3,))
    transform = scale_by_factored_moment({"up": spec}, b2=B2)
    g = jnp.asarray(np.random.default_rng(0).normal(size=(1, *spec.shape)), jnp.float32)
    both = jax.jit(functools.partial(run, transform))({"up": g})["up"]
    # One expert's huge gradient must not shrink another's update.
    other = jax.jit(functools.partial(run, transform))({"up": g.at[:, 0, 1].multiply(1e4)})["up"]
    np.testing.assert_allclose(both[:, 0], other[:, 0], rtol=1e-6)
