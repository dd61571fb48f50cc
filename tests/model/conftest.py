"""A tiny decoder, with every setting open."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
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
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    if noise:
        draws = np.random.default_rng(seed)
        params = jax.tree.map(lambda x: x + noise * draws.standard_normal(x.shape, np.float32) * (x.ndim < 3), params)
    graphdef = split_model(config).graphdef
    return SimpleNamespace(config=config, graphdef=graphdef, params=params, model=merge(graphdef, params))


@functools.partial(jax.jit, static_argnames="runtime")
def _run(model, tokens, positions, segments, *, runtime):
    return model.hidden(tokens, positions_BS=positions, segments_BS=segments, runtime=runtime)


def _hidden(model, tokens, *, positions=None, segments=None, runtime=None):
    rows, length = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return _run(model, tokens, positions, segments, runtime=runtime or Runtime())


@pytest.fixture
def tiny():
    """config(...), build(config), hidden(model, tokens, ...), tokens(rows, length)."""
    return SimpleNamespace(
        config=_config,
        build=_build,
        hidden=_hidden,
        tokens=lambda rows, length, seed=7: jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCAB),
    )
