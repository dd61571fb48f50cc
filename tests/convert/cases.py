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

CASES = {
    "llama": Case(
        "LlamaConfig", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    ),
    "llama-tied": Case(
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
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
