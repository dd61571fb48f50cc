"""The decoder sees what it may see, and is the same function however it is run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm import tree
from maxlm.config import MoeConfig
from maxlm.jaxpr import subprograms
from maxlm.model.attention import GroupedQueryAttention, Sight
from maxlm.model.decoder import Block, Decoder, init_cache, init_params, merge, split_model
from maxlm.model.loss import chunked_cross_entropy
from maxlm.model.mlp import FeedForwardOut, Mlp
from maxlm.model.runtime import Runtime

# Float32 sums of a few dozen terms of order one, in another order.
CLOSE = dict(rtol=2e-5, atol=2e-5)

VARIANTS = {
    "plain": {},
    "windows": {"attention": {"windows": (3, 0)}},
    "everything": {
        "attention": {"qk_norm": "head", "bias": True, "softcap": 5.0, "windows": (4, 0), "kv_heads": 1},
        "mlp": {"kind": "geglu", "bias": True},
        "norm_placement": "both",
        "embed_scale": True,
        "logits_softcap": 7.0,
        "tie_embeddings": True,
    },
    "layernorm post relu2": {"norm": "layer", "norm_placement": "post", "mlp": {"kind": "relu2"}},
    "gelu": {"mlp": {"kind": "gelu"}, "init": "fan_in"},
    "silu": {"mlp": {"kind": "silu", "bias": True}},
}


@pytest.fixture(params=VARIANTS, ids=str)
def built(request, tiny):
    return tiny.build(tiny.config(**VARIANTS[request.param]), noise=0.1)


def test_causality_is_a_zero_gradient(tiny, built):
    tokens, query = tiny.tokens(2, 9), 5

    def probe(offset):
        # The embedding's rows are looked up by position, so that a gradient tells positions apart.
        table = built.params["embedding"]["table"][tokens.reshape(-1)] + offset
        model = nnx.merge(built.graphdef, built.params | {"embedding": {"table": table}})
        out = tiny.hidden(model, jnp.arange(18).reshape(2, 9))
        return jnp.sum(out.hidden_BSD[:, query] * jnp.cos(jnp.arange(24.0)))

    gradient = jax.jit(jax.grad(probe))(jnp.zeros((18, 24))).reshape(2, 9, 24)
    seen = np.any(np.asarray(gradient) != 0, axis=-1)
    assert not seen[:, query + 1 :].any()
    assert seen[:, query].all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("windows, reach", [((3,), 6), ((3, 1), 4), ((0,), 12)])
def test_windows_reach_exactly_as_far_as_they_say(tiny, windows, reach):
    """Layers with windows w reach sum(w - 1) positions back, no more and no less; 3 layers in a cycle."""
    model = tiny.build(tiny.config(attention={"windows": windows})).model
    tokens, query = tiny.tokens(1, 13), 12
    changed = []
    before = tiny.hidden(model, tokens).hidden_BSD[0, query]
    for position in range(13):
        other = tokens.at[0, position].set((tokens[0, position] + 1) % 61)
        changed.append(bool(jnp.any(jnp.abs(tiny.hidden(model, other).hidden_BSD[0, query] - before) > 1e-4)))
    assert changed == [position >= query - reach for position in range(13)]


def test_packed_documents_equal_documents_alone(tiny, built):
    first, second = tiny.tokens(1, 5, seed=1), tiny.tokens(1, 7, seed=2)
    packed = tiny.hidden(
        built.model,
        jnp.concatenate([first, second], axis=1),
        positions=jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None],
        segments=jnp.array([[1] * 5 + [2] * 7]),
    ).hidden_BSD
    np.testing.assert_allclose(packed[:, :5], tiny.hidden(built.model, first).hidden_BSD, **CLOSE)
    np.testing.assert_allclose(packed[:, 5:], tiny.hidden(built.model, second).hidden_BSD, **CLOSE)


def test_scan_equals_a_loop_over_layers(tiny, built):
    config, tokens = built.config, tiny.tokens(2, 10)
    sight = Sight(jnp.broadcast_to(jnp.arange(10), (2, 10)), None, None)
    graphdef, state = nnx.split(built.model.layers)

    @jax.jit
    def unrolled(tokens):
        x, norms = built.model.embedding(tokens, sight.positions, runtime=Runtime()), []
        for i in range(config.num_layers):
            block = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], nnx.to_pure_dict(state)))
            window = config.attention.windows[i % len(config.attention.windows)]
            x = block(x, sight=sight, window=window, runtime=Runtime()).out
            norms.append(jnp.sqrt(jnp.mean(jnp.square(x))))
        return built.model.final_norm(x), jnp.stack(norms)

    hidden, norms = unrolled(tokens)
    out = tiny.hidden(built.model, tokens)
    np.testing.assert_allclose(out.hidden_BSD, hidden, **CLOSE)
    np.testing.assert_allclose(out.norms["residual"], norms, **CLOSE)


def test_layer_count_need_not_divide_by_the_cycle(tiny):
    """Layer i has window i mod c also in the suffix: six layers of a cycle of four are 0 4 2 3 0 4."""
    windows = (0, 4, 2, 3)
    cycled = tiny.build(tiny.config(num_layers=6, attention={"windows": windows}))
    listed = tiny.config(num_layers=6, attention={"windows": (0, 4, 2, 3, 0, 4)})
    other = nnx.merge(split_model(listed).graphdef, cycled.params)
    tokens = tiny.tokens(2, 11)
    expected = tiny.hidden(other, tokens).hidden_BSD
    np.testing.assert_allclose(tiny.hidden(cycled.model, tokens).hidden_BSD, expected, **CLOSE)


def _barriers(program, stream):
    """The numbers of operands of all barriers that an array of the stream's shape is among."""
    for equation in program.eqns:
        if equation.primitive.name == "optimization_barrier":
            shapes = [var.aval.shape for var in equation.invars]
            if stream in shapes:
                yield len(shapes)
        for inner in subprograms(equation.params):
            yield from _barriers(inner, stream)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_layers_of_a_cycle_are_done_with_their_gradients_one_after_the_other(tiny, remat):
    """The gradient of the stream goes on with all those of the layer's parameters; two layers are left over."""
    built = tiny.build(tiny.config(num_layers=8, attention={"windows": (3, 0, 2)}))
    tokens = tiny.tokens(2, 9)

    def total(params, windows=None):
        return jnp.sum(tiny.hidden(merge(built.graphdef, params), tokens, runtime=Runtime(remat=remat)).hidden_BSD)

    found = list(_barriers(jax.make_jaxpr(jax.grad(total))(built.params).jaxpr, (2, 9, 24)))
    leaves = len(jax.tree.leaves(built.params["layers"]))
    assert found.count(1 + leaves) == 3 + 2

    one = tiny.build(tiny.config(num_layers=8))  # a scan over single layers needs none
    program = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(tiny.hidden(merge(one.graphdef, p), tokens).hidden_BSD)))
    assert 1 + leaves not in list(_barriers(program(one.params).jaxpr, (2, 9, 24)))


