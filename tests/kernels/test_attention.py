"""The attention back ends against the reference, and the table that chooses among them."""

import dataclasses
import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings

from maxlm.chips import CHIPS
from maxlm.compilation import longest_block
from maxlm.kernels import attention
from maxlm.kernels import chunked as chunked_module
from maxlm.kernels import heads_loop as loop_module
from maxlm.kernels import splash as splash_module
from maxlm.kernels import triton as triton_module
from maxlm.kernels.attention import Mask, heads_loop, plain
from maxlm.kernels.matmul import ATTENTION_NAME

DIM = 8


def operands(*, batch, length, kv_heads, groups, dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (kv_heads * groups, kv_heads, kv_heads, kv_heads * groups)
    return [jax.random.normal(key, (batch, length, n, DIM)).astype(dtype) for key, n in zip(keys, heads, strict=True)]


def segments(batch, length, cuts):
    """Documents that end at the given places, moved on by one in each further row, so that rows differ."""
    return jnp.stack(
        [1 + sum((jnp.arange(length) >= cut + row).astype(jnp.int32) for cut in cuts) for row in range(batch)]
    )


def out_and_gradients(attend, q, k, v, g, mask):
    def run(q, k, v, sinks):
        return attend(q, k, v, dataclasses.replace(mask, sinks=sinks))

    out, pull = jax.vjp(run, q, k, v, mask.sinks)
    return out, *jax.tree.leaves(pull(g))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 rows in at most 2 tiers, so that a few dozen positions meet every kind of block and of turn."""
    monkeypatch.setattr(loop_module, "BLOCK_ROWS", (8, 8))
    monkeypatch.setattr(loop_module, "TIERS", 2)
    monkeypatch.setattr(loop_module, "FEW_SCORES", 8 * 33)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.sampled_from([5, 16, 33, 61]),
    kv_heads=st.sampled_from([1, 2, 3, 4]),
    groups=st.sampled_from([1, 3]),
    window=st.sampled_from([0, 1, 7, 20]),
    softcap=st.sampled_from([0.0, 1.5]),
    cuts=st.sampled_from([None, (3,), (8, 9, 40)]),
    sink=st.booleans(),
)
@example(length=61, kv_heads=2, groups=3, window=7, softcap=1.5, cuts=(8, 9, 40), sink=True)
@example(length=61, kv_heads=2, groups=1, window=0, softcap=0.0, cuts=None, sink=True)
@example(length=33, kv_heads=4, groups=1, window=0, softcap=0.0, cuts=(8, 9, 40), sink=False)
@example(length=16, kv_heads=3, groups=1, window=7, softcap=0.0, cuts=None, sink=False)
def test_loop_equals_plain(small_blocks, length, kv_heads, groups, window, softcap, cuts, sink):
    q, k, v, g = operands(batch=2, length=length, kv_heads=kv_heads, groups=groups)
    mask = Mask(scale=0.4, window=window, softcap=softcap)
    if cuts is not None:
        row = segments(2, length, cuts)
        mask = dataclasses.replace(mask, segments_q=row, segments_k=row)
    if sink:
        mask = dataclasses.replace(mask, sinks=jnp.linspace(-1.0, 1.0, kv_heads * groups))
    # The comparison is of arithmetic, not of the compiler: without its optimisations it is several times faster.
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0}, static_argnums=0)
    ours = quick(out_and_gradients)(heads_loop, q, k, v, g, mask)
    reference = quick(out_and_gradients)(plain, q, k, v, g, mask)
    for got, want in zip(ours, reference, strict=True):
        # Sums of up to 61 float32 terms of order one in another order.
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_plain_equals_a_loop_over_positions():
    q, k, v, _ = operands(batch=1, length=9, kv_heads=1, groups=2)
    v = v[..., :5]
    row, sinks, slopes = segments(1, 9, (4,)), jnp.array([0.3, -0.7]), jnp.array([0.25, 0.5])
    mask = Mask(scale=0.5, window=3, softcap=2.0, segments_q=row, segments_k=row, sinks=sinks, slopes=slopes)
    got = plain(q, k, v, mask)
    for i in range(9):
        seen = [j for j in range(9) if j <= i and i - j < 3 and row[0, i] == row[0, j]]
        for head in range(2):
            scores = np.array([2.0 * np.tanh(float(q[0, i, head] @ k[0, j, 0]) * 0.5 / 2.0) for j in seen])
            scores -= slopes[head] * (i - np.array(seen))
            weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(sinks[head]))
            np.testing.assert_allclose(got[0, i, head], weights @ np.array(v[0, seen, 0]), rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_float32():
    """Both paths round operands to 8 bits; neither may lose more than that rounding (2**-8) times a few."""
    q, k, v, g = operands(batch=1, length=200, kv_heads=2, groups=2)
    want = out_and_gradients(plain, q, k, v, g, Mask(scale=0.35))
    short = [x.astype(jnp.bfloat16) for x in (q, k, v, g)]
    for attend in (plain, heads_loop):
        for got, wide in zip(out_and_gradients(attend, *short, Mask(scale=0.35)), want, strict=True):
            assert got.dtype == jnp.bfloat16
            error = jnp.linalg.norm(got.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)
            assert error < 0.015


def test_decoding_queries_stand_at_their_offset():
    q, k, v, _ = operands(batch=2, length=10, kv_heads=1, groups=1)
    whole = plain(q, k, v, Mask(scale=0.3))
    got = plain(q[:, 4:6], k, v, Mask(scale=0.3, q_offset=jnp.array(4)))
    np.testing.assert_allclose(got, whole[:, 4:6], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "batch, kv_heads, groups, length, a_turn",
    [(4, 8, 1, 512, 4), (3, 2, 1, 512, 2), (3, 5, 1, 64, 1), (4, 8, 2, 512, 1), (4, 8, 1, 4096, 1)],
)
def test_heads_of_little_work_go_side_by_side(batch, kv_heads, groups, length, a_turn):
    q, k, v, _ = operands(batch=batch, length=length, kv_heads=kv_heads, groups=groups)
    text = jax.jit(heads_loop).lower(q, k, v, Mask(scale=1.0)).as_text()
    assert f"tensor<{batch * kv_heads // a_turn}x{a_turn}x{groups}x{length}x{DIM}xf32>" in text


def test_loop_skips_what_the_window_hides():
    """The products of the program, one block a tier, are those of the windows, not of all pairs."""

    def flops(mask):
        q, k, v, _ = operands(batch=1, length=1024, kv_heads=1, groups=1)
        text = jax.jit(heads_loop).lower(q, k, v, mask).as_text()
        return sum(int(a) * int(b) for a, b in re.findall(r"dot_general.*-> tensor<(\d+)x(\d+)xf32>", text))

    # Blocks of 128 queries and a window of 128: 255 keys at most for each, against 576 of 1,024 on average.
    everything = 8 * 128 * (1024 + DIM)  # a block of each of eight tiers: scores, and their product with values
    assert flops(Mask(scale=1.0, window=128)) < 0.5 * flops(Mask(scale=1.0)) < 0.6 * everything


def test_loop_memory_does_not_grow_with_the_square():
    def temporaries(length):
        q, k, v, g = operands(batch=1, length=length, kv_heads=2, groups=1)
        step = jax.jit(lambda *a: out_and_gradients(heads_loop, *a, Mask(scale=1.0)))
        return step.lower(q, k, v, g).compile().memory_analysis().temp_size_in_bytes

    # All scores would grow sixteenfold.
    assert temporaries(16384) < 6 * temporaries(4096)


def kernel(name):
    return next(backend.kernel for backend in attention.BACKENDS if backend.name == name)


@pytest.mark.parametrize("name", ["heads_loop", "chunked_loop", "triton"])
def test_under_remat_the_forward_pass_runs_once(name, monkeypatch):
    q, k, v, g = operands(batch=1, length=64 if name == "triton" else 8, kv_heads=5, groups=1)
    interpreted = functools.partial(triton_module.triton, interpret=True)
    monkeypatch.setattr(triton_module, "triton", interpreted)
    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION_NAME)

    def loops(remat):
        loss = lambda q: jnp.sum(kernel(name)(jnp.sin(q), k, v, Mask(scale=1.0)) * g)  # noqa: E731
        text = jax.jit(jax.value_and_grad(remat(loss))).lower(q).compile().as_text()
        return len(re.findall(r" while\(", text))

    assert loops(lambda f: jax.checkpoint(f, policy=policy)) == loops(lambda f: f) < loops(jax.checkpoint)


@pytest.mark.parametrize("name", ["chunked_loop", "chunked"])
def test_memory_of_layers_under_remat_grows_with_the_length(name):
    """In a scan over layers JAX would keep the masks of all blocks, and even constants of their shape (`opaque`)."""

    def temporaries(length):
        def layer(x, weight):
            q = (x @ weight).reshape(1, length, 1, DIM)
            mask = Mask(scale=1.0, segments_q=segments(1, length, (99,)), segments_k=segments(1, length, (99,)))
            return x + kernel(name)(q, q, q, mask).reshape(1, length, DIM), None

        def loss(weights, x):
            return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)[0].sum()

        weights, x = jnp.zeros((3, DIM, DIM)), jnp.zeros((1, length, DIM))
        return jax.jit(jax.grad(loss)).lower(weights, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 4.5 * temporaries(4096)  # what is a block's does not grow at all


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "length, window, softcap, cuts, offset",
    [(61, 0, 0.0, None, None), (33, 7, 1.5, (8, 9, 20), 5), (32, 20, 0.0, (3,), None)],
)
def test_chunked_equals_plain(monkeypatch, together, length, window, softcap, cuts, offset):
    monkeypatch.setattr(chunked_module, "BLOCK", 8)
    q, k, v, g = operands(batch=2, length=length, kv_heads=2, groups=3)
    v, g = v[..., :5], g[..., :5]
    row = None if cuts is None else segments(2, length, cuts)
    mask = Mask(scale=0.4, window=window, softcap=softcap, segments_q=row, segments_k=row)
    mask = dataclasses.replace(mask, q_offset=offset, sinks=jnp.linspace(-1.0, 1.0, 6))
    if window == 0:
        mask = dataclasses.replace(mask, slopes=jnp.linspace(0.03, 0.4, 6))

    run = jax.jit(out_and_gradients, static_argnums=0)
    ours = run(functools.partial(chunked_module.chunked, together=together), q, k, v, g, mask)
    for got, want in zip(ours, run(plain, q, k, v, g, mask), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


PALLAS = {
    "all": Mask(scale=0.4, window=45, softcap=1.5, sinks=jnp.array([0.5, -1.0])),
    "documents": Mask(scale=0.4),
}


@pytest.mark.parametrize(
    "name, case, length, dtype",
    [
        ("splash", "all", 384, "float32"),  # three blocks, and a window that is shorter than one
        ("splash", "documents", 256, "bfloat16"),
        ("triton", "documents", 128, "float32"),
    ],
)
def test_interpreted_kernels_equal_plain(monkeypatch, name, case, length, dtype):
    """The kernels of TPUs and GPUs, step by step on a CPU; what is declared of them is what is tried here."""
    monkeypatch.setattr(splash_module, "BLOCKS", (128,))
    module = {"splash": splash_module.splash, "triton": triton_module.triton}[name]
    q, k, v, g = operands(batch=2, length=length, kv_heads=1, groups=2)
    if name == "splash":
        v, g = v[..., :4], g[..., :4]
    row = segments(2, length, (30, 64, length - 100))
    mask = dataclasses.replace(PALLAS[case], segments_q=row, segments_k=row)
    run = jax.jit(out_and_gradients, static_argnums=0)
    ours = run(functools.partial(module, interpret=True), *(x.astype(dtype) for x in (q, k, v, g)), mask)
    for got, want in zip(ours, run(plain, q, k, v, g, mask), strict=True):
        if dtype == "float32":
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        else:  # operands are rounded to 8 bits
            assert got.dtype == dtype
            assert jnp.linalg.norm(got.astype(jnp.float32) - want) < 0.015 * jnp.linalg.norm(want)


@pytest.mark.parametrize(
    "length, window, longest, expected",
    [
        (8192, 0, 512, 512),
        (8192, 0, 2048, 2048),
        (3072, 0, 2048, 1024),
        (8192, 1024, 2048, 1024),
        (8192, 64, 2048, 512),  # a window that is shorter than the usual block
        (384, 0, 2048, 384),
    ],
)
def test_a_blocks_length_divides_the_row_and_respects_the_window(length, window, longest, expected):
    assert splash_module.block_size(length, window=window, longest=longest) == expected


def test_only_a_training_step_on_a_chip_with_the_memory_for_it_has_long_blocks(monkeypatch):
    asked = []
    monkeypatch.setattr(splash_module, "splash", lambda q, *_, longest: asked.append(longest) or q)
    q = jnp.zeros((1, 2048, 1, 128), jnp.bfloat16)
    for chip, dtype in (("v5p", "bfloat16"), ("v5p", "float32"), ("v5e", "bfloat16"), (None, "bfloat16")):
        longest = longest_block(CHIPS[chip] if chip else None, dtype)
        attention.dispatch("tpu", longest_block=longest)(q, q, q, Mask(scale=1.0))
    assert asked == [2048, 1024, 512, 512]


def test_choice_by_platform():
    def name(platform, *needs, dtype="bfloat16", head_dim=64, length=512):
        shapes = dict(head_dim=head_dim, queries=1 if "decode" in needs else length, keys=length)
        return attention.choose(platform=platform, dtype=dtype, needs=frozenset(needs), **shapes).name

    assert name("cpu") == name("cpu", "segments", "windows", "softcap") == "heads_loop"
    assert name("cpu", "decode") == "plain"
    assert name("gpu") == name("gpu", "windows") == "cudnn"
    # cuDNN would silently attend across documents and drop soft-caps; float32 it cannot do at all.
    assert name("gpu", "segments") == name("gpu", "segments", length=1 << 20) == "triton"
    assert name("gpu", "softcap") == name("gpu", "segments", "windows") == "plain"
    assert name("tpu", "segments", "windows", "softcap", "sinks", "value_dim", dtype="float32") == "splash"
    assert name("tpu", dtype="float16") == "plain"
    assert name("tpu", length=500) == "plain" and name("tpu", length=5000) == "chunked"
    assert name("gpu", dtype="float32") == name("gpu", head_dim=100) == "plain"
    assert name("tpu", "segments", "windows", "softcap", "decode") == "plain"
    # Where all scores of a head at once are too many, blocks are taken, and a decoding step has few at any length.
    assert name("cpu", length=8192) == "heads_loop" and name("cpu", length=8193) == "chunked_loop"
    assert name("gpu", "softcap", length=2048) == "plain" and name("gpu", "softcap", length=2049) == "chunked"
    assert name("gpu", length=1 << 20) == "cudnn"
    assert name("tpu", "decode", length=1 << 20) == "plain"
    prompt = dict(dtype="float32", head_dim=64, needs=frozenset({"decode"}), queries=4096, keys=4096)
    assert attention.choose(platform="cpu", **prompt).name == "chunked_loop"


def test_choice_says_why_nothing_can_serve(monkeypatch):
    monkeypatch.setattr(attention, "BACKENDS", [b for b in attention.BACKENDS if b.name == "cudnn"])
    asked = dict(platform="gpu", dtype="float16", head_dim=64, queries=64, keys=64)
    assert attention.choose(needs=frozenset(), **asked).name == "cudnn"
    with pytest.raises(ValueError, match="cudnn cannot do softcap"):
        attention.choose(needs=frozenset({"softcap"}), **asked)


@pytest.mark.parametrize("name", [backend.name for backend in attention.BACKENDS])
@pytest.mark.parametrize("feature", attention.FEATURES)
def test_backend_honours_or_refuses(name, feature):
    """Every cell of the table: what is declared agrees with the reference, what is not raises."""
    backend = next(b for b in attention.BACKENDS if b.name == name)
    q, k, v, _ = operands(batch=2, length=6, kv_heads=1, groups=2)
    row = segments(2, 6, (2,))
    mask = {
        "windows": Mask(scale=1.0, window=2),
        "softcap": Mask(scale=1.0, softcap=0.5),
        "segments": Mask(scale=1.0, segments_q=row, segments_k=row),
        "decode": Mask(scale=1.0, q_offset=2),
        "sinks": Mask(scale=1.0, sinks=jnp.array([0.5, -1.0])),
        "alibi": Mask(scale=1.0, slopes=jnp.array([0.5, 0.2])),
        "value_dim": Mask(scale=1.0),
    }[feature]
    v = v[..., : DIM // 2] if feature == "value_dim" else v
    if feature not in backend.features:
        with pytest.raises(ValueError, match=f"{name}.*cannot do .*{feature}"):
            backend.function(q, k, v, mask)
    elif not backend.platforms or "cpu" in backend.platforms:
        got = backend.function(q, k, v, mask)
        np.testing.assert_allclose(got, plain(q, k, v, mask), rtol=1e-5, atol=1e-5)
        if feature != "value_dim":
            assert not np.allclose(got, plain(q, k, v, Mask(scale=1.0)), atol=1e-3)
