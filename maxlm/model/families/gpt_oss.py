"""gpt-oss (OpenAI 2025): sinks, a window in every other layer, biases, and experts with a clamped activation."""

from __future__ import annotations

import dataclasses
from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    LAYER,
    PRE_NORMS,
    attention_rows,
    layer_types,
    layered,
    model_from_hf,
    model_to_hf,
    norm_rows,
    rope_from_hf,
    whole_table,
    windows_from_hf,
)
from maxlm.model.table import Table, joined, row


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",), swiglu_limit=(7.0,), swiglu_alpha=(1.702,), attention_bias=(True,))
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(hf["num_hidden_layers"])]
    attention = {
        "head_dim": hf.get("head_dim", 64),
        "bias": True,
        "output_bias": True,
        "sinks": True,
        "windows": windows_from_hf({"layer_types": kinds, "sliding_window": 128, **hf}),
    }
    model = model_from_hf(
        hf,
        rope=rope_from_hf(hf, theta=150_000.0),
        attention=attention,
        mlp="clamped_swiglu",
        moe=MoeConfig(
            experts=hf.get("num_local_experts", 128),
            active=hf.get("num_experts_per_tok") or hf.get("experts_per_token", 4),
            dim=hf["intermediate_size"],
        ),
    )
    return dataclasses.replace(model, mlp=dataclasses.replace(model.mlp, bias=True))


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return model_to_hf(
        model,
        "GptOssForCausalLM",
        "gpt_oss",
        attention_bias=True,
        swiglu_limit=7.0,
        intermediate_size=model.moe.dim,
        num_local_experts=model.moe.experts,
        num_experts_per_tok=model.moe.active,
        sliding_window=max(model.attention.windows) or None,
        layer_types=layer_types(model),
    )


def _table(model: ModelConfig) -> Table:
    place = LAYER + "mlp."
    matrices = {f"layers/mlp/{name}": "E D F -> E D F 1" for name in ("gate", "up")}
    biases = {f"layers/mlp/{name}_bias": "E F -> E F 1" for name in ("gate", "up")}
    experts = [
        row(place + "router.weight", "layers/mlp/router", "D E -> E D"),
        row(place + "router.bias", "layers/mlp/router_bias"),
        joined(place + "experts.gate_up_proj", matrices, axis=3, form="E D F n -> E D (F n)"),  # in turn
        joined(place + "experts.gate_up_proj_bias", biases, axis=2, form="E F n -> E (F n)"),
        row(place + "experts.down_proj", "layers/mlp/down"),
        row(place + "experts.down_proj_bias", "layers/mlp/down_bias"),
    ]
    sinks = row(LAYER + "self_attn.sinks", "layers/attention/sink_bias")
    common = [*norm_rows(**PRE_NORMS), *attention_rows(model), sinks]
    return whole_table(model, layered(model, common=common, dense=[], experts=experts))


def _model(layers: int, *, experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=201_088,
        embed_dim=2880,
        num_layers=layers,
        attention=AttentionConfig(
            q_heads=64, kv_heads=8, head_dim=64, bias=True, output_bias=True, sinks=True, windows=(128, 0)
        ),
        rope=RopeConfig(
            theta=150_000.0,
            scaling="yarn",
            factor=32.0,
            original_length=4096,
            turns=(1.0, 32.0),
            whole_pairs=False,
        ),
        mlp=MlpConfig(dim=2880, kind="clamped_swiglu", bias=True),
        moe=MoeConfig(experts=experts, active=4, dim=2880),
        norm_epsilon=1e-5,
    )


FAMILY = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    # OpenAI 2025, table 1, and the config.json files of openai/gpt-oss-20b and gpt-oss-120b.
    presets={
        "gpt-oss-20b": _model(24, experts=32),
        "gpt-oss-120b": _model(36, experts=128),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
