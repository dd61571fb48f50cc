"""A tiny decoder, with every setting open."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig
from maxlm.model.decoder import init_params, merge, split_model
from maxlm.model.runtime import Runtime

VOCAB = 61


def _config(attention=None, mlp=None, **settings):
    base = ModelConfig(
        vocab_size=VOCAB,
        embed_dim=24,
        num_layers=3,
        attention=AttentionConfig(**{"q_heads": 4, "kv_heads": 2, "head_dim": 8} | (attention or {})),
        mlp=MlpConfig(**{"dim": 40} | (mlp or {})),
        embed_std=1.0,  # so that tokens differ by much more than a tolerance
    )
    return dataclasses.replace(base, **settings)


def _build(config, *, seed=0, noise=0.0):
    """The model and its parameters; `noise` moves scales and biases away from where they all are alike."""
    params = init_params(config, jax.random.key(seed))
    if noise:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        leaves = [
            x + noise * jax.random.normal(key, x.shape) if x.size < 1000 else x
            for x, key in zip(leaves, keys, strict=True)
        ]
        params = jax.tree.unflatten(treedef, leaves)
    graphdef = split_model(config).graphdef
    return SimpleNamespace(config=config, graphdef=graphdef, params=params, model=merge(graphdef, params))


def _hidden(model, tokens, *, positions=None, segments=None, runtime=None):
    rows, length = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return model.hidden(tokens, positions_BS=positions, segments_BS=segments, runtime=runtime or Runtime())


@pytest.fixture
def tiny():
    """config(...), build(config), hidden(model, tokens, ...), tokens(rows, length)."""
    return SimpleNamespace(
        config=_config,
        build=_build,
        hidden=_hidden,
        tokens=lambda rows, length, seed=7: jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCAB),
    )
