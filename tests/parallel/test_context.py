"""Attention over a sharded sequence against `plain` on one device, its balance and its memory; the step with it."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import ParallelConfig
from maxlm.kernels import chunked
from maxlm.kernels.attention import Mask, plain
from maxlm.kernels.mask import visible
from maxlm.kernels.matmul import ATTENTION_NAME
from maxlm.model.decoder import merge, split_model
from maxlm.model.loss import chunked_cross_entropy, token_nll
from maxlm.model.runtime import Runtime
from maxlm.parallel import context
from maxlm.parallel.context import choose_method, context_attention, zigzag
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import named_sharding
from maxlm.resolve import ConfigError, resolve
from maxlm.train.setup import make_runtime
from tests.tiny import MODEL, tiny_config
from tests.train.test_step import random_batch

ROWS, LENGTH = 2, 48


def mesh_of(**sizes):
    parallel = ParallelConfig(**{"data": 1} | sizes)
    return make_mesh(parallel, jax.devices()[: int(np.prod([*parallel.sizes.values()]))])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of few positions, so that a shard has several and the last of a chunk is not full."""
    monkeypatch.setattr(chunked, "BLOCK", 4)


def operands(*, kv_heads=2, groups=2, dim=8, value_dim=8, length=LENGTH):
    keys = jax.random.split(jax.random.key(0), 5)
    heads, shape = kv_heads * groups, (ROWS, length)
    q, g = jax.random.normal(keys[0], (*shape, heads, dim)), jax.random.normal(keys[1], (*shape, heads, value_dim))
    k = jax.random.normal(keys[2], (*shape, kv_heads, dim))
    v = jax.random.normal(keys[3], (*shape, kv_heads, value_dim))
    return q, k, v, g, jax.random.normal(keys[4], (heads,))


def documents(length=LENGTH):
    """Documents that end at places of no shard, other ones in each row, and padding at the end."""
    cuts = jnp.array([[5, 17, 29, 45], [1, 20, 22, 48]])
    rows = 1 + (jnp.arange(length) >= cuts[:, :, None]).sum(axis=1)
    return jnp.where(rows == 5, 0, rows).astype(jnp.int32)


def out_and_gradients(attend, order, q, k, v, g, sinks, mask):
    """Of attention on rows that `order` has put into another order; gradients are those of the rows as they came."""

    def ordered(q, k, v, sinks):
        segments = None if mask.segments_q is None else order(mask.segments_q)
        local = dataclasses.replace(mask, segments_q=segments, segments_k=segments, sinks=sinks)
        return attend(order(q), order(k), order(v), local)

    out, pull = jax.vjp(ordered, q, k, v, sinks)
    return order(jnp.arange(LENGTH)[None, :, None]), out, *pull(order(g))


CASES = {
    "documents": Mask(scale=0.4, segments_q=documents(), segments_k=documents()),
    "window": Mask(scale=0.4, window=13),
    "all": Mask(scale=0.4, window=20, softcap=1.5, segments_q=documents(), segments_k=documents()),
    "alibi": Mask(scale=0.4, slopes=jnp.array([0.5, 0.03, 0.2, 0.1]), segments_q=documents(), segments_k=documents()),
}


@functools.cache
def reference(case):
    return jax.jit(out_and_gradients, static_argnums=(0, 1))(plain, lambda x: x, *operands(value_dim=6), CASES[case])


def check(attend, devices, case):
    order = functools.partial(zigzag, devices=devices)
    got = jax.jit(out_and_gradients, static_argnums=(0, 1))(attend, order, *operands(value_dim=6), CASES[case])
    _, out, *gradients = reference(case)
    np.testing.assert_allclose(got[1], order(out), rtol=2e-5, atol=2e-5)
    for found, expected in zip(got[2:], gradients, strict=True):
        # Sums of at most 48 float32 terms of order one in another order.
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "method, case",
    [("ring", "window"), ("gather", "documents"), ("ring", "all"), ("ring", "alibi")],
)
def test_equals_plain(method, case):
    check(context_attention(mesh_of(context=4, tensor=2), method=method, together=False), 4, case)


