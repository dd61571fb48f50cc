"""Qwen 3 (Yang et al. 2025), dense: Llama with norms of queries and keys, and a head dim of its own."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    PRE_NORMS,
    attention_rows,
    late_windows_from_hf,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
    windows_to_hf,
)
from maxlm.model.table import Table


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",), attention_bias=(False,))
    attention = {"qk_norm": "head", "head_dim": hf.get("head_dim", 128), "windows": late_windows_from_hf(hf)}
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0), attention=attention)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "Qwen3ForCausalLM", "qwen3", attention_bias=False, **windows_to_hf(model))


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**PRE_NORMS), *attention_rows(model), *mlp_rows(model)])


def _model(embed: int, mlp: int, layers: int, heads: int, *, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=8, head_dim=128, qk_norm="head"),
        rope=RopeConfig(theta=1e6),
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=1e-6,
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    # Yang et al. 2025, table 1, and the config.json files of Qwen/Qwen3-*.
    presets={
        "qwen3-0.6b": _model(1024, 3072, 28, 16, tied=True),
        "qwen3-1.7b": _model(2048, 6144, 28, 16, tied=True),
        "qwen3-4b": _model(2560, 9728, 36, 32, tied=True),
        "qwen3-8b": _model(4096, 12_288, 36, 32),
        "qwen3-14b": _model(5120, 17_408, 40, 40),
        "qwen3-32b": _model(5120, 25_600, 64, 64),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