class Counted(nnx.Module):
    """A dense feed-forward half that returns something besides, as experts do."""

    def __init__(self, config, *, rngs):
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x, *, sight, runtime):
        fed = self.mlp(x, sight=sight, runtime=runtime)
        return FeedForwardOut(fed.out, {"sum": jnp.sum(fed.out), "real": jnp.sum(sight.real)})


def _make_counted(config, rngs):
    mlp = Counted(config, rngs=rngs) if config.moe.dense_layers else Mlp(config, rngs=rngs)
    return Block(config, attention=GroupedQueryAttention(config, rngs=rngs), mlp=mlp, rngs=rngs)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_prefix_of_other_layers_is_a_part_of_the_stack(tiny, first):
    """Six layers with a cycle of three windows: the split changes neither the windows, nor the norms, nor the cache."""
    whole = tiny.build(tiny.config(num_layers=6, attention={"windows": (0, 2, 4)}))
    config = dataclasses.replace(whole.config, moe=MoeConfig(dense_layers=first))
    abstract = nnx.eval_shape(
        lambda: Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0)), make_block=_make_counted)
    )
    layers = whole.params["layers"]
    rest = jax.tree.map(lambda p: p[first:], layers)
    params = whole.params | {
        "prefix": jax.tree.map(lambda p: p[:first], layers),
        "layers": rest | {"mlp": {"mlp": rest["mlp"]}},
    }
    model = nnx.merge(nnx.graphdef(abstract), params)
    tokens, real = tiny.tokens(2, 7), jnp.arange(7) < jnp.array([[7], [5]])
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    out = jax.jit(
        lambda: model.hidden(tokens, positions_BS=positions, segments_BS=None, runtime=Runtime(), real_BS=real)
    )()
    expected = tiny.hidden(whole.model, tokens)
    np.testing.assert_allclose(out.hidden_BSD, expected.hidden_BSD, **CLOSE)
    np.testing.assert_allclose(out.norms["residual"], expected.norms["residual"], **CLOSE)
    assert expected.aux == {} and out.aux["sum"].shape == (6 - first,)
    assert len(set(np.asarray(out.aux["sum"]).tolist())) == 6 - first  # every layer's own
    np.testing.assert_array_equal(out.aux["real"], np.full(6 - first, 12))

    decode = jax.jit(lambda model, cache: model.decode(tokens, cache=cache, runtime=Runtime()))
    got, plain = (
        decode(model, init_cache(config, 2, capacity=9, dtype=jnp.float32))
        for model, config in ((model, config), (whole.model, whole.config))
    )
    np.testing.assert_allclose(got.hidden, plain.hidden, **CLOSE)
    keys = [[memory.keys for memory in stack] for stack in got.cache.memory]
    in_order = _by_layer(keys[0]) + _by_layer(keys[1])
    for mine, expected in zip(in_order, _by_layer([m.keys for m in plain.cache.memory[0]]), strict=True):
        np.testing.assert_allclose(mine, expected, **CLOSE)


