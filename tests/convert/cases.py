"""One row a family (or variant): a tiny model of Hugging Face's with all that the family can do.

Sizes keep every dim different from the others, so that a transposition that is forgotten shows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

VOCAB = 83


class Case(NamedTuple):
    """A config class of `transformers` by name, and its settings besides `SHARED`."""

    config: str
    settings: dict[str, Any]


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
    "original_max_position_embeddings": 32,
}
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

CASES = {
    "gpt2": Case("GPT2Config", {"n_inner": 40}),
    "llama": Case("LlamaConfig", {"rms_norm_eps": 1e-5, "rope_parameters": YARN}),
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
}


def peer(name: str) -> Any:
    """The case's model with weights of a size that makes logits of order one; the same every time."""
    import torch
    import transformers

    case = CASES[name]
    config = getattr(transformers, case.config)(**SHARED | case.settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1 / math.sqrt(weight.shape[-1]))
            else:  # norms and biases, moved away from where they all are alike
                weight.add_(0.1 * torch.randn_like(weight))
    return model
