"""One row a family (or variant): a tiny model of Hugging Face's with all that the family can do.

Sizes keep every dim different from the others, so that a transposition that is forgotten shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

VOCAB = 83


class Case(NamedTuple):
    """A config class of `transformers` by name, and its settings besides `SHARED`.

    foreign: of a family that `transformers` does not have, its config.json and its tensors, made from those of the peer
      (name -> torch tensor), which computes the same.
    """

    config: str
    settings: dict[str, Any]
    foreign: tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]] | None = None


SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [1.5, 4.0, 9.0],
    "original_max_position_embeddings": 40,  # between the lengths of the prompts
    "partial_rotary_factor": 0.75,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 100,
}
WEIGHED_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "head_dim": 4,
    "moe_intermediate_size": 14,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "rope_parameters": WEIGHED_YARN,
}
ERNIE_MOE = {
    "moe_num_experts": 6,
    "moe_k": 3,
    "moe_intermediate_size": 10,
    "moe_layer_start_index": 0,
    "tie_word_embeddings": False,
}


def internlm2(tensors):
    """Of each kv head two queries, a key and a value, and other names."""
    import torch

    out = _renamed(
        tensors,
        {
            "embed_tokens": "tok_embeddings",
            "lm_head": "output",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        },
    )
    for layer in range(3):
        place = f"model.layers.{layer}."
        q, k, v = (out.pop(f"{place}self_attn.{n}_proj.weight") for n in "qkv")
        groups = [torch.cat([q[16 * i : 16 * i + 16], k[8 * i : 8 * i + 8], v[8 * i : 8 * i + 8]]) for i in range(2)]
        out[place + "attention.wqkv.weight"] = torch.cat(groups)
    return out


def chatglm(tensors):
    """GLM's, with queries, keys and values in one tensor, under other names."""
    import torch

    out = _renamed(
        tensors,
        {
            "model.embed_tokens": "transformer.embedding.word_embeddings",
            "model.layers": "transformer.encoder.layers",
            "model.norm": "transformer.encoder.final_layernorm",
            "lm_head": "transformer.output_layer",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.gate_up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
    )
    for layer in range(3):
        place = f"transformer.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [out.pop(f"{place}self_attn.{n}_proj.{kind}") for n in "qkv"]
            out[f"{place}self_attention.query_key_value.{kind}"] = torch.cat(parts)
    return out


def baichuan(tensors):
    """Queries, keys and values in one tensor; rows of the head of any length, which do not count."""
    import torch

    out = dict(tensors)
    for layer in range(3):
        place = f"model.layers.{layer}.self_attn."
        out[place + "W_pack.weight"] = torch.cat([out.pop(f"{place}{n}_proj.weight") for n in "qkv"])
    out["lm_head.weight"] = out["lm_head.weight"] * (0.5 + torch.rand(VOCAB, 1))
    return out


def alibi(module, query, key, value, attention_mask, scaling, **_):
    """Attention that the peer can be told to use: Press et al. 2022, slopes of six heads written out."""
    import torch

    slopes = torch.tensor([2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0, 2**-1.0, 2**-3.0])
    places = torch.arange(key.shape[2])
    back = places[None, :] - places[-query.shape[2] :, None]
    scores = query @ key.transpose(2, 3) * scaling + slopes[:, None, None] * back + attention_mask
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), None


def _renamed(tensors, names):
    out = {}
    for name, value in tensors.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name] = value
    return out


SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48}
CASES = {
    "gpt2": Case("GPT2Config", {"n_inner": 40}),
    "llama": Case("LlamaConfig", {"rms_norm_eps": 1e-5, "rope_parameters": WEIGHED_YARN}),
    "llama-tied": Case("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": Case("MistralConfig", {"sliding_window": 7}),
    "qwen2": Case("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-tied": Case("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": Case("Qwen3Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "gemma": Case("GemmaConfig", {}),
    "gemma2": Case("Gemma2Config", {"sliding_window": 7, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 4.0}),
    "gemma3": Case(
        "Gemma3TextConfig",
        {"sliding_window": 7, "query_pre_attn_scalar": 6, "sliding_window_pattern": 2, "rope_parameters": GEMMA3},
    ),
    "glm": Case("GlmConfig", {}),
    "glm4": Case("Glm4Config", {"attention_bias": False}),
    "olmo2": Case("Olmo2Config", {}),
    "phi3": Case("Phi3Config", {"sliding_window": 7}),
    "phi3-long": Case(
        "Phi3Config",
        {
            "hidden_size": 32,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 40,
            "rope_parameters": LONGROPE,
        },
    ),
    "ernie4_5": Case("Ernie4_5Config", {"use_bias": True, "tie_word_embeddings": False}),
    "ernie4_5-tied": Case("Ernie4_5Config", {}),
    "mixtral": Case("MixtralConfig", {"sliding_window": 7, "num_local_experts": 5}),
    "qwen2_moe": Case(
        "Qwen2MoeConfig",
        {
            "moe_intermediate_size": 10,
            "shared_expert_intermediate_size": 14,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {
            "moe_intermediate_size": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,  # of no effect there
        },
    ),
    "deepseek_v2": Case(
        "DeepseekV2Config",
        LATENT
        | {
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek_v2-lite": Case("DeepseekV2Config", LATENT | {"n_routed_experts": 6, "q_lora_rank": None}),
    "deepseek_v3": Case(
        "DeepseekV3Config", LATENT | {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "num_mtp_layers": 0}
    ),
    "gpt_oss": Case(
        "GptOssConfig",
        {
            "sliding_window": 7,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "ernie4_5_moe": Case("Ernie4_5_MoeConfig", ERNIE_MOE | {"moe_layer_start_index": 1, "moe_num_shared_experts": 2}),
    "ernie4_5_moe-large": Case("Ernie4_5_MoeConfig", ERNIE_MOE | {"moe_num_shared_experts": 0}),
    "internlm2": Case(
        "LlamaConfig",
        {
            "hidden_size": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 40,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
        (
            {
                "architectures": ["InternLM2ForCausalLM"],
                **{key: value for key, value in SHARED.items() if key != "head_dim"},
                "hidden_size": 32,
                "max_position_embeddings": 40,
                "bias": False,
                "rope_theta": 1e4,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
            },
            internlm2,
        ),
    ),
    "chatglm3": Case(
        "GlmConfig",
        {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        (
            {
                "architectures": ["ChatGLMModel"],
                "add_bias_linear": False,
                "add_qkv_bias": True,
                "ffn_hidden_size": 40,
                "hidden_size": 24,
                "kv_channels": 8,
                "layernorm_epsilon": 1e-5,
                "multi_query_attention": True,
                "multi_query_group_num": 2,
                "num_attention_heads": 4,
                "num_layers": 3,
                "padded_vocab_size": VOCAB,
                "post_layer_norm": True,
                "rmsnorm": True,
                "rope_ratio": 50,
            },
            chatglm,
        ),
    ),
    "baichuan2": Case(
        "LlamaConfig",
        {"num_key_value_heads": 4, "hidden_size": 32},
        (
            SHARED | {"architectures": ["BaichuanForCausalLM"], "hidden_size": 32, "num_key_value_heads": 4},
            baichuan,
        ),
    ),
    "baichuan2-alibi": Case(
        "LlamaConfig",
        SIX_HEADS,
        (
            {name: value for name, value in SHARED.items() if name != "max_position_embeddings"}
            | SIX_HEADS
            | {"architectures": ["BaichuanForCausalLM"]},
            baichuan,
        ),
    ),
}


def peer(name: str) -> Any:
    """The case's model with weights of a size that makes logits of order one; the same every time."""
    import torch
    import transformers

    case = CASES[name]
    config = getattr(transformers, case.config)(**SHARED | case.settings)
    config._attn_implementation = config._experts_implementation = "eager"
    if name == "baichuan2-alibi":
        config._attn_implementation = "alibi"
        transformers.AttentionInterface.register("alibi", alibi)
        transformers.AttentionMaskInterface.register("alibi", transformers.masking_utils.eager_mask)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    if name == "baichuan2-alibi":  # nothing is turned
        model.model.rotary_emb.forward = lambda x, position_ids: (
            torch.ones(*position_ids.shape, 8),
            torch.zeros(*position_ids.shape, 8),
        )
    with torch.no_grad():
        biases = [value for key, value in model.named_buffers() if key.endswith("e_score_correction_bias")]
        for weight in [*model.parameters(), *biases]:
            if weight.ndim > 1:
                weight.normal_(0, 1 / math.sqrt(weight.shape[-1]))
            else:  # norms and biases, moved away from where they all are alike
                weight.add_(0.1 * torch.randn_like(weight))
        if name.startswith("baichuan2"):  # its columns count as of length one, which makes for small logits
            model.lm_head.weight /= model.lm_head.weight.norm(dim=1, keepdim=True)
            model.model.norm.weight *= 4
    return model
