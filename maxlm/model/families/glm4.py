"""GLM-4-0414 (April 2025): GLM-4 with norms on both sides of a branch."""

from __future__ import annotations

import dataclasses
from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    attention_rows,
    fused_mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
)
from maxlm.model.table import Table

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_mlp_layernorm",
}


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",))
    rope = dataclasses.replace(rope_from_hf(hf, theta=10_000.0, fraction=0.5), interleaved=True)
    attention = {"head_dim": hf.get("head_dim", 128), "bias": hf.get("attention_bias", True)}
    return model_from_hf(hf, rope=rope, attention=attention, norm_placement="both")


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "Glm4ForCausalLM", "glm4", attention_bias=model.attention.bias)


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**_NORMS), *attention_rows(model), *fused_mlp_rows()])


def _model(embed: int, mlp: int, layers: int, heads: int, kv_heads: int, *, bias: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_552,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=kv_heads, head_dim=128, bias=bias),
        rope=RopeConfig(theta=10_000.0, fraction=0.5, interleaved=True),
        mlp=MlpConfig(dim=mlp),
        norm_placement="both",
        norm_epsilon=1e-5,
    )


FAMILY = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    model_types=("glm4",),
    # The config.json files of zai-org/GLM-4-9B-0414 and GLM-4-32B-0414.
    presets={
        "glm-4-9b-0414": _model(4096, 13_696, 40, 32, 2, bias=True),
        "glm-4-32b-0414": _model(6144, 23_040, 61, 48, 2, bias=False),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
