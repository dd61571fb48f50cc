"""Qwen 3 with experts (Yang et al. 2025)."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    PRE_NORMS,
    attention_rows,
    expert_rows,
    layered,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
)
from maxlm.model.table import Table


def _from_hf(hf: HFConfig) -> ModelConfig:
    dense = hf.get("mlp_only_layers") or []
    only(hf, hidden_act=("silu",), attention_bias=(False,), decoder_sparse_step=(1,))
    only(hf, mlp_only_layers=(None, [*range(len(dense))]))
    moe = MoeConfig(
        experts=hf.get("num_experts") or hf.get("num_local_experts", 128),
        active=hf.get("num_experts_per_tok", 8),
        dim=hf["moe_intermediate_size"],
        normalise=hf.get("norm_topk_prob", False),
        dense_layers=len(dense),
    )
    # The peer gives all layers the window or none, whatever max_window_layers and layer_types say. Where the file names
    # no head dim it takes that of the widths, unlike in the dense models.
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else 0
    attention = {"qk_norm": "head", "windows": (window or 0,)}
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0), attention=attention, moe=moe)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(
        model,
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        attention_bias=False,
        num_experts=model.moe.experts,
        num_experts_per_tok=model.moe.active,
        moe_intermediate_size=model.moe.dim,
        norm_topk_prob=model.moe.normalise,
        decoder_sparse_step=1,
        mlp_only_layers=[*range(model.moe.dense_layers)],
        use_sliding_window=bool(max(model.attention.windows)),
        sliding_window=max(model.attention.windows) or None,
    )


def _table(model: ModelConfig) -> Table:
    common = [*norm_rows(**PRE_NORMS), *attention_rows(model)]
    return whole_table(model, layered(model, common=common, dense=mlp_rows(model), experts=expert_rows(model)))


def _model(embed: int, mlp: int, layers: int, heads: int, *, dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=4, head_dim=128, qk_norm="head"),
        rope=RopeConfig(theta=1e6),
        mlp=MlpConfig(dim=mlp),
        moe=MoeConfig(experts=128, active=8, dim=dim),
        norm_epsilon=1e-6,
    )


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    # Yang et al. 2025, table 2, and the config.json files of Qwen/Qwen3-30B-A3B and Qwen3-235B-A22B.
    presets={
        "qwen3-30b-a3b": _model(2048, 6144, 48, 32, dim=768),
        "qwen3-235b-a22b": _model(4096, 12_288, 94, 64, dim=1536),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
