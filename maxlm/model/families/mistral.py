"""Mistral (Jiang et al. 2023): Llama with grouped heads and, in some sizes, a window in every layer."""

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
    only(hf, hidden_act=("silu",))
    windows = (hf.get("sliding_window", 4096) or 0,)
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0), attention={"windows": windows})


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "MistralForCausalLM", "mistral", sliding_window=model.attention.windows[0] or None)


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**PRE_NORMS), *attention_rows(model), *mlp_rows(model)])


def _model(
    embed: int, mlp: int, layers: int, heads: int, *, vocab: int, theta: float = 1e6, window: int = 0
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=8, head_dim=128, windows=(window,)),
        rope=RopeConfig(theta=theta),
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=1e-5,
    )


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    # Sizes of the config.json files of mistralai/Mistral-7B-v0.1 to v0.3, Ministral-8B-Instruct-2410,
    # Mistral-Nemo-Base-2407, Mistral-Small-Instruct-2409, Mistral-Small-24B-Base-2501, Mistral-Large-Instruct-2407.
    presets={
        "mistral-7b-v0.1": _model(4096, 14_336, 32, 32, vocab=32_000, theta=1e4, window=4096),
        "mistral-7b-v0.2": _model(4096, 14_336, 32, 32, vocab=32_000),
        "mistral-7b-v0.3": _model(4096, 14_336, 32, 32, vocab=32_768),
        "ministral-8b": _model(4096, 12_288, 36, 32, vocab=131_072, theta=1e8, window=32_768),
        "mistral-nemo-12b": _model(5120, 14_336, 40, 32, vocab=131_072),
        "mistral-small-22b": _model(6144, 16_384, 56, 48, vocab=32_768),
        "mistral-small-24b": _model(5120, 32_768, 40, 32, vocab=131_072, theta=1e8),
        "mistral-large-123b": _model(12_288, 28_672, 88, 96, vocab=32_768),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
