"""OLMo 2 (OLMo Team 2024): norms after the branches, and of queries and keys over all heads together."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    attention_rows,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
)
from maxlm.model.table import Table

_NORMS = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",), attention_bias=(False,))
    attention = {"qk_norm": "joint"}
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0), attention=attention, norm_placement="post")


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "Olmo2ForCausalLM", "olmo2", attention_bias=False)


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**_NORMS), *attention_rows(model), *mlp_rows(model)])


def _model(embed: int, mlp: int, layers: int, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=100_352,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=kv_heads, head_dim=128, qk_norm="joint"),
        rope=RopeConfig(theta=500_000.0),
        mlp=MlpConfig(dim=mlp),
        norm_placement="post",
        norm_epsilon=1e-6,
    )


FAMILY = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    # OLMo Team 2024, table 3, and the config.json files of allenai/OLMo-2-*.
    presets={
        "olmo-2-1b": _model(2048, 8192, 16, 16, 16),
        "olmo-2-7b": _model(4096, 11_008, 32, 32, 32),
        "olmo-2-13b": _model(5120, 13_824, 40, 40, 40),
        "olmo-2-32b": _model(5120, 27_648, 64, 40, 8),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
