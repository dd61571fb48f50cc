"""ERNIE 4.5 (Baidu 2025), dense: Llama with neighbouring dims as rotary pairs, and biases where a config asks."""

from __future__ import annotations

import dataclasses
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
    bias = hf.get("use_bias", False)
    model = model_from_hf(
        hf,
        rope=dataclasses.replace(rope_from_hf(hf, theta=500_000.0), interleaved=True),
        attention={"head_dim": hf.get("head_dim", 128), "bias": bias, "output_bias": bias},
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )
    return dataclasses.replace(model, mlp=dataclasses.replace(model.mlp, bias=bias))


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "Ernie4_5ForCausalLM", "ernie4_5", use_bias=model.mlp.bias)


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**PRE_NORMS), *attention_rows(model), *mlp_rows(model)])


FAMILY = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    model_types=("ernie4_5",),
    # The config.json of baidu/ERNIE-4.5-0.3B-PT.
    presets={
        "ernie-4.5-0.3b": ModelConfig(
            vocab_size=103_424,
            embed_dim=1024,
            num_layers=18,
            attention=AttentionConfig(q_heads=16, kv_heads=2, head_dim=128),
            rope=RopeConfig(theta=500_000.0, interleaved=True),
            mlp=MlpConfig(dim=3072),
            norm_epsilon=1e-5,
            tie_embeddings=True,
        ),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
