"""Mixtral (Jiang et al. 2024): Mistral with experts, of which a token is sent to two."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    LAYER,
    PRE_NORMS,
    attention_rows,
    layered,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
)
from maxlm.model.table import Table, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",))
    moe = MoeConfig(
        experts=hf.get("num_local_experts", 8), active=hf.get("num_experts_per_tok", 2), dim=hf["intermediate_size"]
    )
    attention = {"windows": (hf.get("sliding_window") or 0,)}
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=1e6), attention=attention, moe=moe)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(
        model,
        "MixtralForCausalLM",
        "mixtral",
        intermediate_size=model.moe.dim,
        num_local_experts=model.moe.experts,
        num_experts_per_tok=model.moe.active,
        sliding_window=model.attention.windows[0] or None,
    )


def _table(model: ModelConfig) -> Table:
    place = LAYER + "block_sparse_moe."
    experts = [
        row(place + "gate.weight", "layers/mlp/router", "D E -> E D"),
        row(place + "experts.{expert}.w1.weight", "layers/mlp/gate", "D F -> F D"),
        row(place + "experts.{expert}.w3.weight", "layers/mlp/up", "D F -> F D"),
        row(place + "experts.{expert}.w2.weight", "layers/mlp/down", "F D -> D F"),
    ]
    common = [*norm_rows(**PRE_NORMS), *attention_rows(model)]
    return whole_table(model, layered(model, common=common, dense=[], experts=experts))


def _model(embed: int, mlp: int, layers: int, heads: int, *, vocab: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=8, head_dim=128),
        rope=RopeConfig(theta=1e6),
        mlp=MlpConfig(dim=mlp),
        moe=MoeConfig(experts=8, active=2, dim=mlp),
        norm_epsilon=1e-5,
    )


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    # Jiang et al. 2024, table 1, and the config.json files of mistralai/Mixtral-8x7B-v0.1 and Mixtral-8x22B-v0.1.
    presets={
        "mixtral-8x7b": _model(4096, 14_336, 32, 32, vocab=32_000),
        "mixtral-8x22b": _model(6144, 16_384, 56, 48, vocab=32_000),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
