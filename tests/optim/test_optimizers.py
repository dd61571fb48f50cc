import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm import tree
from maxlm.checks.optim import SMALLEST_EPSILON
from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, OptimConfig
from maxlm.model.decoder import split_model
from maxlm.model.param import ParamSpec
from maxlm.optim.optimizers import Updated, assign, clip, global_norm, make_optimizer
from maxlm.optim.rules import RuleError

LR = 0.01
DECAYS = (("(layers|final_norm)/.*norm.*|final_norm/.*|.*bias", 0.0), ("head/.*", 0.5), (".*", 1.0))
RATES = (("embedding/.*", 3.0), (".*", 1.0))
RULES = ("adamw", "adafactor", "lion", "muon")
MATRICES = ("layers/attention/output", "layers/attention/query", "layers/mlp/down", "layers/mlp/up")


def config(optimizer, **changes):
    settings = {"optimizer": optimizer, "decay_rules": DECAYS, "lr_rules": RATES}
    return dataclasses.replace(OptimConfig(), **(settings | changes))


def multipliers(path):
    """(learning rate, decay) as the rules above say, restated by hand."""
    rate = 3.0 if path.startswith("embedding") else 1.0
    if "norm" in path or path.endswith("bias"):
        return rate, 0.0
    return rate, 0.05 if path.startswith("head") else 0.1


