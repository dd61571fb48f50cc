"""ERNIE 4.5 with experts (Baidu 2025): a dense prefix, shared experts, and a bias in the choice of experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    LAYER,
    PRE_NORMS,
    attention_rows,
    expert_rows,
    layered,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    shared_experts,
    whole_table,
)
from maxlm.model.table import Table, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    only(hf, hidden_act=("silu",), use_bias=(False,), moe_layer_interval=(1,), moe_layer_end_index=(-1, layers - 1))
    moe = MoeConfig(
        experts=hf["moe_num_experts"],
        active=hf["moe_k"],
        dim=hf["moe_intermediate_size"],
        shared_dim=hf["moe_intermediate_size"] * hf.get("moe_num_shared_experts", 0),
        selection_bias=True,
        dense_layers=hf.get("moe_layer_start_index", 0),
    )
    return model_from_hf(
        hf,
        rope=dataclasses.replace(rope_from_hf(hf, theta=500_000.0), interleaved=True),
        moe=moe,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return model_to_hf(
        model,
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        use_bias=False,
        moe_num_experts=moe.experts,
        moe_k=moe.active,
        moe_intermediate_size=moe.dim,
        moe_num_shared_experts=shared_experts(moe),
        moe_layer_start_index=moe.dense_layers,
        moe_layer_end_index=model.num_layers - 1,
        moe_layer_interval=1,
    )


def _table(model: ModelConfig) -> Table:
    bias = row(LAYER + "mlp.moe_statics.e_score_correction_bias", "layers/mlp/selection_bias", "E -> 1 E")
    common = [*norm_rows(**PRE_NORMS), *attention_rows(model)]
    experts = [*expert_rows(model), bias]
    table = whole_table(model, layered(model, common=common, dense=mlp_rows(model), experts=experts))
    # `transformers` keeps the routers in float32, too.
    precise = (*table.precise, "/mlp/router")
    return dataclasses.replace(table, ignored=(*table.ignored, r"model\.mtp_.*"), precise=precise)


def _model(
    embed: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    active: int,
    dim: int,
    shared: int,
    dense: int,
    tied: bool,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=103_424,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=kv_heads, head_dim=128),
        rope=RopeConfig(theta=500_000.0, interleaved=True),
        mlp=MlpConfig(dim=mlp),
        moe=MoeConfig(
            experts=64, active=active, dim=dim, shared_dim=shared * dim, selection_bias=True, dense_layers=dense
        ),
        norm_epsilon=1e-5,
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    model_types=("ernie4_5_moe",),
    # The config.json files of baidu/ERNIE-4.5-21B-A3B-PT and ERNIE-4.5-300B-A47B-PT.
    presets={
        "ernie-4.5-21b-a3b": _model(*(2560, 12_288, 28, 20, 4), active=6, dim=1536, shared=2, dense=1, tied=True),
        "ernie-4.5-300b-a47b": _model(*(8192, 28_672, 54, 64, 8), active=8, dim=3584, shared=0, dense=3, tied=False),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
