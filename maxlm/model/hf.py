"""Settings and tensor names that many architectures of Hugging Face's share, for the families' files to compose.

Most are descendants of Llama's: the same words in config.json and the same tree of modules, with a few more or fewer.
Config files are written in the words that versions 4 and 5 of `transformers` both read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from maxlm.config import AttentionConfig, LatentConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.model.family import FamilyError, HFConfig
from maxlm.model.table import Row, Table, joined, row

LAYER = "model.layers.{layer}."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROTARY = r".*\.rotary_emb\.inv_freq"
"""Frequencies that old files hold besides the weights."""


_TURNS = {
    "llama3": ("low_freq_factor", "high_freq_factor", 1.0, 4.0),
    "yarn": ("beta_slow", "beta_fast", 1.0, 32.0),
}
"""Of a kind of scaling, the words for the two turns, and what they are where nothing is said."""


def rope_from_hf(hf: HFConfig, *, theta: float, fraction: float | None = None) -> RopeConfig:
    """Rotary positions of a config.json, whose words for them have changed over time.

    Args:
      theta: where the file names no base.
      fraction: where the file does not say how much of the head is turned; None: of a family that turns all of it,
        whatever the file says, in transformers too.

    Raises:
      FamilyError: for a kind of scaling that is not known.
    """
    said = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    kind = said.get("rope_type") or said.get("type") or "default"
    rope = RopeConfig(theta=float(said.get("rope_theta") or hf.get("rope_theta") or theta))
    if fraction is not None:
        turned = said.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or fraction
        rope = dataclasses.replace(rope, fraction=float(turned))
    if kind == "default":
        return rope
    if kind not in (*_TURNS, "linear", "dynamic", "longrope", "su"):
        raise FamilyError(
            f"config.json has rotary positions of type {kind!r}; known: linear, dynamic, llama3, yarn, longrope"
        )
    longest: int = hf.get("max_position_embeddings") or 0
    original = said.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or longest
    if kind == "linear":
        return dataclasses.replace(rope, scaling=kind, factor=float(said["factor"]))
    if kind == "dynamic":
        return dataclasses.replace(rope, scaling=kind, factor=float(said["factor"]), original_length=longest)
    rope = dataclasses.replace(
        rope,
        scaling="longrope" if kind == "su" else kind,
        original_length=int(original),
        factor=float(said.get("factor") or longest / original),
        attention_factor=float(said.get("attention_factor") or 0.0),
    )
    if kind in _TURNS:
        slow, fast, few, many = _TURNS[kind]
        both, scores = said.get("mscale"), said.get("mscale_all_dim")
        if kind == "yarn" and both and scores and not rope.attention_factor:
            rope = dataclasses.replace(rope, attention_factor=_growth(rope.factor, both) / _growth(rope.factor, scores))
        return dataclasses.replace(
            rope,
            turns=(float(said.get(slow) or few), float(said.get(fast) or many)),
            whole_pairs=bool(said.get("truncate", True)),
        )
    return dataclasses.replace(
        rope,
        short_factors=tuple(map(float, said["short_factor"])),
        long_factors=tuple(map(float, said["long_factor"])),
    )


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """The inverse of `rope_from_hf`."""
    content: dict[str, Any] = {"rope_theta": rope.theta, "partial_rotary_factor": rope.fraction}
    if rope.scaling == "none":
        return content
    said: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "dynamic":
        content["max_position_embeddings"] = rope.original_length
    elif rope.scaling != "linear":
        said["original_max_position_embeddings"] = rope.original_length
    if rope.attention_factor:
        said["attention_factor"] = rope.attention_factor
    if rope.scaling in _TURNS:
        slow, fast, _, _ = _TURNS[rope.scaling]
        said |= dict(zip((slow, fast), rope.turns, strict=True))
    if rope.scaling == "yarn":
        said["truncate"] = rope.whole_pairs
    if rope.scaling == "longrope":
        said |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        content["original_max_position_embeddings"] = rope.original_length
    return content | {"rope_scaling": said}


def model_from_hf(
    hf: HFConfig, *, rope: RopeConfig, attention: Mapping[str, Any] | None = None, mlp: str = "swiglu", **settings: Any
) -> ModelConfig:
    """A model from the words that Llama's descendants share.

    Args:
      attention: settings of AttentionConfig besides the dims.
      mlp: kind of the feed-forward half.
      settings: of ModelConfig besides.

    Raises:
      FamilyError: the family has experts, and the file says that there are none.
    """
    if "moe" in settings and not settings["moe"].experts:
        raise FamilyError(f"config.json of {', '.join(hf.get('architectures') or ['?'])} speaks of no experts")
    heads = hf["num_attention_heads"]
    dims = AttentionConfig(
        q_heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
    )
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        attention=dataclasses.replace(dims, **attention or {}),
        rope=rope,
        mlp=MlpConfig(dim=hf["intermediate_size"], kind=mlp),
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        **{"tie_embeddings": bool(hf.get("tie_word_embeddings", False))} | settings,
    )


def model_to_hf(model: ModelConfig, architecture: str, model_type: str, **besides: Any) -> dict[str, Any]:
    """The inverse of `model_from_hf`, with a family's own words besides, which count where they are the same."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": model.mlp.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.q_heads,
        "num_key_value_heads": model.attention.kv_heads,
        "head_dim": model.attention.head_dim,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_embeddings,
        **rope_to_hf(model.rope),
        **besides,
    }


