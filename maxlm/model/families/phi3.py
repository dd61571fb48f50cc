"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024): Llama with fused projections; windows and LongRoPE in some sizes."""

from __future__ import annotations

from typing import Any

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.model.family import Family, HFConfig, only
from maxlm.model.hf import (
    LAYER,
    PRE_NORMS,
    fused_mlp_rows,
    model_from_hf,
    model_to_hf,
    norm_rows,
    output_rows,
    rope_from_hf,
    whole_table,
)
from maxlm.model.table import Row, Table, joined


def _from_hf(hf: HFConfig) -> ModelConfig:
    only(hf, hidden_act=("silu",), attention_bias=(False,))
    windows = (hf.get("sliding_window") or 0,)
    return model_from_hf(hf, rope=rope_from_hf(hf, theta=10_000.0, fraction=1.0), attention={"windows": windows})


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    stretched = round(model.rope.original_length * model.rope.factor)
    return model_to_hf(
        model,
        "Phi3ForCausalLM",
        "phi3",
        attention_bias=False,
        sliding_window=model.attention.windows[0] or None,
        **({"max_position_embeddings": stretched} if stretched else {}),
    )


def _table(model: ModelConfig) -> Table:
    ours = {"query": "D H h -> (H h) D", "key": "D K h -> (K h) D", "value": "D K h -> (K h) D"}
    projections = {f"layers/attention/{name}": form for name, form in ours.items()}
    rows: list[Row] = [joined(LAYER + "self_attn.qkv_proj.weight", projections, axis=0), *output_rows(model)]
    return whole_table(model, [*norm_rows(**PRE_NORMS), *rows, *fused_mlp_rows()])


_PHI35_SHORT = (
    *(1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, *(1.0499999523162842,) * 5),
    *(1.0699999332427979, 1.0999999046325684, 1.1099998950958252, 1.1599998474121094, 1.1599998474121094),
    *(1.1699998378753662, 1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378),
    *(1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903),
    *(1.9899996519088745, *(2.0199997425079346,) * 6, *(2.0299997329711914,) * 9, 2.0799996852874756),
    *(2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328),
    *(2.749999523162842, 2.8399994373321533),
)
_PHI35_LONG = (
    *(1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115),
    *(1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863),
    *(4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137),
    *(17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523),
    *(32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156),
    *(50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457),
    *(62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457),
    *(63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688),
    *(64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336),
    *(64.51000213623047, 64.52999877929688, 64.83999633789062),
)
_PHI4_LONG = (
    *(1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649),
    *(2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533),
    *(5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651),
    *(14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1),
    *(32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77),
)


def _longrope(short: tuple[float, ...], long: tuple[float, ...], *, fraction: float = 1.0) -> RopeConfig:
    """From 4,096 positions to 131,072."""
    return RopeConfig(
        fraction=fraction,
        scaling="longrope",
        factor=32.0,
        original_length=4096,
        short_factors=short,
        long_factors=long,
    )


def _model(
    embed: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    rope: RopeConfig,
    vocab: int = 32_064,
    window: int = 0,
    tied: bool = False,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=embed,
        num_layers=layers,
        attention=AttentionConfig(q_heads=heads, kv_heads=kv_heads, head_dim=embed // heads, windows=(window,)),
        rope=rope,
        mlp=MlpConfig(dim=mlp),
        norm_epsilon=1e-5,
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    # The config.json files of microsoft/Phi-3-mini-4k-instruct, Phi-3-medium-4k-instruct, Phi-3.5-mini-instruct, phi-4
    # and Phi-4-mini-instruct; the 128k models of Phi-3 differ from the 4k ones in their rotary factors alone.
    presets={
        "phi-3-mini-4k": _model(3072, 8192, 32, 32, 32, rope=RopeConfig(), window=2047),
        "phi-3-medium-4k": _model(5120, 17_920, 40, 40, 10, rope=RopeConfig(), window=2047),
        "phi-3.5-mini": _model(3072, 8192, 32, 32, 32, rope=_longrope(_PHI35_SHORT, _PHI35_LONG), window=262_144),
        "phi-4": _model(5120, 17_920, 40, 40, 10, rope=RopeConfig(theta=250_000.0), vocab=100_352),
        "phi-4-mini": _model(
            *(3072, 8192, 32, 24, 8),
            rope=_longrope((1.0,) * 48, _PHI4_LONG, fraction=0.75),
            vocab=200_064,
            window=262_144,
            tied=True,
        ),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=_table,
)
