"""DeepSeek-V3 and R1 (DeepSeek-AI 2024b): DeepSeek-V2 with sigmoid scores and a bias in the choice of experts, and
a layer that predicts one token further."""

from __future__ import annotations

import math
from typing import Any

from maxlm.config import AttentionConfig, LatentConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    LAYER,
    PRE_NORMS,
    expert_rows,
    latent_from_hf,
    latent_rope_from_hf,
    latent_rows,
    latent_to_hf,
    layered,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    shared_experts,
    whole_table,
    with_mtp_rows,
)
from maxlm.model.table import Table, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(
        hf,
        hidden_act=("silu",),
        attention_bias=(False,),
        rms_norm_eps=(1e-6,),
        moe_layer_freq=(1,),
        rope_interleave=(True,),
        scoring_func=("sigmoid",),
        topk_method=("noaux_tc",),
    )
    rope = latent_rope_from_hf(hf)
    moe = MoeConfig(
        experts=hf["n_routed_experts"],
        active=hf["num_experts_per_tok"],
        dim=hf["moe_intermediate_size"],
        shared_dim=hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
        router="sigmoid",
        normalise=hf.get("norm_topk_prob", True),
        selection_bias=True,
        groups=hf.get("n_group", 8),
        top_groups=hf.get("topk_group", 4),
        weight_scale=float(hf.get("routed_scaling_factor", 2.5)),
        dense_layers=hf.get("first_k_dense_replace", 3),
    )
    further = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 0))
    return model_from_hf(hf, rope=rope, attention=latent_from_hf(hf, rope), moe=moe, mtp_layers=further)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return model_to_hf(
        model,
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        n_routed_experts=moe.experts,
        num_experts_per_tok=moe.active,
        moe_intermediate_size=moe.dim,
        n_shared_experts=shared_experts(moe),
        norm_topk_prob=moe.normalise,
        n_group=moe.groups,
        topk_group=moe.top_groups,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        routed_scaling_factor=moe.weight_scale,
        first_k_dense_replace=moe.dense_layers,
        moe_layer_freq=1,
        num_nextn_predict_layers=model.mtp_layers,
        **latent_to_hf(model),
    )


def _table(model: ModelConfig) -> Table:
    bias = row(LAYER + "mlp.gate.e_score_correction_bias", "layers/mlp/selection_bias")
    common = [*norm_rows(**PRE_NORMS), *latent_rows(model)]
    experts = [*expert_rows(model), bias]
    table = whole_table(model, layered(model, common=common, dense=mlp_rows(model), experts=experts))
    return with_mtp_rows(model, table, [*common, *experts])


_V3 = ModelConfig(
    vocab_size=129_280,
    embed_dim=7168,
    num_layers=61,
    attention=AttentionConfig(
        q_heads=128,
        kv_heads=128,
        head_dim=192,
        scale=192**-0.5 * (0.1 * math.log(40.0) + 1.0) ** 2,
        latent=LatentConfig(kv_dim=512, query_dim=1536, rope_dim=64, value_dim=128),
    ),
    rope=RopeConfig(
        interleaved=True, scaling="yarn", factor=40.0, original_length=4096, turns=(1.0, 32.0), attention_factor=1.0
    ),
    mlp=MlpConfig(dim=18_432),
    moe=MoeConfig(
        experts=256,
        active=8,
        dim=2048,
        shared_dim=2048,
        router="sigmoid",
        weight_scale=2.5,
        groups=8,
        top_groups=4,
        selection_bias=True,
        dense_layers=3,
    ),
    mtp_layers=1,
    norm_epsilon=1e-6,
)

FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    model_types=("deepseek_v3",),
    # DeepSeek-AI 2024b, section 4.2, and the config.json of deepseek-ai/DeepSeek-V3-Base; R1 is of the same make.
    presets={"deepseek-v3": _V3},
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