def windows_from_hf(hf: HFConfig) -> tuple[int, ...]:
    """The cycle of windows that `layer_types` and `sliding_window` say."""
    kinds: dict[str, int] = {"full_attention": 0, "sliding_attention": hf.get("sliding_window") or 0}
    if unknown := sorted({name for name in hf["layer_types"] if name not in kinds}):
        raise FamilyError(f"layer_types has {', '.join(unknown)}, but only {' and '.join(kinds)} are known")
    return shortest_cycle([kinds[name] for name in hf["layer_types"]])


def layer_types(model: ModelConfig) -> list[str]:
    """The inverse of `windows_from_hf`, besides the window."""
    windows = model.attention.windows
    return ["sliding_attention" if windows[i % len(windows)] else "full_attention" for i in range(model.num_layers)]


def late_windows_from_hf(hf: HFConfig) -> tuple[int, ...]:
    """As Qwen says it: if at all, then from layer `max_window_layers` on, unless `layer_types` says otherwise."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else 0
    if not window:
        return (0,)
    if hf.get("layer_types"):
        return windows_from_hf(hf)
    first = hf.get("max_window_layers", 28)
    return shortest_cycle([window if i >= first else 0 for i in range(hf["num_hidden_layers"])])


def windows_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `late_windows_from_hf`."""
    window = max(model.attention.windows)
    if not window:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": layer_types(model)}


def shortest_cycle(values: Sequence[int]) -> tuple[int, ...]:
    """The least that, repeated and cut off, gives the values."""
    size = next(n for n in range(1, len(values) + 1) if all(x == values[i % n] for i, x in enumerate(values)))
    return tuple(values[:size])


def attention_rows(model: ModelConfig) -> list[Row]:
    """Projections with their biases, and the norms of queries and keys, as in Llama, Qwen and OLMo."""
    place, ours, rows = LAYER + "self_attn.", "layers/attention/", []
    for name, short, letter in (("query", "q", "H"), ("key", "k", "K"), ("value", "v", "K")):
        rows.append(row(f"{place}{short}_proj.weight", ours + name, f"D {letter} h -> ({letter} h) D"))
        if model.attention.bias:
            rows.append(row(f"{place}{short}_proj.bias", f"{ours}{name}_bias", f"{letter} h -> ({letter} h)"))
        if model.attention.qk_norm != "none" and name != "value":
            joint = f"{letter} h -> ({letter} h)" if model.attention.qk_norm == "joint" else ""
            rows.append(row(f"{place}{short}_norm.weight", f"{ours}{name}_norm/scale", joint))
    return [*rows, *output_rows(model)]


def output_rows(model: ModelConfig) -> list[Row]:
    """The projection back to the stream."""
    rows = [row(LAYER + "self_attn.o_proj.weight", "layers/attention/output", "H h D -> D (H h)")]
    if model.attention.output_bias:
        rows.append(row(LAYER + "self_attn.o_proj.bias", "layers/attention/output_bias"))
    return rows


def mlp_rows(model: ModelConfig) -> list[Row]:
    """A gated feed-forward half with its biases."""
    forms, rows = {"gate": "D F -> F D", "up": "D F -> F D", "down": "F D -> D F"}, []
    for name, form in forms.items():
        rows.append(row(f"{LAYER}mlp.{name}_proj.weight", f"layers/mlp/{name}", form))
        if model.mlp.bias:
            rows.append(row(f"{LAYER}mlp.{name}_proj.bias", f"layers/mlp/{name}_bias"))
    return rows


