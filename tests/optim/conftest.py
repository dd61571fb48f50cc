"""A small decoder's declarations, with sizes that are all different, and values for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import tree
from maxlm.model.param import ParamSpec

L, D, H, h, F, V = 3, 8, 2, 6, 10, 14


def declare(shape, logical, contract=()):
    return ParamSpec(shape, jnp.float32, logical, contract)


@pytest.fixture
def specs():
    return tree.from_paths(
        {
            "embedding/table": declare((V, D), ("vocab", "embed")),
            "final_norm/scale": declare((D,), ("embed",)),
            "head/kernel": declare((D, V), ("embed", "vocab"), ("embed",)),
            "layers/attention/output": declare(
                (L, H, h, D), ("layers", "q_heads", "head_dim", "embed"), ("q_heads", "head_dim")
            ),
            "layers/attention/query": declare((L, D, H, h), ("layers", "embed", "q_heads", "head_dim"), ("embed",)),
            "layers/attention/query_bias": declare((L, H, h), ("layers", "q_heads", "head_dim")),
            "layers/attention_norm/scale": declare((L, D), ("layers", "embed")),
            "layers/mlp/down": declare((L, F, D), ("layers", "mlp", "embed"), ("mlp",)),
            "layers/mlp/up": declare((L, D, F), ("layers", "embed", "mlp"), ("embed",)),
        }
    )


@pytest.fixture
def draw(specs):
    """draw(seed): normal values of the declared shapes."""

    def values(seed):
        rng = np.random.default_rng(seed)
        return tree.map_paths(lambda _, spec: jnp.asarray(rng.normal(size=spec.shape), jnp.float32), specs)

    return values


@pytest.fixture
def run():
    """run(optimizer, params, grads, lr): params and state after one update for each gradient tree, jitted."""

    def updates(optimizer, params, grads, lr):
        @jax.jit
        def step(params, state, gradient, lr):
            out = optimizer.update(gradient, state, params, lr=lr)
            return jax.tree.map(jnp.add, params, out.updates), out.opt_state

        state = optimizer.init(params)
        for gradient in grads:
            params, state = step(params, state, gradient, jnp.float32(lr))
        return params, state

    return updates
