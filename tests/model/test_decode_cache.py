"""Decoding with a cache gives what the full forward pass gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import LatentConfig, RopeConfig
from maxlm.model.decoder import init_cache
from maxlm.model.runtime import Runtime

SETTINGS = {
    "grouped": {},
    "multi-query": {"attention": {"kv_heads": 1}},
    "windows": {"attention": {"windows": (3, 0)}},
    "narrow windows": {"num_layers": 5, "attention": {"windows": (1, 5, 2), "kv_heads": 1}},
    "latent": {"attention": {"kv_heads": 4, "latent": LatentConfig(kv_dim=12, query_dim=10, rope_dim=4, value_dim=6)}},
    "alibi": {"attention": {"alibi": True, "windows": (3, 0)}, "rope": RopeConfig(fraction=0.0)},
    "sinks": {"attention": {"sinks": True, "output_bias": True}},
    "learned positions": {"learned_positions": 16, "rope": RopeConfig(fraction=0.0)},
    "softcaps": {"attention": {"softcap": 3.0}, "logits_softcap": 5.0},
    "joint norms": {"attention": {"qk_norm": "joint"}, "norm": "rms_offset"},
    "all": {
        "attention": {"windows": (4, 2), "softcap": 3.0, "qk_norm": "head", "bias": True},
        "norm_placement": "both",
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_prefill_and_steps_equal_the_full_pass(tiny, settings):
    """Three prompts of unequal length, padded on the left, prefilled in two parts and continued token by token."""
    built = tiny.build(tiny.config(**settings), noise=0.1)
    lengths, longest, total = np.array([3, 6, 1]), 6, 11
    padding = longest - lengths
    tokens = tiny.tokens(3, total)  # row b has total - padding[b] tokens, from the left
    full = built.model.logits(tiny.hidden(built.model, tokens).hidden_BSD)

    padded = np.zeros((3, total), np.int32)
    for row, pad in enumerate(padding):
        padded[row, pad:] = tokens[row, : total - pad]
    cache = init_cache(built.config, 3, capacity=13, dtype=jnp.float32, padding=padding)

    @jax.jit
    def step(tokens, cache):
        out = built.model.decode(tokens, cache=cache, runtime=Runtime())
        return built.model.logits(out.hidden), out.cache

    parts, start = [], 0
    for count in (4, 2, *(1,) * 5):
        logits, cache = step(jnp.asarray(padded[:, start : start + count]), cache)
        parts.append(logits)
        start += count
    got = np.concatenate(parts, axis=1)

    assert int(cache.used) == total
    assert np.isfinite(got).all()
    for row, pad in enumerate(padding):
        # Float32 sums over keys in another order.
        np.testing.assert_allclose(got[row, pad:], full[row, : total - pad], rtol=2e-4, atol=2e-4)


def test_layers_with_a_window_keep_no_more_than_it_reaches(tiny):
    """A window of 1 keeps nothing; one that is longer than the row keeps the row."""
    config = tiny.config(num_layers=5, attention={"windows": (3, 0, 1, 20)})
    cache = init_cache(config, 2, capacity=13, dtype=jnp.float32)
    shapes = [memory.keys.shape for memory in cache.memory[0]]
    assert shapes == [(2, 2, 2, 2, 8), (1, 2, 13, 2, 8), (1, 2, 0, 2, 8), (1, 2, 13, 2, 8)]
    cache = init_cache(config_with_prefix(config), 2, capacity=13, dtype=jnp.float32)
    shapes = [[memory.keys.shape[:3] for memory in memories] for memories in cache.memory]
    assert shapes == [[(1, 2, 2)], [(1, 2, 13), (1, 2, 0), (1, 2, 13), (1, 2, 2)]]


def config_with_prefix(config):
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, dense_layers=1))


def test_padding_tokens_do_not_matter(tiny):
    built = tiny.build(tiny.config())
    prompt = tiny.tokens(1, 4)
    outs = []
    for filler in (0, 17):
        padded = jnp.concatenate([jnp.full((1, 3), filler), prompt], axis=1)
        cache = init_cache(built.config, 1, capacity=8, dtype=jnp.float32, padding=jnp.array([3]))
        outs.append(built.model.decode(padded, cache=cache, runtime=Runtime()).hidden[:, 3:])
    np.testing.assert_array_equal(*outs)


def test_cache_may_be_narrower_than_the_compute(tiny):
    built = tiny.build(tiny.config())
    cache = init_cache(built.config, 2, capacity=6, dtype=jnp.bfloat16)
    out = built.model.decode(tiny.tokens(2, 5), cache=cache, runtime=Runtime())
    assert out.cache.memory[0][0].keys.dtype == jnp.bfloat16 and out.hidden.dtype == jnp.float32
    expected = tiny.hidden(built.model, tiny.tokens(2, 5)).hidden_BSD
    # Keys and values rounded to eight bits: 2^-8 relative, over three layers.
    np.testing.assert_allclose(out.hidden, expected, atol=0.1)
