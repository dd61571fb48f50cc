"""InternLM 2 and 2.5 (Cai et al. 2024): Llama with one tensor for queries, keys and values, kv head by kv head."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    ROTARY,
    model_from_hf,
    model_to_hf,
    rope_from_hf,
)
from maxlm.model.table import Row, Table, joined, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",), bias=(False,), pretraining_tp=(1,))
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0))


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    content = model_to_hf(model, "InternLM2ForCausalLM", "internlm2", bias=False)
    scaling = content.pop("rope_scaling", None)
    # The model's own code knows the older word, and of the factor nothing else.
    return content | {"rope_scaling": scaling and {"type": scaling["rope_type"], "factor": scaling["factor"]}}


def _table(model: ModelConfig) -> Table:
    layer, ours = "model.layers.{layer}.", "layers/attention/"
    # Of each kv head the queries that share it, its key and its value.
    heads = {
        ours + "query": "D (K G) h -> K G h D",
        ours + "key": "D K h -> K 1 h D",
        ours + "value": "D K h -> K 1 h D",
    }
    sizes = {"K": model.attention.kv_heads}
    rows: list[Row] = [
        row("model.tok_embeddings.weight", "embedding/table"),
        row(layer + "attention_norm.weight", "layers/attention_norm/scale"),
        joined(layer + "attention.wqkv.weight", heads, axis=1, form="K N h D -> (K N h) D", sizes=sizes),
        row(layer + "attention.wo.weight", ours + "output", "H h D -> D (H h)"),
        row(layer + "ffn_norm.weight", "layers/mlp_norm/scale"),
        row(layer + "feed_forward.w1.weight", "layers/mlp/gate", "D F -> F D"),
        row(layer + "feed_forward.w3.weight", "layers/mlp/up", "D F -> F D"),
        row(layer + "feed_forward.w2.weight", "layers/mlp/down", "F D -> D F"),
        row("model.norm.weight", "final_norm/scale"),
    ]
    if model.tie_embeddings:
        return Table(tuple(rows), copies={"output.weight": "model.tok_embeddings.weight"}, ignored=(ROTARY,))
    return Table((*rows, row("output.weight", "head/kernel", "D V -> V D")), ignored=(ROTARY,))


def _model(embed: int, mlp: int, layers: int, heads: int, *, rope: RopeConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=92_544,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=8, head_dim=128),
        rope=rope,
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=1e-5,
    )


_STRETCHED = RopeConfig(theta=1e6, scaling="dynamic", factor=2.0, original_length=32_768)

FAMILY = Family(
    name="internlm2",
    architectures=("InternLM2ForCausalLM",),
    model_types=("internlm2",),
    # Cai et al. 2024, table 1, and the config.json files of internlm/internlm2-* and internlm/internlm2_5-*.
    presets={
        "internlm2-1.8b": _model(2048, 8192, 24, 16, rope=_STRETCHED),
        "internlm2-7b": _model(4096, 14_336, 32, 32, rope=_STRETCHED),
        "internlm2-20b": _model(6144, 16_384, 48, 48, rope=_STRETCHED),
        "internlm2.5-1.8b": _model(2048, 8192, 24, 16, rope=_STRETCHED),
        "internlm2.5-7b": _model(4096, 14_336, 32, 32, rope=_STRETCHED),
        "internlm2.5-20b": _model(6144, 16_384, 48, 48, rope=RopeConfig(theta=5e7)),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