def _by_layer(stacked):
    """The arrays of layers that are kept a window of the cycle apart, in the order of the layers."""
    count = sum(len(part) for part in stacked)
    return [stacked[i % len(stacked)][i // len(stacked)] for i in range(count)]


def _gradients(tiny, built, runtime):
    tokens = tiny.tokens(2, 8)

    def total(params):
        model = nnx.merge(built.graphdef, params)
        return chunked_cross_entropy(
            tiny.hidden(model, tokens, runtime=runtime).hidden_BSD,
            model.head_matrix(),
            tokens,
            jnp.ones((2, 8)),
            chunk=16,  # all positions: a tied head's gradient then once met a product that XLA's CPU back end lacks
            softcap=built.config.logits_softcap,
            z_loss=0.0,
        ).nll_sum

    return jax.jit(jax.grad(total))(built.params)


@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param(Runtime(remat="full"), marks=pytest.mark.slow),  # as many cases of tests/test_equivalence.py do
        pytest.param(Runtime(remat="matmuls"), marks=pytest.mark.slow),
        Runtime(remat="attention_qkv+mlp_up"),
    ],
    ids=lambda runtime: runtime.remat,
)
def test_remat_changes_no_gradient(tiny, runtime):
    built = tiny.build(tiny.config(**VARIANTS["everything"]), noise=0.1)
    expected = tree.paths(_gradients(tiny, built, Runtime()))
    for path, got in tree.paths(_gradients(tiny, built, runtime)).items():
        np.testing.assert_allclose(got, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("remat", ("none", "attention_qkv+mlp_up"))
@pytest.mark.parametrize(
    "variant", ({"attention": {"windows": (4, 0)}}, {"moe": MoeConfig(experts=4, active=2, dim=16)})
)
def test_what_is_kept_as_integers_changes_no_gradient(tiny, variant, remat):
    """But for roundings that XLA leaves out in one program and not in the other; of three layers, one is a suffix."""
    built = tiny.build(tiny.config(**variant), noise=0.1)
    plain, found = (
        tree.paths(_gradients(tiny, built, Runtime(dtype=jnp.bfloat16, remat=remat, keep_integers=keep)))
        for keep in (False, True)
    )
    for path, expected in plain.items():
        distance = np.linalg.norm(found[path] - expected) / np.linalg.norm(expected)
        assert distance < 2**-7, (path, distance)


def test_compute_dtype_leaves_gradients_in_float32(tiny):
    built = tiny.build(tiny.config(**VARIANTS["everything"]), noise=0.1)
    gradients = tree.paths(_gradients(tiny, built, Runtime(dtype=jnp.bfloat16)))
    assert {g.dtype for g in gradients.values()} == {jnp.dtype(jnp.float32)}
    # A gradient that was rounded to bfloat16 on its way has no bits beyond its first eight.
    for path, g in gradients.items():
        assert np.any(np.asarray(g) != np.asarray(g.astype(jnp.bfloat16).astype(jnp.float32))), path


def test_initial_parameters_do_not_depend_on_the_mesh(tiny):
    config = dataclasses.replace(tiny.config(), vocab_size=64, embed_dim=32)
    expected = tree.paths(init_params(config, jax.random.key(3)))  # op by op, without jit
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    axes = {"embed": "fsdp", "vocab": "tensor", "mlp": "tensor", "q_heads": "tensor", "kv_heads": "tensor"}
    shardings = tree.map_paths(
        lambda _, spec: NamedSharding(mesh, PartitionSpec(*(axes.get(axis) for axis in spec.logical))),
        split_model(config).specs,
    )
    sharded = jax.jit(lambda key: init_params(config, key), out_shardings=shardings)(jax.random.key(3))
    for path, value in tree.paths(sharded).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[path]), err_msg=path)
        if path.endswith(("query", "table")):
            assert len({str(shard.index) for shard in value.addressable_shards}) == 8, path