def fused_mlp_rows() -> list[Row]:
    """A gated feed-forward half whose gate and hidden dims are one tensor."""
    fused = {"layers/mlp/gate": "D F -> F D", "layers/mlp/up": "D F -> F D"}
    return [
        joined(LAYER + "mlp.gate_up_proj.weight", fused, axis=0),
        row(LAYER + "mlp.down_proj.weight", "layers/mlp/down", "F D -> D F"),
    ]


def expert_rows(model: ModelConfig, *, shared: str = "shared_experts") -> list[Row]:
    """Experts as Qwen and DeepSeek name them: a tensor an expert and matrix, a router, and shared experts.

    Args:
      shared: their name for the shared experts.
    """
    forms, place = {"gate": "D F -> F D", "up": "D F -> F D", "down": "F D -> D F"}, LAYER + "mlp."
    rows = [row(place + "gate.weight", "layers/mlp/router", "D E -> E D")]
    for name, form in forms.items():
        rows.append(row(f"{place}experts.{{expert}}.{name}_proj.weight", f"layers/mlp/{name}", form))
        if model.moe.shared_dim:
            rows.append(row(f"{place}{shared}.{name}_proj.weight", f"layers/mlp/shared/{name}", form))
    return rows


def shared_experts(moe: MoeConfig) -> int:
    """How many experts of the routed ones' dim the shared ones are; 0 where there are no experts."""
    return moe.shared_dim // moe.dim if moe.dim else 0


def layered(model: ModelConfig, *, common: Sequence[Row], dense: Sequence[Row], experts: Sequence[Row]) -> list[Row]:
    """The rows of all layers: what they have in common, and the feed-forward halves of the first, which are dense, and
    of those with experts. All are written as if they were of one stack that begins at layer 0."""
    first = model.moe.dense_layers
    early = [dataclasses.replace(each, layers=range(first)) for each in _moved([*common, *dense], "prefix/")]
    late = [dataclasses.replace(each, layers=range(first, model.num_layers)) for each in (*common, *experts)]
    return early + late if first else late


def with_mtp_rows(model: ModelConfig, table: Table, block: Sequence[Row]) -> Table:
    """The table with the layers that predict further tokens, as DeepSeek names them: they are numbered on after the
    stack, and each has copies of the embedding and of the head.

    Args:
      block: rows of their blocks, written as if they were of the stack `layers`.
    """
    first, count = model.num_layers, model.mtp_layers
    if not count:  # they may be there all the same, and are left alone
        return dataclasses.replace(table, ignored=(*table.ignored, rf"model\.layers\.{first}\..*"))
    own = [
        *_moved(block, "mtp/block/"),
        row(LAYER + "enorm.weight", "mtp/embed_norm/scale"),
        row(LAYER + "hnorm.weight", "mtp/hidden_norm/scale"),
        row(LAYER + "eh_proj.weight", "mtp/projection", "F D -> D F"),
        row(LAYER + "shared_head.norm.weight", "mtp/out_norm/scale"),
    ]
    numbered = range(first, first + count)
    rows = [dataclasses.replace(each, layers=numbered) for each in own]
    head = EMBEDDING if model.tie_embeddings else HEAD
    copies = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": head}
    repeats = {LAYER.format(layer=i) + name: original for i in numbered for name, original in copies.items()}
    return dataclasses.replace(table, rows=(*table.rows, *rows), repeats=repeats)


def _moved(rows: Sequence[Row], stack: str) -> list[Row]:
    """Rows of `layers` as those of another stack."""
    return [
        dataclasses.replace(
            each, pieces=tuple(piece._replace(ours=piece.ours.replace("layers/", stack, 1)) for piece in each.pieces)
        )
        for each in rows
    ]


def norm_rows(**names: str) -> list[Row]:
    """Norms of a block: our name -> theirs."""
    return [row(f"{LAYER}{theirs}.weight", f"layers/{ours}/scale") for ours, theirs in names.items()]


PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""Llama's names, of which the second means: after the attention, before the feed-forward half."""

SANDWICH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
"""Gemma's names of norms on both sides of a branch."""


def query_scale_from_hf(hf: HFConfig) -> float:
    """`attention.scale` from Gemma's `query_pre_attn_scalar`."""
    head_dim = hf.get("head_dim", 256)
    scalar = hf.get("query_pre_attn_scalar", 256)
    return 0.0 if scalar == head_dim else float(scalar) ** -0.5