def test_adamw_by_hand(specs, draw, run):
    optim = config("adamw")
    grads = [draw(1), draw(2)]
    params, state = run(make_optimizer(optim, specs), draw(0), grads, LR)
    for path, p in tree.paths(draw(0)).items():
        p, m, v = np.asarray(p, np.float64), 0.0, 0.0
        rate, decay = multipliers(path)
        for t, gradient in enumerate(grads, start=1):
            g = np.asarray(tree.paths(gradient)[path], np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            d = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            p = p - LR * rate * (d + decay * p)
        np.testing.assert_allclose(tree.paths(params)[path], p, rtol=2e-5, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(tree.paths(state["adamw"].nu)[path], v, rtol=1e-5)


def test_lion_by_hand(specs, draw, run):
    grads = [draw(1), draw(2)]
    params, _ = run(make_optimizer(config("lion", b2=0.99), specs), draw(0), grads, LR)
    for path, p in tree.paths(draw(0)).items():
        p, m = np.asarray(p, np.float64), 0.0
        rate, decay = multipliers(path)
        for gradient in grads:
            g = np.asarray(tree.paths(gradient)[path], np.float64)
            p = p - LR * rate * (np.sign(0.9 * m + 0.1 * g) + decay * p)
            m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(tree.paths(params)[path], p, rtol=1e-5, atol=1e-6, err_msg=path)


def newton_schulz(x, iterations):
    """Jordan et al. 2024, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / np.linalg.norm(x)
    for _ in range(iterations):
        g = x @ x.T
        x = a * x + (b * g + c * g @ g) @ x
    return x.T if flip else x


def test_muon_by_hand_on_the_first_update(specs, draw, run):
    # The first Nesterov mean is a multiple of the gradient, and Newton-Schulz does not see the multiple.
    optim = config("muon", muon_lr_ratio=0.5)
    params, _ = run(make_optimizer(optim, specs), draw(0), [draw(1)], LR)
    for path in MATRICES:
        p, g = (np.asarray(tree.paths(draw(seed))[path], np.float64) for seed in (0, 1))
        rows = 12 if path.endswith("output") else 10 if path.endswith("down") else 8
        for layer in range(3):
            direction = newton_schulz(g[layer].reshape(rows, -1), 5)
            direction = 0.2 * np.sqrt(max(direction.shape)) * direction.reshape(g[layer].shape)
            expected = p[layer] - LR * 0.5 * (direction + 0.1 * p[layer])
            np.testing.assert_allclose(tree.paths(params)[path][layer], expected, rtol=1e-4, atol=1e-5, err_msg=path)


def test_muon_on_a_stack_is_muon_on_each_layer(specs, draw, run):
    optim = config("muon", decay_rules=((".*", 1.0),), lr_rules=((".*", 1.0),))
    grads = [jax.tree.map(lambda g, size=size: g * size, draw(i)) for i, size in enumerate((0.1, 1.0, 50.0))]
    stacked, _ = run(make_optimizer(optim, specs), draw(0), grads, LR)

    for path in ("layers/attention/output", "layers/mlp/up"):
        spec = tree.paths(specs)[path]
        single = dataclasses.replace(spec, shape=spec.shape[1:], logical=spec.logical[1:])
        optimizer = make_optimizer(optim, {"one": single})
        params, *history = ({"one": tree.paths(values)[path][1]} for values in (draw(0), *grads))
        alone, _ = run(optimizer, params, history, LR)
        # Batched and single products may sum in another order; five iterations amplify that a little.
        np.testing.assert_allclose(alone["one"], tree.paths(stacked)[path][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ((64, 64), (64, 192), (192, 64)))
def test_muon_moves_as_much_as_adamw_does(shape):
    specs = {"up": ParamSpec((2, *shape), jnp.float32, ("layers", "embed", "mlp"), ("embed",))}
    optim = dataclasses.replace(OptimConfig(), optimizer="muon", weight_decay=0.0, decay_rules=((".*", 1.0),))
    optimizer = make_optimizer(optim, specs)
    params = {"up": jnp.zeros((2, *shape))}
    g = {"up": jax.random.normal(jax.random.key(0), (2, *shape)) * 1e-4}
    out = optimizer.update(g, optimizer.init(params), params, lr=jnp.float32(1.0))
    rms = np.sqrt(np.mean(np.square(out.updates["up"])))
    # Newton-Schulz leaves singular values within about 0.7 to 1.2, so the RMS is 0.2 to within that.
    assert 0.2 * 0.7 < rms < 0.2 * 1.2


def test_what_every_parameter_of_a_decoder_gets():
    model = ModelConfig(
        vocab_size=32,
        embed_dim=16,
        num_layers=3,
        attention=AttentionConfig(q_heads=4, kv_heads=2, head_dim=4, qk_norm="head", bias=True),
        mlp=MlpConfig(dim=24),
    )
    specs = split_model(model).specs
    assigned = assign(dataclasses.replace(OptimConfig(), optimizer="muon", muon_lr_ratio=2.0), specs)
    table = {path: (a.rule, a.lr, a.decay) for path, a in assigned.items()}
    assert table == {
        "embedding/table": ("adamw", 1.0, 0.1),
        "final_norm/scale": ("adamw", 1.0, 0.0),
        "head/kernel": ("adamw", 1.0, 0.1),
        "layers/attention/key": ("muon", 2.0, 0.1),
        "layers/attention/key_bias": ("adamw", 1.0, 0.0),
        "layers/attention/key_norm/scale": ("adamw", 1.0, 0.0),
        "layers/attention/output": ("muon", 2.0, 0.1),
        "layers/attention/query": ("muon", 2.0, 0.1),
        "layers/attention/query_bias": ("adamw", 1.0, 0.0),
        "layers/attention/query_norm/scale": ("adamw", 1.0, 0.0),
        "layers/attention/value": ("muon", 2.0, 0.1),
        "layers/attention/value_bias": ("adamw", 1.0, 0.0),
        "layers/attention_norm/scale": ("adamw", 1.0, 0.0),
        "layers/mlp/down": ("muon", 2.0, 0.1),
        "layers/mlp/gate": ("muon", 2.0, 0.1),
        "layers/mlp/up": ("muon", 2.0, 0.1),
        "layers/mlp_norm/scale": ("adamw", 1.0, 0.0),
    }
    state = jax.eval_shape(
        make_optimizer(dataclasses.replace(OptimConfig(), optimizer="muon"), specs).init,
        tree.map_paths(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs),
    )
    assert set(tree.paths(state["muon"][0].mu)) == {path for path, row in table.items() if row[0] == "muon"}
    assert set(tree.paths(state["adamw"].mu)) == {path for path, row in table.items() if row[0] == "adamw"}


@pytest.mark.parametrize("rule", RULES)
def test_one_rule_for_all_but_muon(specs, rule):
    rules = {a.rule for a in assign(config(rule), specs).values()}
    assert rules == ({"muon", "adamw"} if rule == "muon" else {rule})


def test_a_parameter_without_a_rule_is_named(specs):
    with pytest.raises(RuleError, match="optim.decay_rules has no rule for the parameters embedding/table"):
        assign(dataclasses.replace(OptimConfig(), decay_rules=(("(layers|final_norm|head).*", 1.0),)), specs)


@pytest.mark.parametrize("rule", RULES)
def test_a_multiplier_of_zero_freezes(specs, draw, run, rule):
    optim = config(rule, lr_rules=(("layers/mlp/.*", 0.0), (".*", 1.0)))
    params, _ = run(make_optimizer(optim, specs), draw(0), [draw(1), draw(2)], LR)
    for path, p in tree.paths(draw(0)).items():
        assert bool((tree.paths(params)[path] == p).all()) == path.startswith("layers/mlp/"), path


def moments(state):
    """The floating arrays of a state by key path that belong to parameters and are not factored."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): x for path, x in leaves if x.ndim and x.size != 3}


@pytest.mark.parametrize("rule", ("adamw", "lion", "muon"))
def test_bfloat16_moments_are_the_rounded_float32_ones(specs, draw, run, rule):
    grads = [draw(1), draw(2)]
    wide, wide_state = run(make_optimizer(config(rule), specs), draw(0), grads[:1], LR)
    narrow_optimizer = make_optimizer(config(rule, moments_dtype="bfloat16"), specs)
    narrow, state = run(narrow_optimizer, draw(0), grads[:1], LR)
    # The first update comes from moments that were not yet stored, so only the order of sums may differ.
    assert all(np.allclose(a, b, rtol=1e-5) for a, b in zip(*map(jax.tree.leaves, (wide, narrow)), strict=True))
    for name, moment in moments(state).items():
        assert moment.dtype == jnp.bfloat16, name
        assert (moment == moments(wide_state)[name].astype(jnp.bfloat16)).all(), name
    # The second reads moments in float32: decay * moment is not rounded to bfloat16 once more.
    _, second = run(narrow_optimizer, draw(0), grads, LR)
    if rule == "adamw":
        for path, nu in tree.paths(second["adamw"].nu).items():
            old = tree.paths(state["adamw"].nu)[path].astype(jnp.float32)
            exact = 0.95 * old + (1 - 0.95) * jnp.square(tree.paths(grads[1])[path])
            # One rounding to 8 bits is at most 2^-8 of the value; two of them would often be more.
            np.testing.assert_allclose(nu.astype(jnp.float32), exact, rtol=2.0**-8 + 1e-6)


def test_bfloat16_leaves_muons_polynomial_and_adafactors_factors_alone(specs, draw):
    state = make_optimizer(config("muon", moments_dtype="bfloat16"), specs).init(draw(0))
    assert state["muon"][0].ns_coeffs.dtype == jnp.float32
    factored, first = make_optimizer(config("adafactor", moments_dtype="bfloat16"), specs).init(draw(0))["adafactor"]
    assert {x.dtype for x in jax.tree.leaves((factored.rows, factored.cols, factored.full))} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(first.ema)} == {jnp.dtype("bfloat16")}


def test_adafactor_without_a_first_moment_keeps_none(specs, draw):
    state = make_optimizer(config("adafactor", b1=0.0), specs).init(draw(0))["adafactor"]
    kept = sum(x.size for x in jax.tree.leaves((state.rows, state.cols, state.full)))
    assert kept < 0.5 * sum(x.size for x in jax.tree.leaves(draw(0)))


@pytest.mark.parametrize("rule", RULES)
def test_every_optimizer_learns(specs, draw, run, rule):
    """A quadratic bowl around a target: the distance falls to under a half."""
    target = draw(9)
    optimizer = make_optimizer(config(rule, weight_decay=0.0, lr_rules=((".*", 1.0),)), specs)
    params = draw(0)

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(jnp.subtract, params, target)
        out = optimizer.update(gradient, state, params, lr=jnp.float32(0.05))
        return jax.tree.map(jnp.add, params, out.updates), out.opt_state

    def distance(params):
        return sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    state, start = optimizer.init(params), distance(params)
    for _ in range(40):
        params, state = step(params, state)
    assert distance(params) < 0.5 * start


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("rule", RULES)
def test_every_array_of_the_state_has_axes_that_fit(specs, draw, rule, dtype):
    optimizer = make_optimizer(config(rule, moments_dtype=dtype), specs)
    state = jax.eval_shape(optimizer.init, draw(0))
    axes = optimizer.shardings(state, lambda logical: jax.tree_util.Partial(lambda: None, logical))
    logical = {
        jax.tree_util.keystr(p): leaf.args[0]
        for p, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, jax.tree_util.Partial))
    }
    shapes = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(state)}
    assert set(logical) == set(shapes)
    sizes = {"layers": 3, "embed": 8, "q_heads": 2, "head_dim": 6, "mlp": 10, "vocab": 14}
    for name, shape in shapes.items():
        if "ns_coeffs" in name:
            assert logical[name] == (None,)
        else:
            assert tuple(sizes[axis] for axis in logical[name]) == shape, name


