"""Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases on queries, keys and values; windows where a config asks."""

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
    only(hf, hidden_act=("silu",))
    attention = {"bias": True, "windows": late_windows_from_hf(hf)}
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0), attention=attention)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "Qwen2ForCausalLM", "qwen2", **windows_to_hf(model))


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**PRE_NORMS), *attention_rows(model), *mlp_rows(model)])


def _model(
    embed: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int = 152_064,
    tied: bool = False,
    epsilon: float = 1e-6,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=kv_heads, head_dim=embed // heads, bias=True),
        rope=RopeConfig(theta=1e6),
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=epsilon,
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    # Sizes of the config.json files of Qwen/Qwen2-* and Qwen/Qwen2.5-* (base models).
    presets={
        "qwen2-0.5b": _model(896, 4864, 24, 14, 2, vocab=151_936, tied=True),
        "qwen2-1.5b": _model(1536, 8960, 28, 12, 2, vocab=151_936, tied=True),
        "qwen2-7b": _model(3584, 18_944, 28, 28, 4),
        "qwen2-72b": _model(8192, 29_568, 80, 64, 8, epsilon=1e-5),
        "qwen2.5-0.5b": _model(896, 4864, 24, 14, 2, vocab=151_936, tied=True),
        "qwen2.5-1.5b": _model(1536, 8960, 28, 12, 2, vocab=151_936, tied=True),
        "qwen2.5-3b": _model(2048, 11_008, 36, 16, 2, vocab=151_936, tied=True),
        "qwen2.5-7b": _model(3584, 18_944, 28, 28, 4),
        "qwen2.5-14b": _model(5120, 13_824, 48, 40, 8, epsilon=1e-5),
        "qwen2.5-32b": _model(5120, 27_648, 64, 40, 8, epsilon=1e-5),
        "qwen2.5-72b": _model(8192, 29_568, 80, 64, 8, epsilon=1e-5),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