@pytest.mark.parametrize(
    "method, sizes", [("gather", {"context": 8}), ("ring", {"context": 2, "data": 2, "tensor": 2})]
)
def test_equals_plain_on_other_meshes_with_all_heads_at_once(method, sizes):
    check(context_attention(mesh_of(**sizes), method=method, together=True), sizes["context"], "all")


@pytest.mark.parametrize("plant", ["mask", "place", "hop"])
def test_planted_mistakes_are_caught(monkeypatch, plant):
    """An off-by-one in the mask, in a chunk's place, or in how far keys are passed, each fails the comparison."""
    if plant == "mask":

        def late(mask, queries, keys):
            return visible(dataclasses.replace(mask, q_offset=mask.q_offset + 1), queries, keys)

        monkeypatch.setattr(chunked, "visible", late)
    elif plant == "place":
        right = context.starts
        monkeypatch.setattr(context, "starts", lambda *args, **kwargs: right(*args, **kwargs) + jnp.array([0, 1]))
    else:
        permute = jax.lax.ppermute
        wrong = lambda x, axis, pairs: permute(x, axis, [(i, (j + 1) % 4) for i, j in pairs])  # noqa: E731
        monkeypatch.setattr(jax.lax, "ppermute", wrong)
    with pytest.raises(AssertionError):
        check(context_attention(mesh_of(context=4), method="ring", together=False), 4, "window")


def test_every_device_multiplies_as_many_blocks(monkeypatch):
    """Counted inside the branches that are run: under a causal mask a ring's hops, too, cost every device the same."""
    done = collections.Counter()
    monkeypatch.setattr(chunked, "BLOCK", 3)
    for name in ("_absorb_pair", "_pull_pair"):
        right = getattr(chunked, name)

        def counted(*args, right=right, name=name):
            jax.debug.callback(lambda device: done.update([(name, int(device))]), jax.lax.axis_index("context"))
            return right(*args)

        monkeypatch.setattr(chunked, name, counted)
    attend = context_attention(mesh_of(context=4), method="ring", together=False)
    q, k, v, g, _ = operands(kv_heads=1, groups=1)
    jax.block_until_ready(jax.jit(jax.grad(lambda q: (attend(q, k, v, Mask(scale=1.0)) * g).sum()))(q))
    jax.effects_barrier()
    chunks = LENGTH // 3 // 2  # 8 chunks of 2 blocks each; on the diagonal 3 of 4 pairs of blocks meet
    pairs = ROWS * (2 * 3 + (chunks - 1) * 4)
    assert done == {(name, device): pairs for name in ("_absorb_pair", "_pull_pair") for device in range(4)}


def test_method_by_bytes():
    assert choose_method("auto", devices=8, q_heads=32, kv_heads=4) == "gather"
    assert choose_method("auto", devices=8, q_heads=32, kv_heads=8) == "ring"
    assert choose_method("gather", devices=8, q_heads=32, kv_heads=32) == "gather"


def test_zigzag_is_the_order_of_the_chunks():
    x = jnp.arange(32).reshape(1, 16, 2)
    assert zigzag(x, devices=4)[0, :, 0].tolist() == [
        2 * i for i in [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    ]
    for device in range(4):
        chunks = zigzag(jnp.arange(16)[None], devices=4)[0].reshape(4, 2, 2)
        assert context.starts(device, devices=4, length=4).tolist() == chunks[device, :, 0].tolist()
    with pytest.raises(ValueError, match="rows of 12 positions do not divide into 2 x 4 chunks"):
        zigzag(jnp.zeros((1, 12)), devices=4)


def program(attend, *, length, heads, mesh):
    """The compiled forward and backward pass of attention alone, and the bytes of a shard's queries in float32."""
    sharding = named_sharding(mesh, ("batch", "seq", "q_heads", None))
    x = jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32, sharding=sharding)

    def both(q, k, v, g):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, Mask(scale=1.0)), q, k, v)
        return out, *pull(g)

    return jax.jit(both).lower(x, x, x, x).compile(), length // mesh.shape["context"] * heads * 32 * 4