@pytest.mark.parametrize("rule", ("adafactor", "muon"))
def test_a_sharded_update_equals_the_unsharded_one(specs, draw, rule):
    """The rules that are not elementwise, over fsdp 4 and tensor 2."""
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    paths = ("layers/attention/query", "layers/attention_norm/scale")

    def part(values):
        return tree.from_paths({path: tree.paths(values)[path] for path in paths})

    def place(logical):
        return NamedSharding(mesh, PartitionSpec(*({"embed": "fsdp", "q_heads": "tensor"}.get(a) for a in logical)))

    optim = config(rule, decay_rules=((".*", 1.0),), lr_rules=((".*", 1.0),))
    optimizer = make_optimizer(optim, part(specs))
    params, grads = part(draw(0)), part(draw(1))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    expected = update(grads, state, params, lr=jnp.float32(LR))
    at = tree.map_paths(lambda _, spec: place(spec.logical), part(specs))
    state_at = optimizer.shardings(state, place)
    got = jax.jit(optimizer.update, out_shardings=Updated(at, state_at))(
        jax.device_put(grads, at), jax.device_put(state, state_at), jax.device_put(params, at), lr=jnp.float32(LR)
    )
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        # Sums over shards in another order, amplified by Newton-Schulz.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_clipping_is_by_the_global_norm_in_float32():
    grads = {"a": jnp.full((4,), 300.0, jnp.float16), "b": {"c": jnp.full((9,), 400.0, jnp.float16)}}
    norm = np.sqrt(4 * 300.0**2 + 9 * 400.0**2)  # 1342: its square is beyond float16
    found = global_norm(grads)
    np.testing.assert_allclose(found, norm, rtol=1e-6)
    clipped = clip(grads, found, max_norm=2.0)
    np.testing.assert_allclose(clipped["a"], 300.0 * 2.0 / norm, rtol=1e-6)
    assert clipped["b"]["c"].dtype == jnp.float32
    np.testing.assert_allclose(global_norm(clipped), 2.0, rtol=1e-6)


