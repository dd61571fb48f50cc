"""Hugging Face folders made up without any peer package, random weights in a Llama layout; and runs to export."""

import json

import ml_dtypes
import numpy as np

from maxlm import tree
from maxlm.checkpoint.blocks import BlockWriter
from maxlm.checkpoint.reader import ArrayInfo
from maxlm.config import AttentionConfig, Config, LatentConfig, MlpConfig, ModelConfig, MoeConfig, RopeConfig
from maxlm.convert.engine import family_model
from maxlm.convert.safetensors import ShardWriter, TensorInfo
from maxlm.model.decoder import split_model
from maxlm.model.family import families, family_of, hf_config
from maxlm.resolve import as_config_dict, resolve_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 83,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "custom_note": "kept",
}


EXPERTS = {"experts": 6, "active": 3, "dim": 10, "shared_dim": 20, "selection_bias": True, "dense_layers": 1}
MODELS = {
    "baichuan": {"attention": {"kv_heads": 4, "alibi": True}, "rope": RopeConfig(fraction=0.0), "normed_head": True},
    "gemma": {
        "norm": "rms_offset",
        "embed_scale": True,
        "tie_embeddings": True,
        "mlp": MlpConfig(dim=40, kind="geglu"),
    },
    "ernie4_5_moe": {"rope": RopeConfig(interleaved=True), "moe": MoeConfig(**EXPERTS)},
    "deepseek_v3": {
        "attention": {
            "kv_heads": 4,
            "head_dim": 10,
            "latent": LatentConfig(kv_dim=12, query_dim=10, rope_dim=4, value_dim=5),
        },
        "rope": RopeConfig(interleaved=True),
        "moe": MoeConfig(**EXPERTS, router="sigmoid", groups=3, top_groups=2),
        "mtp_layers": 1,
        "norm_epsilon": 1e-6,
    },
}
"""Of a family, what its tiny model has besides that of `hf_content`."""


def hf_content(name):
    """The config.json of a tiny model of a family with all that is rare about it."""
    settings = {"mlp": MlpConfig(dim=40)} | MODELS[name]
    attention = AttentionConfig(**{"q_heads": 4, "kv_heads": 2, "head_dim": 8} | settings.pop("attention", {}))
    return hf_config(
        families()[name], ModelConfig(vocab_size=83, embed_dim=24, num_layers=2, attention=attention, **settings)
    )


def tensor_infos(config=CONFIG, dtype=ml_dtypes.bfloat16):
    """Names, shapes and dtypes of a folder of this config."""
    family = family_of(config)
    rows = family_model(family, family.from_hf(config)).rows
    return {name: TensorInfo(row.shape, np.dtype(dtype)) for row in rows for name, _ in row.tensors()}


def write_folder(path, *, config=CONFIG, dtype=ml_dtypes.bfloat16, infos=None, shard_bytes=10**10, constant=False):
    """A folder with random values, drawn once a row where `constant`, to be quick; returns the tensors by name."""
    path.mkdir(parents=True)
    infos = infos or tensor_infos(config, dtype)
    rng = np.random.default_rng(0)
    tensors = {}
    with ShardWriter(path, infos, shard_bytes=shard_bytes) as writer:
        for name, info in infos.items():
            shape = (*info.shape[:1], *(1 for _ in info.shape[1:])) if constant else info.shape
            tensors[name] = np.broadcast_to(rng.normal(size=shape).astype(info.dtype), info.shape)
            writer.write(name, tensors[name])
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return tensors


def write_run(path, model, *, data=None, **metadata):
    """A checkpoint of step 5 as a run that began from nothing leaves it, with random weights; returns them by path."""
    config = as_config_dict(Config(model=model)).to_dict()
    config["data"] |= data or {}
    model = resolve_model(config["model"])
    rng, specs = np.random.default_rng(0), tree.paths(split_model(model).specs)
    values = {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}
    arrays = {f"params/{name}": ArrayInfo(value.shape, "float32") for name, value in values.items()}
    writer = BlockWriter(path / "checkpoints" / "5", arrays, {name: info.shape for name, info in arrays.items()})
    for name, value in values.items():
        writer.write(f"params/{name}", tuple(slice(0, size) for size in value.shape), value)
    writer.finish(5, {"config": config, **metadata})
    return values