def test_ring_holds_few_arrays_of_its_own_shard(monkeypatch):
    """At most 12 arrays of a shard's queries, with as many key heads as query heads; the rest are blocks."""
    monkeypatch.setattr(chunked, "BLOCK", 32)
    mesh = mesh_of(context=8)
    compiled, queries = program(
        context_attention(mesh, method="ring", together=False), length=4096, heads=16, mesh=mesh
    )
    block, head = 4 * 32 * 32, queries // 16
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * queries + 12 * block + 8 * head
    text = compiled.as_text()
    assert "collective-permute" in text and "conditional" in text and "all-gather" not in text


def test_remat_keeps_the_result_of_a_ring():
    """Saving products saves attention's result and normalisers: the backward pass does not attend again."""
    attend = context_attention(mesh_of(context=2), method="ring", together=False)
    q, k, v, g, _ = operands()
    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION_NAME)

    def loops(remat):
        loss = lambda q: jnp.sum(attend(jnp.sin(q), k, v, Mask(scale=1.0)) * g)  # noqa: E731
        return jax.jit(jax.value_and_grad(remat(loss))).lower(q).compile().as_text().count(" while(")

    kept = loops(lambda f: jax.checkpoint(f, policy=policy))
    assert kept == loops(lambda f: f) < loops(jax.checkpoint)


def loss_and_gradients(config, runtime):
    """Of a batch of two documents a row, with parameters that NumPy draws."""
    parts, draws = split_model(config.model), np.random.default_rng(0)
    params = tree.map_paths(lambda _, spec: 0.2 * draws.standard_normal(spec.shape, np.float32), parts.specs)

    def loss(params, batch):
        batch, model = runtime.arrange(batch), merge(parts.graphdef, params)
        out = model.hidden(
            batch.tokens, positions_BS=batch.positions, segments_BS=batch.segments, runtime=runtime
        ).hidden_BSD
        how = dict(chunk=40, softcap=0.0, spread=runtime.spread_loss)
        sums = chunked_cross_entropy(out, model.head_matrix(), batch.targets, batch.weights, z_loss=0.1, **how)
        nll = token_nll(out, model.head_matrix(), batch.targets, **how)
        return (sums.nll_sum + 0.1 * sums.z_sum) / 512, (nll * batch.weights).sum() / sums.nll_sum

    batch = jax.tree.map(jnp.asarray, random_batch(0))
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)


def config_of(devices=None, **sizes):
    attention = dataclasses.replace(MODEL.attention, windows=(0, 21), softcap=3.0)
    model = dataclasses.replace(MODEL, attention=attention)
    return resolve(tiny_config("unused", model=model, parallel=ParallelConfig(**sizes)), devices=devices)


@functools.cache
def expected():
    return loss_and_gradients(config_of(data=1), Runtime())


@pytest.mark.parametrize(
    "sizes",
    [{"data": 1, "context": 8}, {"data": 1, "context": 2, "tensor": 2, "fsdp": 2, "context_method": "gather"}],
)
def test_loss_and_every_gradient_of_a_model(sizes):
    """Windows and documents that cross shards, a soft-cap, grouped queries; loss chunks that do not divide a shard."""
    config = config_of(devices=8, **sizes)
    runtime, name = make_runtime(config, make_mesh(config.parallel), segments=True)
    assert name == "chunked " + sizes.get("context_method", "ring")
    (value, share), gradients = loss_and_gradients(config, runtime)
    (true_value, _), true_gradients = expected()
    np.testing.assert_allclose(value, true_value, rtol=1e-5)
    np.testing.assert_allclose(share, 1.0, rtol=1e-5)
    norm = np.linalg.norm
    whole = norm([norm(g) for g in jax.tree.leaves(true_gradients)])
    for path, want in tree.paths(true_gradients).items():
        error = norm(tree.paths(gradients)[path] - want)
        assert error <= 1e-4 * norm(want) + 1e-7 * whole, path


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"data.sequence_length is 64, but parallel.context 3 cuts .* multiple of 6,"):
        config_of(data=1, context=3)
