"""The router decides what a loop over tokens decides, and experts compute what a loop over experts computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm import tree
from maxlm.config import MoeConfig
from maxlm.kernels import grouped
from maxlm.kernels.experts import Experts, Linear, Routes, local_experts, order
from maxlm.kernels.grouped import choose
from maxlm.model import moe
from maxlm.model.attention import Sight
from maxlm.model.decoder import init_cache, split_model
from maxlm.model.moe import MoeMlp, route, row_statistics, within_capacity
from maxlm.model.runtime import Runtime

PLAIN, BLOCKED = Runtime(), Runtime(experts=functools.partial(local_experts, backend=choose("cpu", "float32")))

ROUTERS = {
    "softmax, normalised": {"experts": 8},
    "softmax, scaled": {"experts": 8, "active": 3, "normalise": False, "weight_scale": 2.5},
    "sigmoid": {"experts": 8, "router": "sigmoid"},
    "sigmoid and bias": {"experts": 8, "router": "sigmoid", "selection_bias": True, "weight_scale": 1.5},
    "softmax and bias": {"experts": 8, "selection_bias": True},
    "groups by best (DeepSeek-V2)": {"experts": 12, "active": 3, "groups": 4, "top_groups": 2, "normalise": False},
    "groups by two best (DeepSeek-V3)": {
        "experts": 12,
        "active": 4,
        "router": "sigmoid",
        "groups": 3,
        "top_groups": 2,
        "selection_bias": True,
    },
    "one of one": {"experts": 4, "active": 1},
}


def by_hand(logits, bias, config):
    """One token: {expert: weight}, by NumPy in float64, sorting and nothing else."""
    if config.router == "softmax":
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    ranked, size = scores + bias, config.experts // config.groups
    members = [range(g * size, (g + 1) * size) for g in range(config.groups)]
    best = {g: sorted((ranked[e] for e in members[g]), reverse=True) for g in range(config.groups)}
    value = {g: best[g][0] if config.router == "softmax" else sum(best[g][:2]) for g in best}
    groups = sorted(value, key=value.get, reverse=True)[: config.top_groups]
    allowed = [e for g in groups for e in members[g]]
    chosen = sorted(allowed, key=lambda e: ranked[e], reverse=True)[: config.active]
    total = sum(scores[e] for e in chosen) if config.normalise else 1.0
    return {e: config.weight_scale * scores[e] / total for e in chosen}


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_router_decides_as_a_loop_over_tokens(settings):
    config = MoeConfig(**settings)
    draws = np.random.default_rng(0)
    logits = draws.standard_normal((2, 9, config.experts))
    bias = draws.standard_normal(config.experts) if config.selection_bias else np.zeros(config.experts)
    routed = jax.jit(lambda logits, bias: route(logits, bias, config))(jnp.float32(logits), jnp.float32(bias))
    for place in np.ndindex(2, 9):
        expected = by_hand(logits[place], bias, config)
        assert routed.experts[place].tolist() == list(expected)  # the best first
        np.testing.assert_allclose(routed.weights[place], list(expected.values()), rtol=1e-5)
    np.testing.assert_allclose(routed.shares.sum(-1), 1.0, rtol=1e-5)


def test_the_selection_bias_gets_no_gradient():
    config = MoeConfig(experts=8, router="sigmoid", selection_bias=True)
    logits = jax.random.normal(jax.random.key(0), (1, 5, 8))
    gradient = jax.grad(lambda bias: jnp.sum(route(logits, bias, config).weights ** 2))(jnp.zeros(8))
    np.testing.assert_array_equal(gradient, np.zeros(8))


def test_statistics_of_rows():
    """Counts, balance and z-loss of two rows of which one has padding, by sums done by hand."""
    config = MoeConfig(experts=4, active=2)
    logits = jax.random.normal(jax.random.key(1), (2, 6, 4))
    real = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
    routed = route(logits, None, config)
    found = row_statistics(logits, routed, real, config)
    load, balance, router_z = np.zeros(4), 0.0, 0.0
    for row, length in enumerate((6, 4)):
        counts, shares, squares = np.zeros(4), np.zeros(4), 0.0
        for s in range(length):
            scores = np.exp(np.float64(logits[row, s]))
            counts[np.asarray(routed.experts[row, s])] += 1
            shares += scores / scores.sum()
            squares += np.log(scores.sum()) ** 2
        load += counts
        balance += sum(4 / 2 * counts / length * shares / length)
        router_z += squares / length
    np.testing.assert_array_equal(found["load"], load)
    np.testing.assert_allclose([found["balance"], found["router_z"]], [balance, router_z], rtol=1e-5)
    even = routed._replace(
        experts=jnp.broadcast_to(jnp.array([[0, 1], [2, 3]] * 3), (2, 6, 2)), shares=jnp.full((2, 6, 4), 0.25)
    )
    np.testing.assert_allclose(row_statistics(logits, even, real, config)["balance"], 2.0, rtol=1e-6)  # 1 a row


def test_capacity_by_hand():
    """First come, first served within a row; padding takes no room, and what comes later changes nothing before."""
    experts = jnp.array([[[0, 1], [0, 2], [0, 1], [1, 0], [2, 1]]])
    real = jnp.array([[True, False, True, True, True]])
    kept = within_capacity(experts, real, 3, 2)
    np.testing.assert_array_equal(kept[0], [[True, True], [True, True], [True, True], [False, False], [True, False]])
    assert within_capacity(experts, real, 3, 0).all()
    assert moe.capacity(MoeConfig(experts=8, active=2, capacity_factor=1.25), 30) == 10  # 9.375, rounded up


class Small:
    """A module with drawn parameters, its config and inputs."""

    def __init__(self, tiny, *, dim=32, mlp=None, **settings):
        self.config = tiny.config(mlp=mlp or {}, moe=MoeConfig(**{"experts": 4, "dim": dim} | settings))
        module = nnx.eval_shape(lambda: MoeMlp(self.config, rngs=nnx.Rngs(params=jax.random.key(0))))
        graphdef, state = nnx.split(module)
        draws = np.random.default_rng(0)

        def draw(p):
            fan_in = p.shape[-2] if p.ndim > 1 else 4
            return jnp.asarray(draws.standard_normal(p.shape, np.float32) / np.sqrt(fan_in))

        self.params = jax.tree.map(draw, nnx.to_pure_dict(state))
        self.graphdef = graphdef
        self.x = jnp.asarray(draws.standard_normal((2, 7, self.config.embed_dim), np.float32))

    @functools.partial(jax.jit, static_argnames=("self", "runtime"))
    def run(self, params, x, real=None, *, runtime=PLAIN):
        sight = Sight(jnp.zeros(x.shape[:2], jnp.int32), None, None, real=real)
        return nnx.merge(self.graphdef, params)(x, sight=sight, runtime=runtime)

    def by_hand(self, kept=None):
        """Every token through its experts, one at a time."""
        p, config = jax.tree.map(np.float64, self.params), self.config
        silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
        out = np.zeros(self.x.shape)
        for place in np.ndindex(self.x.shape[:2]):
            x = np.float64(self.x[place])
            logits = x @ p["router"] + p.get("router_bias", 0.0)
            weights = by_hand(logits, p.get("selection_bias", np.zeros(config.moe.experts)), config.moe)
            for slot, (e, weight) in enumerate(weights.items()):
                if kept is not None and not kept[place][slot]:
                    continue
                bias = {name: p[f"{name}_bias"][e] if f"{name}_bias" in p else 0.0 for name in ("gate", "up", "down")}
                hidden = silu(x @ p["gate"][e] + bias["gate"]) * (x @ p["up"][e] + bias["up"])
                out[place] += weight * (hidden @ p["down"][e] + bias["down"])
            if "shared" in p:
                shared = silu(x @ p["shared"]["gate"]) * (x @ p["shared"]["up"]) @ p["shared"]["down"]
                gate = 1 / (1 + np.exp(-(x @ p["shared_gate"]))) if "shared_gate" in p else 1.0
                out[place] += gate * shared
        return out


LAYERS = {
    "plain": {},
    "shared": {"shared_dim": 24},
    "gated shared, sigmoid, bias": {
        "shared_dim": 24,
        "shared_gate": True,
        "router": "sigmoid",
        "selection_bias": True,
        "active": 3,
    },
    "biases": {"mlp": {"bias": True}},
}


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_layer_computes_what_a_loop_over_tokens_does(tiny, settings):
    small = Small(tiny, **settings)
    expected = small.by_hand()
    for runtime in (PLAIN, BLOCKED):
        out = small.run(small.params, small.x, runtime=runtime)
        np.testing.assert_allclose(out.out, expected, rtol=1e-4, atol=1e-5)
        assert out.aux["dropped"] == 0 and out.aux["load"].sum() == 2 * 7 * small.config.moe.active


def test_what_exceeds_the_capacity_is_left_out_in_training_alone(tiny):
    small = Small(tiny, capacity_factor=0.75)
    experts = route(small.x @ small.params["router"], None, small.config.moe).experts
    kept = within_capacity(experts, jnp.ones((2, 7), bool), 4, 3)  # 0.75 * 7 * 2 / 4, rounded up
    dropped = np.sum(~np.asarray(kept))
    assert 0 < dropped < 14
    limited = small.run(small.params, small.x, runtime=Runtime(experts_limited=True))
    np.testing.assert_allclose(limited.out, small.by_hand(np.asarray(kept)), rtol=1e-4, atol=1e-5)
    assert limited.aux["dropped"] == dropped and limited.aux["load"].sum() == 28
    free = small.run(small.params, small.x)
    np.testing.assert_allclose(free.out, small.by_hand(), rtol=1e-4, atol=1e-5)
    assert free.aux["dropped"] == 0


@pytest.mark.parametrize("limited", [False, True])
def test_padding_and_nan_change_no_other_token(tiny, limited):
    """A NaN token and whatever stands at padding leave all other tokens' routes and outputs as they were."""
    small = Small(tiny, shared_dim=24, capacity_factor=0.75, selection_bias=True)
    real = jnp.array([[True] * 7, [True] * 5 + [False] * 2])
    runtime = dataclasses.replace(BLOCKED, experts_limited=limited)
    clean = small.run(small.params, small.x, real, runtime=runtime)
    padded = small.run(small.params, small.x.at[1, 5:].set(7.0), real, runtime=runtime)
    np.testing.assert_array_equal(padded.out[:, :5], clean.out[:, :5])
    for name, value in clean.aux.items():
        np.testing.assert_array_equal(padded.aux[name], value, err_msg=name)
    poisoned = small.run(small.params, small.x.at[0, 6].set(jnp.nan), real, runtime=runtime)
    assert np.isnan(poisoned.out[0, 6]).all()
    np.testing.assert_array_equal(poisoned.out[0, :6], clean.out[0, :6])
    np.testing.assert_array_equal(poisoned.out[1, :5], clean.out[1, :5])


