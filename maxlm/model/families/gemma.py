"""Gemma (Gemma Team 2024a): GeGLU, norms whose scale is an offset from one, scaled and tied embeddings."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    PRE_NORMS,
    attention_rows,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
)
from maxlm.model.table import Table


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, attention_bias=(False,), use_bidirectional_attention=(None, False))
    # The first files said "gelu" and meant, as the code had it, its tanh form.
    only(hf, hidden_act=("gelu", "gelu_pytorch_tanh"), hidden_activation=(None, "gelu_pytorch_tanh"))
    return model_from_hf(
        hf,
        rope=rope_from_hf(hf, theta=10_000.0),
        attention={"head_dim": hf.get("head_dim", 256)},
        mlp="geglu",
        norm="rms_offset",
        embed_scale=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "GemmaForCausalLM", "gemma", hidden_act="gelu_pytorch_tanh", attention_bias=False)


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**PRE_NORMS), *attention_rows(model), *mlp_rows(model)])


def _model(embed: int, mlp: int, layers: int, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=256_000,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=kv_heads, head_dim=256),
        rope=RopeConfig(theta=10_000.0),
        mlp=MlpConfig(dim=mlp, kind="geglu"),
        norm="rms_offset",
        norm_epsilon=1e-6,
        tie_embeddings=True,
        embed_scale=True,
    )


FAMILY = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    model_types=("gemma",),
    # Gemma Team 2024a, table 1.
    presets={
        "gemma-2b": _model(2048, 16_384, 18, 8, 1),
        "gemma-7b": _model(3072, 24_576, 28, 16, 16),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
