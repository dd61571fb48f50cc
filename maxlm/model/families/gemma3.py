"""Gemma 3 (Gemma Team 2025), text: norms of queries and keys, five windows to a layer without, and a base of their own
for the rotary positions of the windows.

From 4B on it is published with a half that sees, whose tensors are left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, Whole, only
from maxlm.model.hf import (
    SANDWICH_NORMS,
    attention_rows,
    layer_types,
    mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    query_scale_from_hf,
    query_scale_to_hf,
    rope_from_hf,
    whole_table,
    windows_from_hf,
)
from maxlm.model.table import Table

_USUAL = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}
"""What the published config.json of the 4B model leaves out."""


def _from_hf(hf: HFConfig) -> ModelConfig:
    hf = {**_USUAL, **hf}
    only(hf, attention_bias=(False,), use_bidirectional_attention=(None, False))
    # transformers reads a soft-cap of the scores, and leaves it out.
    only(hf, hidden_activation=("gelu_pytorch_tanh",), attn_logit_softcapping=(None, 0.0))
    pattern = hf.get("sliding_window_pattern") or 6
    layers = range(1, hf["num_hidden_layers"] + 1)
    kinds = ["sliding_attention" if i % pattern else "full_attention" for i in layers]
    attention = {
        "head_dim": hf.get("head_dim", 256),
        "scale": query_scale_from_hf(hf),
        "qk_norm": "head",
        "windows": windows_from_hf({"layer_types": kinds, "sliding_window": 4096, **hf}),
    }
    return model_from_hf(
        hf,
        rope=_rope(hf),
        attention=attention,
        mlp="geglu",
        norm="rms_offset",
        norm_placement="both",
        embed_scale=True,
        logits_softcap=hf.get("final_logit_softcapping") or 0.0,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def _rope(hf: HFConfig) -> RopeConfig:
    """One set of words for layers with a window and one for those without, or the older words."""
    said = hf.get("rope_parameters") or {}
    if "full_attention" not in said:
        local = hf.get("rope_local_base_freq", 10_000.0)
        return dataclasses.replace(rope_from_hf(hf, theta=1e6), local_theta=float(local))
    only(said["sliding_attention"], rope_type=("default",))
    rope = rope_from_hf({**hf, "rope_parameters": said["full_attention"]}, theta=1e6)
    return dataclasses.replace(rope, local_theta=float(said["sliding_attention"].get("rope_theta", 10_000.0)))


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(
        model,
        "Gemma3ForCausalLM",
        "gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        query_pre_attn_scalar=query_scale_to_hf(model),
        attn_logit_softcapping=None,
        final_logit_softcapping=model.logits_softcap or None,
        rope_local_base_freq=model.rope.local_theta or model.rope.theta,
        sliding_window=max(model.attention.windows) or None,
        layer_types=layer_types(model),
    )


def _table(model: ModelConfig) -> Table:
    return whole_table(model, [*norm_rows(**SANDWICH_NORMS), *attention_rows(model), *mlp_rows(model)])


def _model(
    embed: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    window: int,
    head_dim: int = 256,
    scale: float = 0.0,
    vocab: int = 262_208,
    stretch: float = 1.0,
) -> ModelConfig:
    rope = RopeConfig(theta=1e6, local_theta=10_000.0)
    if stretch > 1:
        rope = dataclasses.replace(rope, scaling="linear", factor=stretch)
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(
            q_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            qk_norm="head",
            windows=(window, window, window, window, window, 0),
        ),
        rope=rope,
        mlp=MlpConfig(dim=mlp, kind="geglu"),
        norm="rms_offset",
        norm_placement="both",
        norm_epsilon=1e-6,
        tie_embeddings=True,
        embed_scale=True,
    )


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    # Gemma Team 2025, tables 1 and 2, and the config.json files of google/gemma-3-*-pt; the larger ones' text models.
    presets={
        "gemma-3-270m": _model(640, 2048, 18, 4, 1, window=512, vocab=262_144),
        "gemma-3-1b": _model(1152, 6912, 26, 4, 1, window=512, vocab=262_144),
        "gemma-3-4b": _model(2560, 10_240, 34, 8, 4, window=1024, stretch=8.0),
        "gemma-3-12b": _model(3840, 15_360, 48, 16, 8, window=1024, stretch=8.0),
        "gemma-3-27b": _model(5376, 21_504, 62, 32, 16, window=1024, head_dim=128, scale=168**-0.5, stretch=8.0),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
    whole=Whole(
        architectures=("Gemma3ForConditionalGeneration",),
        model_types=("gemma3",),
        config="text_config",
        prefixes={
            "language_model.model.": "model.",
            "model.language_model.": "model.",
            "language_model.lm_head.": "lm_head.",
        },
        others=(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*",),
    ),
)