def test_back_ends_have_the_same_gradients(tiny):
    small = Small(tiny, shared_dim=24, active=3, mlp={"bias": True})
    small.params["gate"] = small.params["gate"].at[:, :, 0].add(0.5)

    def total(params, x, runtime):
        out = small.run(params, x, runtime=runtime)
        return jnp.sum(jnp.sin(out.out)) + out.aux["balance"] + out.aux["router_z"]

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    expected = gradient(small.params, small.x, Runtime())
    got = gradient(small.params, small.x, BLOCKED)
    # Float32 sums of a few hundred terms in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    assert all(np.any(g != 0) for g in jax.tree.leaves(expected))


def test_order_of_entries():
    """Regions of three rows for three groups, an entry of none, and a group without entries."""
    place = order(jnp.array([2, 0, 3, 2, 0]), 3, region=3)
    np.testing.assert_array_equal(place.rows, [6, 0, 9, 7, 1])
    np.testing.assert_array_equal(place.entries, [1, 4, 5, 5, 5, 5, 0, 3, 5])
    np.testing.assert_array_equal(place.sizes, [2, 0, 2])
    tight = order(jnp.array([2, 0, 3, 2, 0]), 3)
    np.testing.assert_array_equal(tight.rows, [2, 0, 5, 3, 1])
    np.testing.assert_array_equal(tight.entries, [1, 4, 0, 3, 5])