def query_scale_to_hf(model: ModelConfig) -> int:
    """The inverse of `query_scale_from_hf`."""
    scale = model.attention.scale
    return round(scale**-2) if scale else model.attention.head_dim


def latent_from_hf(hf: HFConfig, rope: RopeConfig) -> dict[str, Any]:
    """Settings of latent attention. DeepSeek's scores grow with the stretch of the positions: the square of what YaRN
    would multiply queries and keys by goes into their scale."""
    head_dim = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
    said = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    stretch = _growth(rope.factor, said.get("mscale_all_dim") or 0.0)
    latent = LatentConfig(
        kv_dim=hf["kv_lora_rank"],
        query_dim=hf.get("q_lora_rank") or 0,
        rope_dim=hf["qk_rope_head_dim"],
        value_dim=hf["v_head_dim"],
    )
    scale = head_dim**-0.5 * stretch**2 if stretch > 1 else 0.0
    heads = hf["num_attention_heads"]
    return {"latent": latent, "head_dim": head_dim, "kv_heads": heads, "scale": scale}


def latent_rope_from_hf(hf: HFConfig) -> RopeConfig:
    """Rotary positions of latent attention, of which neighbours are a pair."""
    return dataclasses.replace(rope_from_hf(hf, theta=10_000.0), interleaved=True)


def latent_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `latent_from_hf` and `latent_rope_from_hf`."""
    attention, rope, content = model.attention, model.rope, rope_to_hf(model.rope)
    if rope.scaling == "yarn":
        growth = (attention.scale * attention.head_dim**0.5) ** 0.5 if attention.scale else 1.0
        said = content["rope_scaling"]
        said["mscale_all_dim"] = _weight(rope.factor, growth)
        if rope.attention_factor:
            said["mscale"] = _weight(rope.factor, said.pop("attention_factor") * growth)
    return content | {
        "kv_lora_rank": attention.latent.kv_dim,
        "q_lora_rank": attention.latent.query_dim or None,
        "qk_nope_head_dim": attention.head_dim - attention.latent.rope_dim,
        "qk_rope_head_dim": attention.latent.rope_dim,
        "v_head_dim": attention.latent.value_dim,
        "head_dim": attention.latent.rope_dim,
        "attention_bias": False,
    }


def _growth(factor: float, weight: float) -> float:
    """Peng et al. 2023, equation 22, with a weight."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _weight(factor: float, growth: float) -> float:
    """The inverse of `_growth`, as a number that people would write; where nothing is stretched, any weight is."""
    return round((growth - 1.0) / (0.1 * math.log(factor)), 6) if factor > 1 else 1.0


def latent_rows(model: ModelConfig) -> list[Row]:
    """Latent attention as DeepSeek names it."""
    place, ours = LAYER + "self_attn.", "layers/attention/"
    down = {ours + "latent": "D c -> c D", ours + "shared_key": "D r -> r D"}
    up = {ours + "key": "c H u -> H u c", ours + "value": "c H w -> H w c"}
    rows = [
        joined(place + "kv_a_proj_with_mqa.weight", down, axis=0),
        row(place + "kv_a_layernorm.weight", ours + "latent_norm/scale"),
        joined(place + "kv_b_proj.weight", up, axis=1, form="H n c -> (H n) c"),
        *output_rows(model),
    ]
    if not model.attention.latent.query_dim:
        return [*rows, row(place + "q_proj.weight", ours + "query", "D H h -> (H h) D")]
    return [
        *rows,
        row(place + "q_a_proj.weight", ours + "query_down", "D q -> q D"),
        row(place + "q_a_layernorm.weight", ours + "query_latent_norm/scale"),
        row(place + "q_b_proj.weight", ours + "query", "q H h -> (H h) q"),
    ]


def whole_table(model: ModelConfig, layers: Sequence[Row]) -> Table:
    """The rows of the layers, with the embedding, the last norm and the head around them."""
    rows = [row(EMBEDDING, "embedding/table"), *layers, row("model.norm.weight", "final_norm/scale")]
    if model.tie_embeddings:
        return Table(tuple(rows), copies={HEAD: EMBEDDING}, ignored=(ROTARY,))
    return Table((*rows, row(HEAD, "head/kernel", "D V -> V D")), ignored=(ROTARY,))
