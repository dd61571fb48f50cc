"""Baichuan 2, 7B (Yang et al. 2023): Llama with one tensor for queries, keys and values, and a head of unit columns."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig
from maxlm.model.family import Family, FamilyError, HFConfig, only
from maxlm.model.hf import (
    LAYER,
    PRE_NORMS,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    output_rows,
    rope_from_hf,
    whole_table,
)
from maxlm.model.table import Row, Table, joined


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",), tie_word_embeddings=(False,))
    if "max_position_embeddings" not in hf:
        raise FamilyError(
            "config.json of BaichuanForCausalLM has no max_position_embeddings, as that of the 13B model, which tells "
            "positions by ALiBi; only the 7B model, with rotary positions, is supported"
        )
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0), normed_head=True)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(model, "BaichuanForCausalLM", "baichuan", max_position_embeddings=4096, model_max_length=4096)


def _table(model: ModelConfig) -> Table:
    heads = {f"layers/attention/{name}": "D H h -> (H h) D" for name in ("query", "key", "value")}
    rows: list[Row] = [joined(LAYER + "self_attn.W_pack.weight", heads, axis=0), *output_rows(model)]
    return whole_table(model, [*norm_rows(**PRE_NORMS), *rows, *mlp_rows(model)])


FAMILY = Family(
    name="baichuan",
    architectures=("BaichuanForCausalLM",),
    model_types=("baichuan",),
    # Yang et al. 2023, table 2, and the config.json of baichuan-inc/Baichuan2-7B-Base.
    presets={
        "baichuan2-7b": ModelConfig(
            vocab_size=125_696,
            embed_dim=4096,
            num_layers=32,
            attention=AttentionConfig(q_heads=32, kv_heads=32, head_dim=128),
            mlp=MlpConfig(dim=11_008),
            norm_epsilon=1e-6,
            normed_head=True,
        ),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