def test_sharded_forward_equals_unsharded(tiny):
    built = tiny.build(dataclasses.replace(tiny.config(), vocab_size=64))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    specs = split_model(built.config).specs
    axes = {"batch": "fsdp", "embed": "fsdp"} | dict.fromkeys(("vocab", "mlp", "q_heads", "kv_heads"), "tensor")

    def place(logical):
        return NamedSharding(mesh, PartitionSpec(*(axes.get(axis) for axis in logical)))

    runtime = Runtime(constrain=lambda x, logical: jax.lax.with_sharding_constraint(x, place(logical)))
    params = tree.map_paths(lambda _, spec, x: jax.device_put(x, place(spec.logical)), specs, built.params)
    tokens = tiny.tokens(4, 8)

    def run(params, tokens, runtime):
        model = nnx.merge(built.graphdef, params)
        return model.logits(tiny.hidden(model, tokens, runtime=runtime).hidden_BSD)

    got = jax.jit(run, static_argnums=2)(params, jax.device_put(tokens, place(("batch", None))), runtime)
    np.testing.assert_allclose(got, jax.jit(run, static_argnums=2)(built.params, tokens, Runtime()), **CLOSE)


def test_initial_scales_follow_the_config(tiny):
    """Standard deviations are within 5% (some 2,000 draws or more: 3 standard errors) of the documented formulas."""
    config = tiny.config(embed_std=0.02, num_layers=8)
    d, f, layers = 24, 40, 8
    draw = jax.jit(init_params, static_argnums=0)
    for init, factor in (("depth_scaled", 1 / np.sqrt(2 * layers)), ("fan_in", 1.0), ("zero_output", 0.0)):
        params = tree.paths(draw(dataclasses.replace(config, init=init), jax.random.key(0)))
        expected = {
            "embedding/table": 0.02,
            "head/kernel": d**-0.5,
            "layers/attention/query": d**-0.5,
            "layers/mlp/up": d**-0.5,
            "layers/attention/output": 32**-0.5 * factor,
            "layers/mlp/down": f**-0.5 * factor,
        }
        for path, std in expected.items():
            np.testing.assert_allclose(np.std(params[path]), std, rtol=0.05, err_msg=f"{init} {path}")
        layer = params["layers/mlp/up"]
        assert not np.allclose(layer[0], layer[1])  # every layer has its own draw


