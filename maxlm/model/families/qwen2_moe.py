"""Qwen 1.5 and 2 with experts (Yang et al. 2024): Qwen 2, and shared experts behind a gate."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    LAYER,
    PRE_NORMS,
    attention_rows,
    expert_rows,
    late_windows_from_hf,
    layered,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
    windows_to_hf,
)
from maxlm.model.table import Table, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    dense = hf.get("mlp_only_layers") or []
    only(hf, hidden_act=("silu",), decoder_sparse_step=(1,), mlp_only_layers=(None, [*range(len(dense))]))
    moe = MoeConfig(
        experts=hf.get("num_experts", 60),
        active=hf.get("num_experts_per_tok", 4),
        dim=hf["moe_intermediate_size"],
        shared_dim=hf["shared_expert_intermediate_size"],
        shared_gate=True,
        normalise=hf.get("norm_topk_prob", False),
        dense_layers=len(dense),
    )
    if hf.get("use_sliding_window") and not hf.get("layer_types"):  # versions differ in which layers these are
        only(hf, use_sliding_window=(False,))
    attention = {"bias": hf.get("qkv_bias", True), "windows": late_windows_from_hf(hf)}
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0), attention=attention, moe=moe)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(
        model,
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        qkv_bias=model.attention.bias,
        num_experts=model.moe.experts,
        num_experts_per_tok=model.moe.active,
        moe_intermediate_size=model.moe.dim,
        shared_expert_intermediate_size=model.moe.shared_dim,
        norm_topk_prob=model.moe.normalise,
        decoder_sparse_step=1,
        mlp_only_layers=[*range(model.moe.dense_layers)],
        **windows_to_hf(model),
    )


def _table(model: ModelConfig) -> Table:
    gate = row(LAYER + "mlp.shared_expert_gate.weight", "layers/mlp/shared_gate", "D 1 -> 1 D")
    common = [*norm_rows(**PRE_NORMS), *attention_rows(model)]
    experts = [*expert_rows(model, shared="shared_expert"), gate]
    return whole_table(model, layered(model, common=common, dense=mlp_rows(model), experts=experts))


def _model(
    embed: int, mlp: int, layers: int, heads: int, kv_heads: int, *, experts: int, active: int, dim: int, shared: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=kv_heads, head_dim=128, bias=True),
        rope=RopeConfig(theta=1e6),
        mlp=MlpConfig(dim=mlp),
        moe=MoeConfig(experts=experts, active=active, dim=dim, shared_dim=shared, shared_gate=True, normalise=False),
        norm_epsilon=1e-6,
    )


FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    # The config.json files of Qwen/Qwen1.5-MoE-A2.7B and Qwen/Qwen2-57B-A14B.
    presets={
        "qwen1.5-moe-a2.7b": _model(2048, 5632, 24, 16, 16, experts=60, active=4, dim=1408, shared=5632),
        "qwen2-57b-a14b": _model(3584, 18_944, 28, 28, 4, experts=64, active=8, dim=2560, shared=20_480),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
