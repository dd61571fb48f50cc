"""Gemma 2 (Gemma Team 2024b): norms on both sides of a branch, soft-caps, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    SANDWICH_NORMS,
    attention_rows,
    layer_types,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    query_scale_from_hf,
    query_scale_to_hf,
    rope_from_hf,
    whole_table,
    windows_from_hf,
)
from maxlm.model.table import Table


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, attention_bias=(False,), use_bidirectional_attention=(None, False))
    only(hf, hidden_activation=("gelu_pytorch_tanh",))
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(hf["num_hidden_layers"])]
    attention = {
        "head_dim": hf.get("head_dim", 256),
        "scale": query_scale_from_hf(hf),
        "softcap": hf.get("attn_logit_softcapping", 50.0) or 0.0,
        "windows": windows_from_hf({"layer_types": kinds, "sliding_window": 4096, **hf}),
    }
    return model_from_hf(
        hf,
        rope=rope_from_hf(hf, theta=10_000.0),
        attention=attention,
        mlp="geglu",
        norm="rms_offset",
        norm_placement="both",
        embed_scale=True,
        logits_softcap=hf.get("final_logit_softcapping", 30.0) or 0.0,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(
        model,
        "Gemma2ForCausalLM",
        "gemma2",
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        query_pre_attn_scalar=query_scale_to_hf(model),
        attn_logit_softcapping=model.attention.softcap or None,
        final_logit_softcapping=model.logits_softcap or None,
        sliding_window=max(model.attention.windows) or None,
        layer_types=layer_types(model),
    )


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**SANDWICH_NORMS), *attention_rows(model), *mlp_rows(model)])


def _model(
    embed: int, mlp: int, layers: int, heads: int, kv_heads: int, *, head_dim: int = 256, scale: float = 0.0
) -> ModelConfig:
    return ModelConfig(
        vocab_size=256_000,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(
            q_heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, softcap=50.0, windows=(4096, 0)
        ),
        rope=RopeConfig(theta=10_000.0),
        mlp=MlpConfig(dim=mlp, kind="geglu"),
        norm="rms_offset",
        norm_placement="both",
        norm_epsilon=1e-6,
        tie_embeddings=True,
        embed_scale=True,
        logits_softcap=30.0,
    )


FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    # Gemma Team 2024b, table 1.
    presets={
        "gemma-2-2b": _model(2304, 9216, 26, 8, 4),
        "gemma-2-9b": _model(3584, 14_336, 42, 16, 8),
        "gemma-2-27b": _model(4608, 36_864, 46, 32, 16, head_dim=128, scale=144**-0.5),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
