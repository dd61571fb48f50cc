"""DeepSeek-V2 (DeepSeek-AI 2024): latent attention, a dense prefix, shared experts, and groups of experts."""

from __future__ import annotations

import math
from typing import Any

from maxlm.config import AttentionConfig, LatentConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
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
)
from maxlm.model.table import Table


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(
        hf,
        hidden_act=("silu",),
        attention_bias=(False,),
        rms_norm_eps=(1e-6,),
        moe_layer_freq=(1,),
        norm_topk_prob=(False,),
        mlp_bias=(False,),
        topk_method=("greedy", "group_limited_greedy"),
        scoring_func=("softmax",),
    )
    rope = latent_rope_from_hf(hf)
    groups = hf["n_group"] if hf.get("topk_method") == "group_limited_greedy" else 1
    moe = MoeConfig(
        experts=hf["n_routed_experts"],
        active=hf["num_experts_per_tok"],
        dim=hf["moe_intermediate_size"],
        shared_dim=hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
        normalise=False,
        groups=groups,
        top_groups=hf["topk_group"] if groups > 1 else 1,
        weight_scale=float(hf.get("routed_scaling_factor", 1.0)),
        dense_layers=hf.get("first_k_dense_replace", 0),
    )
    return model_from_hf(hf, rope=rope, attention=latent_from_hf(hf, rope), moe=moe)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return model_to_hf(
        model,
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        n_routed_experts=moe.experts,
        num_experts_per_tok=moe.active,
        moe_intermediate_size=moe.dim,
        n_shared_experts=shared_experts(moe),
        norm_topk_prob=False,
        topk_method="group_limited_greedy" if moe.groups > 1 else "greedy",
        n_group=moe.groups,
        topk_group=moe.top_groups,
        routed_scaling_factor=moe.weight_scale,
        first_k_dense_replace=moe.dense_layers,
        moe_layer_freq=1,
        **latent_to_hf(model),
    )


def _table(model: ModelConfig) -> Table:
    common = [*norm_rows(**PRE_NORMS), *latent_rows(model)]
    return whole_table(model, layered(model, common=common, dense=mlp_rows(model), experts=expert_rows(model)))


def _model(embed: int, mlp: int, layers: int, heads: int, *, query_dim: int, moe: MoeConfig) -> ModelConfig:
    growth = 0.1 * 0.707 * math.log(40.0) + 1.0
    return ModelConfig(
        vocab_size=102_400,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(
            q_heads=heads,
            kv_heads=heads,
            head_dim=192,
            scale=192**-0.5 * growth**2,
            latent=LatentConfig(kv_dim=512, query_dim=query_dim, rope_dim=64, value_dim=128),
        ),
        rope=RopeConfig(
            interleaved=True,
            scaling="yarn",
            factor=40.0,
            original_length=4096,
            turns=(1.0, 32.0),
            attention_factor=1.0,
        ),
        mlp=MlpConfig(dim=mlp),
        moe=moe,
        norm_epsilon=1e-6,
    )


_LITE = MoeConfig(experts=64, active=6, dim=1408, shared_dim=2 * 1408, normalise=False, dense_layers=1)
_FULL = MoeConfig(
    experts=160,
    active=6,
    dim=1536,
    shared_dim=2 * 1536,
    normalise=False,
    weight_scale=16.0,
    groups=8,
    top_groups=3,
    dense_layers=1,
)

FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    # DeepSeek-AI 2024, section 3.1.2 and appendix B, and the config.json files of deepseek-ai/DeepSeek-V2(-Lite).
    presets={
        "deepseek-v2-lite": _model(2048, 10_944, 27, 16, query_dim=0, moe=_LITE),
        "deepseek-v2": _model(5120, 12_288, 60, 128, query_dim=1536, moe=_FULL),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
