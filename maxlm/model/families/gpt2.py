"""GPT-2 (Radford et al. 2019): layer norms, learned positions, biases everywhere, GELU, a tied head."""

from __future__ import annotations

import dataclasses
from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.table import Row, Table, joined, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, activation_function=("gelu_new", "gelu_pytorch_tanh"), add_cross_attention=(False,))
    only(hf, scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), tie_word_embeddings=(True,))
    model = _model(hf["n_embd"], hf["n_layer"], hf["n_head"], vocab=hf["vocab_size"], positions=hf["n_positions"])
    return _with(model, mlp=hf.get("n_inner") or 4 * hf["n_embd"], epsilon=hf.get("layer_norm_epsilon", 1e-5))


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.learned_positions,
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": model.attention.q_heads,
        "n_inner": model.mlp.dim,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
        "tie_word_embeddings": True,
    }


def _table(model: ModelConfig) -> Table:
    layer, ours = "transformer.h.{layer}.", "layers/attention/"
    projections = {f"{ours}{name}": "D H h -> D (H h)" for name in ("query", "key", "value")}
    biases = {f"{ours}{name}_bias": "H h -> (H h)" for name in ("query", "key", "value")}
    rows: list[Row] = [
        row("transformer.wte.weight", "embedding/table"),
        row("transformer.wpe.weight", "embedding/positions"),
        joined(layer + "attn.c_attn.weight", projections, axis=1),
        joined(layer + "attn.c_attn.bias", biases, axis=0),
        row(layer + "attn.c_proj.weight", ours + "output", "H h D -> (H h) D"),
        row(layer + "attn.c_proj.bias", ours + "output_bias"),
        row(layer + "mlp.c_fc.weight", "layers/mlp/up"),
        row(layer + "mlp.c_fc.bias", "layers/mlp/up_bias"),
        row(layer + "mlp.c_proj.weight", "layers/mlp/down"),
        row(layer + "mlp.c_proj.bias", "layers/mlp/down_bias"),
    ]
    norms = {
        "layers/attention_norm": layer + "ln_1",
        "layers/mlp_norm": layer + "ln_2",
        "final_norm": "transformer.ln_f",
    }
    for mine, theirs in norms.items():
        rows += [row(f"{theirs}.weight", f"{mine}/scale"), row(f"{theirs}.bias", f"{mine}/bias")]
    return Table(
        tuple(rows),
        copies={"lm_head.weight": "transformer.wte.weight"},
        ignored=(r".*\.attn\.(masked_)?bias",),  # the causal mask, which old files hold
        outer="transformer.",
    )


def _model(embed: int, layers: int, heads: int, *, vocab: int = 50_257, positions: int = 1024) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=heads, head_dim=embed // heads, bias=True, output_bias=True),
        rope=RopeConfig(fraction=0.0),
        mlp=MlpConfig(dim=4 * embed, kind="gelu", bias=True),
        learned_positions=positions,
        norm="layer",
        norm_epsilon=1e-5,
        tie_embeddings=True,
    )


def _with(model: ModelConfig, *, mlp: int, epsilon: float) -> ModelConfig:
    return dataclasses.replace(model, mlp=dataclasses.replace(model.mlp, dim=mlp), norm_epsilon=epsilon)


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    # Sizes of the config.json files of openai-community/gpt2, -medium, -large and -xl.
    presets={
        "gpt2": _model(768, 12, 12),
        "gpt2-medium": _model(1024, 24, 16),
        "gpt2-large": _model(1280, 36, 20),
        "gpt2-xl": _model(1600, 48, 25),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