def test_a_mixture_decodes_as_it_reads(tiny):
    """Prefill and steps with a cache equal the full pass, behind a dense layer and with a row padded on the left."""
    config = tiny.config(moe=MoeConfig(experts=4, dim=16, shared_dim=8, dense_layers=1, capacity_factor=0.5))
    built = tiny.build(config)
    assert "prefix/mlp/up" in set(tree.paths(built.params)) and built.params["layers"]["mlp"]["up"].shape == (
        2,
        4,
        24,
        16,
    )
    tokens = tiny.tokens(2, 6)
    full = tiny.hidden(built.model, tokens)
    assert full.aux["load"].shape == (2, 4)
    cache = init_cache(config, 2, capacity=9, dtype=jnp.float32, padding=jnp.array([2, 0]))
    padded = jnp.stack([jnp.concatenate([jnp.zeros(2, jnp.int32), tokens[0, :4]]), tokens[1]])
    step = jax.jit(lambda tokens, cache: built.model.decode(tokens, cache=cache, runtime=Runtime()))
    outs = []
    for piece in (padded[:, :4], padded[:, 4:5], padded[:, 5:]):
        out = step(piece, cache)
        outs.append(out.hidden)
        cache = out.cache
    got = jnp.concatenate(outs, axis=1)
    np.testing.assert_allclose(got[0, 2:], full.hidden_BSD[0, :4], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(got[1], full.hidden_BSD[1], rtol=2e-4, atol=2e-4)


def test_biases_move_towards_even_load():
    params = {"layers": {"mlp": {"selection_bias": jnp.zeros((2, 3)), "up": jnp.ones(2)}}, "head": jnp.ones(1)}
    load = jnp.array([[1.0, 5.0, 3.0], [4.0, 4.0, 4.0]])
    moved = moe.moved_biases(params, load, rate=0.01)
    np.testing.assert_allclose(moved["layers"]["mlp"]["selection_bias"], [[0.01, -0.01, 0], [0, 0, 0]], atol=1e-9)
    assert moved["head"] is params["head"] and moved["layers"]["mlp"]["up"] is params["layers"]["mlp"]["up"]


def test_only_the_selection_bias_is_not_trained(tiny):
    specs = split_model(tiny.config(moe=MoeConfig(experts=4, dim=16, selection_bias=True))).specs
    frozen = [path for path, spec in tree.paths(specs).items() if not spec.trained]
    assert frozen == ["layers/mlp/selection_bias"]


def _undefined(function):
    """The kernel's rows of no group hold what an accelerator's kernel may leave there."""

    def poisoned(x, w, sizes):
        out = function(x, w, sizes)
        return jnp.where((jnp.arange(x.shape[0]) < sizes.sum())[:, None], out, jnp.nan)

    return poisoned


def test_rows_of_no_expert_reach_no_gradient():
    """Entries that go nowhere leave undefined rows in the buffer: biases and all else get nothing of them."""
    plain = grouped.PLAIN
    poisoned = dataclasses.replace(
        plain, rows=_undefined(plain.rows), rows_transposed=_undefined(plain.rows_transposed)
    )
    keys = iter(jax.random.split(jax.random.key(0), 12))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    experts = Experts(*(Linear(draw(3, *shape), draw(3, shape[1])) for shape in ((8, 6), (8, 6), (6, 8))))
    chosen = jnp.array([[[0, 3], [3, 1], [3, 3], [1, 0]]])  # 3: nowhere; expert 2 gets no row
    x, weights = draw(1, 4, 8), jax.nn.softmax(draw(1, 4, 2)) * (chosen < 3)

    def loss(x, experts, weights, backend):
        out = local_experts(
            x, Routes(chosen, weights), experts, hidden=lambda g, u: jnp.tanh(g) * u, dtype=jnp.float32, backend=backend
        )
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    expected, got = (
        jax.value_and_grad(loss, argnums=(0, 1, 2))(x, experts, weights, backend) for backend in (plain, poisoned)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    assert np.abs(expected[1][1].up.bias[2]).max() == 0
