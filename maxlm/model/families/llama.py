"""Llama (Touvron et al. 2023; Dubey et al. 2024): pre-norm, rotary positions, SwiGLU, grouped heads."""

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
    only(hf, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), pretraining_tp=(1,))
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0))


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "LlamaForCausalLM", "llama", attention_bias=False, mlp_bias=False)


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**PRE_NORMS), *attention_rows(model), *mlp_rows(model)])


def _llama2(embed: int, mlp: int, layers: int, heads: int, kv_heads: int) -> ModelConfig:
    attention = AttentionConfig(q_heads=heads, kv_heads=kv_heads, head_dim=embed // heads)
    return ModelConfig(
        vocab_size=32_000,
        embed_dim=embed,
        num_layers=layers,
        attention=attention,
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=1e-5,
    )


def _llama3(embed: int, mlp: int, layers: int, heads: int, *, stretch: float = 1.0, tied: bool = False) -> ModelConfig:
    """stretch: from 3.1 on, how much longer texts may be than the 8,192 positions of pretraining."""
    rope = RopeConfig(theta=500_000.0)
    if stretch > 1:
        rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=stretch, original_length=8192)
    return ModelConfig(
        vocab_size=128_256,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=8, head_dim=128 if embed > 2048 else 64),
        rope=rope,
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=1e-5,
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    presets={
        "llama-2-7b": _llama2(4096, 11_008, 32, 32, 32),
        "llama-2-13b": _llama2(5120, 13_824, 40, 40, 40),
        "llama-2-70b": _llama2(8192, 28_672, 80, 64, 8),
        "llama-3-8b": _llama3(4096, 14_336, 32, 32),
        "llama-3-70b": _llama3(8192, 28_672, 80, 64),
        "llama-3.1-8b": _llama3(4096, 14_336, 32, 32, stretch=8.0),
        "llama-3.1-70b": _llama3(8192, 28_672, 80, 64, stretch=8.0),
        "llama-3.1-405b": _llama3(16_384, 53_248, 126, 128, stretch=8.0),
        "llama-3.2-1b": _llama3(2048, 8192, 16, 32, stretch=32.0, tied=True),
        "llama-3.2-3b": _llama3(3072, 8192, 28, 24, stretch=32.0, tied=True),
        "llama-3.3-70b": _llama3(8192, 28_672, 80, 64, stretch=8.0),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
