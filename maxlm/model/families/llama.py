"""Llama (Touvron et al. 2023; Dubey et al. 2024): pre-norm, rotary positions, SwiGLU, grouped heads."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig
from maxlm.model.family import Family, HFConfig, only, rope_theta
from maxlm.model.table import Row, Table, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), pretraining_tp=(1,))
    only(hf, rope_scaling=(None,))
    only(hf.get("rope_parameters") or {}, rope_type=("default",))
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        attention=AttentionConfig(
            q_heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rope_theta=rope_theta(hf, 10_000.0),
        ),
        mlp=MlpConfig(dim=hf["intermediate_size"]),
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    attention = model.attention
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": model.mlp.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.q_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rope_theta": attention.rope_theta,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _table(model: ModelConfig) -> Table:
    layer, attention = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    rows: list[Row] = [
        row("model.embed_tokens.weight", "embedding/table"),
        row(layer + "input_layernorm.weight", "layers/attention_norm/scale"),
        row(attention + "q_proj.weight", "layers/attention/query", "D H h -> (H h) D"),
        row(attention + "k_proj.weight", "layers/attention/key", "D K h -> (K h) D"),
        row(attention + "v_proj.weight", "layers/attention/value", "D K h -> (K h) D"),
        row(attention + "o_proj.weight", "layers/attention/output", "H h D -> D (H h)"),
        row(layer + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        row(layer + "mlp.gate_proj.weight", "layers/mlp/gate", "D F -> F D"),
        row(layer + "mlp.up_proj.weight", "layers/mlp/up", "D F -> F D"),
        row(layer + "mlp.down_proj.weight", "layers/mlp/down", "F D -> D F"),
        row("model.norm.weight", "final_norm/scale"),
    ]
    if not model.tie_embeddings:
        rows.append(row("lm_head.weight", "head/kernel", "D V -> V D"))
    return Table(
        rows=tuple(rows),
        copies={"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {},
        ignored=(r".*\.rotary_emb\.inv_freq",),
    )


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


def _llama3(embed: int, mlp: int, layers: int, heads: int) -> ModelConfig:
    attention = AttentionConfig(q_heads=heads, kv_heads=8, head_dim=embed // heads, rope_theta=500_000.0)
    return ModelConfig(
        vocab_size=128_256,
        embed_dim=embed,
        num_layers=layers,
        attention=attention,
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=1e-5,
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
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