def test_parameters_carry_their_declaration(tiny):
    parts = split_model(tiny.config(**VARIANTS["everything"]))
    specs = tree.paths(parts.specs)
    query = specs["layers/attention/query"]
    assert query.shape == (3, 24, 4, 8) and query.dtype == jnp.float32
    assert query.logical == ("layers", "embed", "q_heads", "head_dim") and query.contract == ("embed",)
    assert specs["layers/attention/output"].contract == ("q_heads", "head_dim")
    roles = {path: spec.role for path, spec in specs.items()}
    assert roles["embedding/table"] == "embedding" and "head/kernel" not in roles
    assert roles["layers/attention/query_norm/scale"] == roles["layers/mlp/down_bias"] == "vector"
    assert {path for path, role in roles.items() if role == "matrix"} == {
        *(f"layers/attention/{name}" for name in ("query", "key", "value", "output")),
        *(f"layers/mlp/{name}" for name in ("gate", "up", "down")),
    }
    assert "layers/attention_out_norm/scale" in specs and "layers/attention_norm/scale" in specs
    params = tree.paths(tiny.build(tiny.config(**VARIANTS["everything"])).params)
    assert {path: x.shape for path, x in params.items()} == {path: spec.shape for path, spec in specs.items()}
    assert all(len(spec.logical) == len(spec.shape) for spec in specs.values())


def test_a_block_of_another_family_is_composed(tiny):
    """A maker of blocks is all that another family needs: here one whose feed-forward half does nothing."""

    class Nothing(nnx.Module):
        def __call__(self, x, *, sight, runtime):
            return FeedForwardOut(jnp.zeros_like(x), {})

    def make(config, rngs):
        return Block(config, attention=GroupedQueryAttention(config, rngs=rngs), mlp=Nothing(), rngs=rngs)

    config = tiny.config()
    model = Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0)), make_block=make)
    assert tiny.hidden(model, tiny.tokens(2, 6)).hidden_BSD.shape == (2, 6, 24)


def test_a_normed_head_has_a_gradient_where_a_column_is_zero(tiny):
    """As a lengthened vocabulary has them. Of the other columns only what turns them counts."""
    built = tiny.build(tiny.config(normed_head=True))
    kernel = np.array(built.params["head"]["kernel"])
    kernel[:, 5] = 0
    weights = np.random.default_rng(0).standard_normal(kernel.shape, np.float32)

    def matrix(kernel):
        return merge(built.graphdef, built.params | {"head": {"kernel": kernel}}).head_matrix()

    found, pullback = jax.vjp(matrix, jnp.asarray(kernel))
    (gradient,) = pullback(jnp.asarray(weights))
    others = np.arange(kernel.shape[1]) != 5
    lengths = np.linalg.norm(kernel[:, others], axis=0)
    unit = kernel[:, others] / lengths
    np.testing.assert_allclose(found[:, others], unit, rtol=1e-6)
    assert not np.any(found[:, 5]) and np.all(np.isfinite(gradient[:, 5])) and np.any(gradient[:, 5])
    turning = (weights[:, others] - unit * np.sum(unit * weights[:, others], axis=0)) / lengths
    np.testing.assert_allclose(gradient[:, others], turning, atol=1e-5)


def test_errors_say_what_to_type(tiny):
    with pytest.raises(ValueError, match=r"remat has \['some'\]; it is one of none, full, matmuls, or of att"):
        tiny.hidden(tiny.build(tiny.config()).model, tiny.tokens(1, 4), runtime=Runtime(remat="some"))
    with pytest.raises(ValueError, match=r"remat has \['mlp_upp'\].* mlp_up, "):
        tiny.hidden(tiny.build(tiny.config()).model, tiny.tokens(1, 4), runtime=Runtime(remat="mlp_up+mlp_upp"))
    with pytest.raises(ValueError, match="'kv_heads': 0.*resolve"):
        split_model(tiny.config(attention={"kv_heads": 0}))
