"""The ledger agrees with the traced program, and with sums done by hand."""

import jax
import jax.numpy as jnp
import pytest

from maxlm import tree
from maxlm.config import LatentConfig, MoeConfig, RopeConfig
from maxlm.model.decoder import init_params, merge, split_model
from maxlm.model.flops import count_matmul_flops, ledger
from maxlm.model.loss import chunked_cross_entropy
from maxlm.model.runtime import Runtime

VARIANTS = {
    "plain": {},
    "tied, plain mlp": {"tie_embeddings": True, "mlp": {"kind": "gelu"}},
    "latent": {"attention": {"kv_heads": 4, "latent": LatentConfig(kv_dim=12, query_dim=10, rope_dim=4, value_dim=6)}},
    "learned positions": {"learned_positions": 12, "rope": RopeConfig(fraction=0.0), "tie_embeddings": True},
    "experts, shared ones, a dense prefix": {
        "moe": MoeConfig(experts=6, active=2, dim=16, shared_dim=8, shared_gate=True, dense_layers=1)
    },
    "further tokens": {
        "moe": MoeConfig(experts=6, active=2, dim=16, dense_layers=1),
        "attention": {"windows": (0, 3)},
        "mtp_layers": 2,
    },
    "windows and a suffix": {"attention": {"windows": (3, 0), "kv_heads": 1, "qk_norm": "head", "bias": True}},
}


def all_scores(config, length):
    """FLOPs of a token's scores where all positions are multiplied and masked afterwards."""
    heads = config.attention
    layers = config.num_layers + config.mtp_layers
    return 2.0 * heads.q_heads * (heads.head_dim + heads.value_dim) * length * layers


def as_computed(config, length):
    """Forward FLOPs a token that the plain program, with all S x S scores, performs."""
    forward = ledger(config, sequence_length=length).forward
    return sum(forward.values()) - forward["scores"] + all_scores(config, length)


def _loss(tiny, config, *, rows, length, runtime):
    graphdef = split_model(config).graphdef
    tokens = jnp.zeros((rows, length), jnp.int32)

    def total(params):
        model = merge(graphdef, params)
        hidden = [tiny.hidden(model, tokens, runtime=runtime).hidden_BSD]
        if config.mtp_layers:
            places = jnp.broadcast_to(jnp.arange(length), (rows, length))
            ahead = [tokens] * config.mtp_layers
            more = model.further(hidden[0], ahead, positions_BS=places, segments_BS=None, runtime=runtime)
            hidden += list(more.hidden)
        return sum(
            chunked_cross_entropy(
                one,
                model.head_matrix(),
                tokens,
                jnp.ones((rows, length)),
                chunk=8,
                softcap=0.0,
                z_loss=0.0,
            ).nll_sum
            for one in hidden
        )

    return total, jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_ledger_equals_the_products_of_the_traced_program(tiny, settings):
    config = tiny.config(**settings)
    rows, length = 2, 12
    total, params = _loss(tiny, config, rows=rows, length=length, runtime=Runtime())
    computed = as_computed(config, length)
    assert count_matmul_flops(jax.make_jaxpr(total)(params)) == rows * length * computed
    assert count_matmul_flops(jax.make_jaxpr(jax.grad(total))(params)) == 3 * rows * length * computed


def test_remat_policies_recompute_what_they_say(tiny):
    """From nothing at all to nearly a forward pass: what is saved is read off the products of the backward pass."""
    config, rows, length = tiny.config(), 2, 12
    counts = ledger(config, sequence_length=length)

    def recomputed(**policy):
        total, params = _loss(tiny, config, rows=rows, length=length, runtime=Runtime(**policy))
        flops = count_matmul_flops(jax.make_jaxpr(jax.grad(total))(params)) / (rows * length)
        return flops - 3 * as_computed(config, length)

    scores = all_scores(config, length)
    down = 2 * 3 * 24 * 40  # written to the stream, which the next block's input holds anyway
    assert recomputed() == 0
    assert recomputed(remat="matmuls") == scores / 2  # query times key: kernels keep no scores for the policy
    everything = counts.forward["attention"] + counts.forward["mlp"] + scores - down
    assert recomputed(remat="full") == everything
    assert recomputed(remat="mlp_gate+mlp_up") == everything - counts.forward["mlp"] + down
    assert recomputed(remat="attention_out") == everything - scores / 2
    last = 2 * 3 * (4 * 8) * 24  # the product behind attention, whose input is needed all the same
    assert recomputed(remat="attention_proj") == everything - last


def test_counts_by_hand(tiny):
    config = tiny.config(attention={"windows": (4, 0, 100)})
    counts = ledger(config, sequence_length=10)
    d, heads, kv, h, f, v, layers = 24, 4, 2, 8, 40, 61, 3
    attention, mlp, norms = layers * d * h * (2 * heads + 2 * kv), layers * 3 * d * f, (2 * layers + 1) * d
    assert dict(counts.params_by_component) == {
        "embedding": v * d,
        "attention": attention,
        "mlp": mlp,
        "norms": norms,
        "head": d * v,
    }
    specs = tree.paths(split_model(config).specs)
    assert counts.params_total == sum(spec.size for spec in specs.values())
    assert counts.params_nonembedding == attention + mlp + norms
    assert counts.six_n == 6 * (attention + mlp + norms + d * v)
    # Of ten queries, window 4 lets 1 2 3 4 4 4 4 4 4 4 keys be seen; no window, or one wider than the row, 1 to 10.
    seen = (34 + 55 + 55) / 10
    assert counts.forward["scores"] == pytest.approx(4 * heads * h * seen)
    assert counts.causal_exact == pytest.approx(6 * (attention + mlp + d * v) + 12 * heads * h * seen)


def test_experts_count_as_far_as_a_token_meets_them(tiny):
    config = tiny.config(moe=MoeConfig(experts=6, active=2, dim=16, shared_dim=8, dense_layers=1))
    counts = ledger(config, sequence_length=10)
    expert, others = 3 * 24 * 16, 1 * 3 * 24 * 40 + 2 * (24 * 6 + 3 * 24 * 8)
    assert counts.params_by_component["mlp"] == others + 2 * 6 * expert
    assert counts.params_total - counts.params_active == 2 * 4 * expert
    assert counts.forward["mlp"] == 2 * (others + 2 * 2 * expert)
    assert counts.six_n == 6 * (counts.params_active - counts.params_by_component["embedding"])


def test_counter_multiplies_through_control_flow():
    x = jnp.ones((4, 4))
    one = 2 * 4**3

    def count(f):
        return count_matmul_flops(jax.make_jaxpr(f)(x))

    assert count(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=5)[0]) == 5 * one
    assert count(lambda x: jax.lax.fori_loop(0, 3, lambda _, c: c @ x, x)) == 3 * one
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)) == 2 * one
    assert count(lambda x: jax.vmap(lambda row: x @ row)(x)) == one
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    island = jax.shard_map(
        lambda x: x @ jnp.ones((4, 4)),
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec("rows"),
        out_specs=jax.sharding.PartitionSpec("rows"),
    )
    assert count_matmul_flops(jax.make_jaxpr(island)(jnp.ones((16, 4)))) == 2 * 16 * 4 * 4
    with pytest.raises(ValueError, match="while loop cannot be counted"):
        count(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ x, x))
