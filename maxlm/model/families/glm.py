"""GLM-4 (GLM Team 2024), the 9B models of June 2024: half of a head turned, in neighbouring pairs."""

from __future__ import annotations

import dataclasses
from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    PRE_NORMS,
    attention_rows,
    fused_mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
)
from maxlm.model.table import Table


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",))
    rope = dataclasses.replace(rope_from_hf(hf, theta=10_000.0, fraction=0.5), interleaved=True)
    attention = {"head_dim": hf.get("head_dim", 128), "bias": hf.get("attention_bias", True)}
    return model_from_hf(hf, rope=rope, attention=attention)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "GlmForCausalLM", "glm", attention_bias=model.attention.bias)


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**PRE_NORMS), *attention_rows(model), *fused_mlp_rows()])


def _model(*, stretch: float = 1.0) -> ModelConfig:
    """stretch: `rope_ratio` of the original files, by which the base of the rotary frequencies is multiplied."""
    return ModelConfig(
        vocab_size=151_552,
        embed_dim=4096,
        num_layers=40,
        attention=AttentionConfig(q_heads=32, kv_heads=2, head_dim=128, bias=True),
        rope=RopeConfig(theta=10_000.0 * stretch, fraction=0.5, interleaved=True),
        mlp=MlpConfig(dim=13_696),
        norm_epsilon=1.5625e-7,
    )


FAMILY = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
    model_types=("glm",),
    # The config.json files of zai-org/glm-4-9b-hf, glm-4-9b-chat-hf and glm-4-9b-chat-1m-hf.
    presets={
        "glm-4-9b": _model(),
        "glm-4-9b-chat": _model(stretch=500.0),
        "glm-4-9b-chat-1m": _model(stretch=10_000.0),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
