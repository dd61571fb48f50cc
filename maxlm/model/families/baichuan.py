"""Baichuan 2 (Yang et al. 2023): Llama with one tensor for queries, keys and values, and a head of unit columns.

The 7B model has rotary positions and the 13B model ALiBi, which is how their config.json files differ in kind: that of
the 13B model has no max_position_embeddings. Baichuan 13B, the first, calls itself the same, and has a plain head; its
vocabulary tells it apart.
"""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    LAYER,
    PRE_NORMS,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    output_rows,
    rope_from_hf,
    rope_to_hf,
    whole_table,
)
from maxlm.model.table import Row, Table, joined

_FIRST_VOCAB = 64_000  # of Baichuan 1, config.json of baichuan-inc/Baichuan-13B-Base; Baichuan 2 has 125,696


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",), tie_word_embeddings=(False,))
    normed = hf["vocab_size"] != _FIRST_VOCAB
    if "max_position_embeddings" in hf:
        return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0), normed_head=normed)
    return model_from_hf(hf, rope=RopeConfig(fraction=0.0), attention={"alibi": True}, normed_head=normed)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    content = model_to_hf(model, "BaichuanForCausalLM", "baichuan", model_max_length=4096)
    if not model.attention.alibi:
        return content | {"max_position_embeddings": 4096}
    return {word: value for word, value in content.items() if word not in rope_to_hf(model.rope)}


def _table(model: ModelConfig) -> Table:
    heads = {f"layers/attention/{name}": "D H h -> (H h) D" for name in ("query", "key", "value")}
    rows: list[Row] = [joined(LAYER + "self_attn.W_pack.weight", heads, axis=0), *output_rows(model)]
    return whole_table(model, [*norm_rows(**PRE_NORMS), *rows, *mlp_rows(model)])


FAMILY = Family(
    name="baichuan",
    architectures=("BaichuanForCausalLM",),
    model_types=("baichuan",),
    # Yang et al. 2023, table 2, and the config.json files of baichuan-inc/Baichuan2-7B-Base and -13B-Base.
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
        "baichuan2-13b": ModelConfig(
            vocab_size=125_696,
            embed_dim=5120,
            num_layers=40,
            attention=AttentionConfig(q_heads=40, kv_heads=40, head_dim=128, alibi=True),
            rope=RopeConfig(fraction=0.0),
            mlp=MlpConfig(dim=13_696),
            norm_epsilon=1e-6,
            normed_head=True,
        ),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
