"""A tiny decoder, with every setting open."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import AttentionConfig, MlpConfig, ModelConfig
from maxlm.model.decoder import merge, split_model
from maxlm.model.runtime import Runtime

VOCAB = 61


def _config(attention=None, mlp=None, **settings):
    base = ModelConfig(
        vocab_size=VOCAB,
        embed_dim=24,
        num_layers=3,
        attention=AttentionConfig(**{"q_heads": 4, "kv_heads": 2, "head_dim": 8} | (attention or {})),
        mlp=MlpConfig(**{"dim": 40} | (mlp or {})),
    )
    return dataclasses.replace(base, **settings)


def _build(config, *, seed=0, noise=0.0):
    """The model with drawn matrices, and scales and biases that `noise` moves away from where they all are alike.

    Drawn by NumPy: `init_params` has tests of its own, and takes seconds to compile.
    """
    draws, parts = np.random.default_rng(seed), split_model(config)

    def draw(path, spec):
        normal = draws.standard_normal(spec.shape, np.float32)
        if spec.role == "vector":
            return jnp.asarray(noise * normal + (0.0 if path.endswith("bias") else 1.0))
        fan_in = math.prod(size for size, axis in zip(spec.shape, spec.logical, strict=True) if axis in spec.contract)
        return jnp.asarray(normal / math.sqrt(fan_in))

    params = tree.map_paths(draw, parts.specs)
    return SimpleNamespace(config=config, graphdef=parts.graphdef, params=params, model=merge(parts.graphdef, params))


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
