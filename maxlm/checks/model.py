"""Relations between the settings of `model`. Each problem is one sentence."""

from __future__ import annotations

from collections.abc import Iterator

from maxlm.checks.words import divisors
from maxlm.config import Config, ModelConfig


def check_model(config: Config) -> Iterator[str]:
    """The problems of a filled model config."""
    model, attention = config.model, config.model.attention
    if attention.q_heads % attention.kv_heads:
        yield (
            f"model.attention.kv_heads is {attention.kv_heads}, which does not divide model.attention.q_heads "
            f"{attention.q_heads}; use one of {divisors(attention.q_heads)}"
        )
    if attention.head_dim == 0:
        yield (
            "model.attention.head_dim is 0, as model.embed_dim is less than model.attention.q_heads; set it, or change "
            "one of these"
        )
    if len(attention.windows) > model.num_layers or not attention.windows:
        yield (
            f"model.attention.windows has {len(attention.windows)} entries for {model.num_layers} layers; "
            "give between one and as many as there are layers"
        )
    if model.normed_head and model.tie_embeddings:
        yield (
            "model.normed_head is for an output head of its own, but model.tie_embeddings is on; type "
            "model.normed_head=False or model.tie_embeddings=False"
        )
    if model.head_init != 1 and model.tie_embeddings:
        yield (
            f"model.head_init is {model.head_init:g}, but with model.tie_embeddings there is no head of its own; type "
            "model.head_init=1 or model.tie_embeddings=False"
        )
    trained = {
        "data.sequence_length": config.data.sequence_length,
        **{f"data.phases.{name}.sequence_length": phase.sequence_length for name, phase in config.data.phases.items()},
    }
    for path, length in trained.items():
        if 0 < length <= model.mtp_layers:
            yield (
                f"model.mtp_layers is {model.mtp_layers}, but no token of a row of {path} {length} is that far from "
                "the next; use less"
            )
    lengths = {**trained, "eval.sequence_length": config.eval.sequence_length}
    longest = max(lengths, key=lengths.__getitem__)
    if 0 < model.learned_positions < lengths[longest]:
        yield (
            f"model.learned_positions is {model.learned_positions}, but rows have up to {lengths[longest]} positions "
            f"({longest}); use that or more, or shorter rows"
        )
    yield from _check_rope(model)
    yield from _check_latent(model)


def _check_rope(model: ModelConfig) -> Iterator[str]:
    rope, latent = model.rope, model.attention.latent
    path, head_dim = "head_dim", model.attention.head_dim
    if latent.kv_dim:
        path, head_dim = "latent.rope_dim", latent.rope_dim
    dims = int(rope.fraction * head_dim)
    if rope.fraction > 1 or dims % 2:
        yield (
            f"model.attention.{path} is {head_dim} with model.rope.fraction {rope.fraction:g}, but rotary positions "
            "turn pairs: their product has to be even and fraction at most 1; set them, or change embed_dim or q_heads"
        )
    if rope.scaling not in ("none", "linear") and not rope.original_length:
        yield (
            f"model.rope.scaling is {rope.scaling!r}, which goes by the positions of pretraining; set "
            "model.rope.original_length"
        )
    if len(rope.turns) != 2 or rope.turns[0] >= rope.turns[1]:
        yield f"model.rope.turns is {rope.turns}, but has to be two, rising; llama3 uses (1.0, 4.0), yarn (1.0, 32.0)"
    elif rope.scaling == "yarn" and (rope.turns[0] <= 0 or rope.theta <= 1):
        yield (
            f"model.rope.scaling 'yarn' takes logarithms of model.rope.turns {rope.turns} and model.rope.theta "
            f"{rope.theta:g}: use turns above 0, such as (1.0, 32.0), and theta above 1"
        )
    if rope.scaling == "dynamic" and dims <= 2:
        yield (
            f"model.rope.scaling 'dynamic' makes the base larger by the pairs that turn, but {dims} dims of a head do "
            f"(model.attention.{path} {head_dim} with model.rope.fraction {rope.fraction:g}); use 4 or more"
        )
    for name, factors in (("short_factors", rope.short_factors), ("long_factors", rope.long_factors)):
        if min(factors, default=1.0) <= 0:
            yield f"model.rope.{name} has {min(factors):g}, but positions are divided by them; use numbers above 0"
        wanted = dims // 2 if rope.scaling == "longrope" else 0
        if len(factors) != wanted:
            yield (
                f"model.rope.{name} has {len(factors)} entries, but with model.rope.scaling {rope.scaling!r} there "
                f"have to be {wanted}, one for each pair of turned dims"
            )


def _check_latent(model: ModelConfig) -> Iterator[str]:
    attention, latent = model.attention, model.attention.latent
    if not latent.kv_dim:
        if latent.query_dim or latent.rope_dim or latent.value_dim:
            yield (
                "model.attention.latent has dims, but its kv_dim is 0, which means no latent attention; set kv_dim, or "
                "leave them all at 0"
            )
        return
    if not 0 < latent.rope_dim < attention.head_dim:
        yield (
            f"model.attention.latent.rope_dim is {latent.rope_dim}, but it is a part of model.attention.head_dim "
            f"{attention.head_dim}; use an even number between 2 and {attention.head_dim - 1}"
        )
    if not latent.value_dim:
        yield "model.attention.latent.value_dim is 0; set it to the dim of a head's value"
    if attention.kv_heads != attention.q_heads:
        yield (
            f"model.attention.kv_heads is {attention.kv_heads}, but latent attention makes a key and a value for each "
            f"of the {attention.q_heads} query heads; type model.attention.kv_heads=0"
        )
    unused = {"qk_norm": "none", "bias": False, "output_bias": False, "sinks": False, "alibi": False}
    for name, value in unused.items():
        if (given := getattr(attention, name)) != value:
            yield (
                f"model.attention.{name} is {given!r}, but latent attention has none; type "
                f"model.attention.{name}={value}"
            )
