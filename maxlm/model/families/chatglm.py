"""ChatGLM 3 and the first files of GLM-4 (GLM Team 2024), in the layout of their own code.

Half of a head is turned, in neighbouring pairs; queries, keys and values are one tensor with biases.
"""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.table import Row, Table, joined, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, rmsnorm=(True,), add_bias_linear=(False,), post_layer_norm=(True,), tie_word_embeddings=(False,))
    only(hf, apply_residual_connection_post_layernorm=(False,), fp32_residual_connection=(False,), pre_seq_len=(None,))
    only(hf, original_rope=(True,))  # the other kind turns dims that lie half of them apart
    heads = hf["num_attention_heads"]
    return _model(
        hf["num_layers"],
        vocab=hf["padded_vocab_size"],
        embed=hf["hidden_size"],
        mlp=hf["ffn_hidden_size"],
        epsilon=hf.get("layernorm_epsilon", 1e-5),
        stretch=hf.get("rope_ratio", 1),
        attention=AttentionConfig(
            q_heads=heads,
            kv_heads=hf["multi_query_group_num"] if hf.get("multi_query_attention") else heads,
            head_dim=hf["kv_channels"],
            bias=hf.get("add_qkv_bias", False),
        ),
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    stretch = model.rope.theta / 10_000.0
    return {
        "architectures": ["ChatGLMForConditionalGeneration"],
        "model_type": "chatglm",
        "padded_vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "ffn_hidden_size": model.mlp.dim,
        "num_layers": model.num_layers,
        "num_attention_heads": model.attention.q_heads,
        "multi_query_attention": True,
        "multi_query_group_num": model.attention.kv_heads,
        "kv_channels": model.attention.head_dim,
        "add_qkv_bias": model.attention.bias,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
        "rope_ratio": int(stretch) if stretch.is_integer() else stretch,
        "layernorm_epsilon": model.norm_epsilon,
        "tie_word_embeddings": False,
    }


def _table(model: ModelConfig) -> Table:
    layer, ours = "transformer.encoder.layers.{layer}.", "layers/attention/"
    letters = {"query": "H", "key": "K", "value": "K"}
    heads = {ours + name: f"D {n} h -> ({n} h) D" for name, n in letters.items()}
    biases = {f"{ours}{name}_bias": f"{n} h -> ({n} h)" for name, n in letters.items()}
    fused = {"layers/mlp/gate": "D F -> F D", "layers/mlp/up": "D F -> F D"}
    rows: list[Row] = [
        row("transformer.embedding.word_embeddings.weight", "embedding/table"),
        row(layer + "input_layernorm.weight", "layers/attention_norm/scale"),
        joined(layer + "self_attention.query_key_value.weight", heads, axis=0),
        row(layer + "self_attention.dense.weight", ours + "output", "H h D -> D (H h)"),
        row(layer + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        joined(layer + "mlp.dense_h_to_4h.weight", fused, axis=0),
        row(layer + "mlp.dense_4h_to_h.weight", "layers/mlp/down", "F D -> D F"),
        row("transformer.encoder.final_layernorm.weight", "final_norm/scale"),
        row("transformer.output_layer.weight", "head/kernel", "D V -> V D"),
    ]
    if model.attention.bias:
        rows.append(joined(layer + "self_attention.query_key_value.bias", biases, axis=0))
    return Table(tuple(rows), ignored=(r"transformer\.rotary_pos_emb\.inv_freq",))


_ATTENTION = AttentionConfig(q_heads=32, kv_heads=2, head_dim=128, bias=True)


def _model(
    layers: int,
    *,
    vocab: int,
    stretch: float = 1.0,
    embed: int = 4096,
    mlp: int = 13_696,
    epsilon: float = 1e-5,
    attention: AttentionConfig = _ATTENTION,
) -> ModelConfig:
    """stretch: `rope_ratio`, by which the base of the rotary frequencies is multiplied."""
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=embed,
        num_layers=layers,
        attention=attention,
        rope=RopeConfig(theta=10_000.0 * stretch, fraction=0.5, interleaved=True),
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=epsilon,
    )


FAMILY = Family(
    name="chatglm",
    architectures=("ChatGLMForConditionalGeneration", "ChatGLMModel"),
    model_types=("chatglm",),
    # The config.json files of zai-org/chatglm3-6b, chatglm3-6b-32k and chatglm3-6b-128k.
    presets={
        "chatglm3-6b": _model(28, vocab=65_024),
        "chatglm3-6b-32k": _model(28, vocab=65_024, stretch=50.0),
        "chatglm3-6b-128k": _model(28, vocab=65_024, stretch=500.0),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
