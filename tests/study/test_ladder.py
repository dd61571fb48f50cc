"""Rules by one dial, and the coordinate check that tells the transfer rule from the standard one."""

import dataclasses
import math
from pathlib import Path

import pytest

from maxlm.config import AttentionConfig, LatentConfig, MlpConfig, MoeConfig
from maxlm.errors import UserError
from maxlm.model.decoder import split_model
from maxlm.optim.optimizers import assign
from maxlm.study.coordinates import check_coordinates
from maxlm.study.ladder import Rules, Shape, configure, shape_by_depth, shape_by_flops, shape_by_params, size_of
from tests.study.fake import RULES, base_config

BASE = base_config(Path("/nowhere"))
STANDARD = dataclasses.replace(RULES, rule="standard", base_rate=0.0)


def test_each_dial_sets_the_shape():
    assert shape_by_depth(Rules(aspect=64, head_dim=64), 12) == Shape(12, 768)
    for params in (1e5, 1e6, 1e7):
        found = size_of(RULES, BASE, shape_by_params(RULES, BASE, params)).besides_embeddings
        assert abs(math.log(found / params)) < 0.35
    shape = shape_by_flops(RULES, BASE, 1e14)
    size = size_of(RULES, BASE, shape)
    assert 0.6 < size.flops * RULES.tokens_per_param * size.besides_embeddings / 1e14 < 1.7


def test_the_budget_is_spent_and_the_rest_follows():
    config = configure(BASE, Shape(2, 64), STANDARD, flops=1e13)
    size = size_of(STANDARD, BASE, Shape(2, 64))
    tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
    assert tokens * size.flops == pytest.approx(1e13, rel=0.01)
    assert config.optim.peak_lr == pytest.approx(0.3118 * 1e13**-0.125)
    assert config.data.batch_size * config.data.sequence_length == pytest.approx(0.2920 * 1e13**0.3271, rel=0.25)
    given = dataclasses.replace(STANDARD, base_rate=0.006, batch_tokens=512)
    config = configure(BASE, Shape(2, 64), given, flops=1e13)
    assert config.optim.peak_lr == 0.006 and config.data.batch_size * config.data.sequence_length == 512
    tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
    assert tokens * size.flops == pytest.approx(1e13, rel=0.01)


def test_the_transfer_rule_sets_rates_decays_and_init_by_path():
    config = configure(BASE, Shape(2, 128), RULES, flops=1e13)
    found = assign(config.optim, split_model(config.model).specs)
    wide = {path: item for path, item in found.items() if item.lr != 1}
    attention = [f"layers/attention/{name}" for name in ("query", "key", "value", "output")]
    assert set(wide) == {"head/kernel", *attention, "layers/mlp/up", "layers/mlp/down"}
    for item in wide.values():
        assert item.lr == 32 / 128
        assert item.lr * item.decay == pytest.approx(config.optim.weight_decay)
    assert found["final_norm/scale"].decay == 0
    assert config.model.head_init == 0 and config.optim.peak_lr == RULES.base_rate
    same = configure(BASE, Shape(2, 32), RULES, flops=1e13)
    assert {item.lr for item in assign(same.optim, split_model(same.model).specs).values()} == {1.0}


ATTENTION = {f"attention/{name}" for name in ("query", "key", "value", "output")}
MLP = {"mlp/gate", "mlp/up", "mlp/down"}
ROUTED = {"mlp/router", "mlp/gate", "mlp/up"}
SHARED = {"mlp/shared_gate", "mlp/shared/gate", "mlp/shared/up"}
LATENT = {"attention/latent", "attention/shared_key", "attention/query", "attention/output"}


def within(room, names):
    return {f"{room}/{name}" for name in names}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, within("layers", ATTENTION | MLP)),
        # A dim of their own: what comes out of the experts has the same fan-in at every width.
        ({"moe": MoeConfig(experts=4, dim=16)}, within("layers", ATTENTION | ROUTED)),
        (
            {"moe": MoeConfig(experts=4, shared_dim=16, shared_gate=True, dense_layers=1, selection_bias=True)},
            within("prefix", ATTENTION | MLP) | within("layers", ATTENTION | ROUTED | SHARED | {"mlp/down"}),
        ),
        (
            {"attention": AttentionConfig(latent=LatentConfig(kv_dim=16, rope_dim=8, value_dim=16))},
            within("layers", LATENT | MLP),
        ),
        (
            {"attention": AttentionConfig(latent=LatentConfig(kv_dim=16, query_dim=12, rope_dim=8, value_dim=16))},
            within("layers", LATENT - {"attention/query"} | {"attention/query_down"} | MLP),
        ),
        (
            {"mtp_layers": 1},
            within("layers", ATTENTION | MLP) | within("mtp/block", ATTENTION | MLP) | {"mtp/projection"},
        ),
    ],
    ids=["dense", "experts", "shared experts", "latent", "latent queries", "mtp"],
)
def test_what_learns_slower_in_a_wide_model_is_read_off_its_declarations(model, expected):
    base = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, mlp=MlpConfig(kind="swiglu"), **model))
    config = configure(base, Shape(2, 128), RULES, flops=1e13)
    found = assign(config.optim, split_model(config.model).specs)
    slower = {path for path, item in found.items() if item.lr != 1}
    assert slower == expected | {"head/kernel"}
    assert {(found[path].lr, found[path].decay / config.optim.weight_decay) for path in slower} == {(1 / 4, 4.0)}
    assert {item.decay for path, item in found.items() if path.endswith(("scale", "bias"))} == {0.0}


def test_what_the_transfer_rule_cannot_do_is_refused():
    tied = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, tie_embeddings=True))
    with pytest.raises(UserError, match="tie_embeddings=False"):
        configure(tied, Shape(2, 64), RULES)
    with pytest.raises(UserError, match="no multiple of the rules' head_dim 16"):
        configure(BASE, Shape(2, 40), RULES)
    with pytest.raises(UserError, match="standard or transfer"):
        Rules(rule="mup")


def test_the_coordinate_check_tells_the_rules_apart():
    found = {
        rules.rule: check_coordinates(BASE, rules, widths=(32, 128), layers=1, seeds=(0,))
        for rules in (RULES, STANDARD)
    }
    assert found["transfer"].passed, found["transfer"].sentence()
    assert not found["standard"].passed, found["standard"].sentence()
    assert max(item.slope for item in found["standard"].coordinates) > 0.6