@pytest.mark.parametrize("limit", (0.0, 10.0))
def test_a_gradient_within_the_limit_is_left_bit_for_bit(draw, limit):
    grads = jax.tree.map(lambda g: g * 1e-3, draw(3))
    clipped = clip(grads, global_norm(grads), max_norm=limit)
    assert all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (clipped, grads)), strict=True))


def test_clipping_of_zeros_and_nan():
    zeros, bad = {"a": jnp.zeros(3)}, {"a": jnp.asarray([jnp.nan, 1.0])}
    assert (clip(zeros, global_norm(zeros), max_norm=1.0)["a"] == 0).all()
    assert np.isnan(global_norm(bad)) and np.isnan(clip(bad, global_norm(bad), max_norm=1.0)["a"]).all()


@pytest.mark.parametrize("moments", ("float32", "bfloat16"))
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_finite_norm_make_finite_updates(specs, draw, rule, moments):
    """The guard looks at the norm alone. Unclipped, with the least epsilon: zeros, all sizes that have a norm, rows and
    single numbers of another size than the rest."""
    epsilon = SMALLEST_EPSILON.get(rule, 0.0)
    optimizer = make_optimizer(config(rule, epsilon=epsilon, moments_dtype=moments), specs)
    params, update = draw(0), jax.jit(optimizer.update)

    def rows(g):
        return g.at[..., 0].set(0.0)

    def single(g):
        return jnp.zeros_like(g).at[(0,) * g.ndim].set(1e17)

    sizes = [lambda g, size=size: size * g for size in (0.0, 1e-38, 1e-20, 1.0, 1e10, 1e16)]
    kinds = [*sizes, rows, single]
    for order in (kinds, kinds[::-1], [sizes[-1], sizes[0], sizes[0], single, sizes[1]]):
        state = optimizer.init(params)
        for i, kind in enumerate(order):
            grads = jax.tree.map(kind, draw(i))
            assert np.isfinite(global_norm(grads))
            updates, state = update(grads, state, params, lr=jnp.float32(LR))
            for path, found in tree.paths(updates).items():
                assert np.isfinite(found).all(), (path, i)
