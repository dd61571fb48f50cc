"""Llama 3 8B (Dubey et al. 2024) from scratch, 160 billion tokens: 20 a parameter.

maxlm train --config=configs/llama3_8b.py:v5p-128 --workdir=runs/llama3_8b

The word after the colon is the hardware, one of `PLACES`; without it, v5p-128. Text and tokenizer are yours to name:
--config.data.stores.web.source=jsonl:/data/*.jsonl.gz (or text:, parquet:, tfds:; C4, which stands here, has to be
prepared first: docs/data.md), and --config.data.tokenizer.path=DIR for a folder that holds the tokenizer.json of
meta-llama/Meta-Llama-3-8B, on Hugging Face.

Planned (`maxlm plan --memory_only`, libtpu 0.0.42; no run stands behind it): on v5p-128 52.9 of 95.7 GiB a chip,
attention_qkv, attention_out, mlp_gate and mlp_up kept for the backward pass, 3.1 s a step, 5,300 tokens/s a chip; on
v6e-256 26.0 of 31.2 GiB, attention_out kept, 3.7 s, 8,920 tokens/s a chip. By the analytical model alone
(docs/plan.md), on h100x8 24.3 of 75.7 GiB a GPU, 1.95 s, 8,420 tokens/s a GPU.
"""

from maxlm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    ParallelConfig,
    StoreConfig,
    TokenizerConfig,
    TrainConfig,
)
from maxlm.model.family import preset
from maxlm.recipe import Place, at
from maxlm.resolve import as_config_dict

TOKENS, LENGTH = 160e9, 8192
PLACES = {
    "v5p-128": Place(128, ParallelConfig(data=4, fsdp=16), ("attention_qkv", "attention_out", "mlp_gate", "mlp_up")),
    "v6e-256": Place(1024, ParallelConfig(data=8, fsdp=32), ("attention_out",)),
    "h100x8": Place(16, ParallelConfig(data=1, fsdp=8)),
}


def get_config(topology="v5p-128"):
    place = at(PLACES, topology)
    return as_config_dict(
        Config(
            name="llama3_8b",
            model=preset("llama-3-8b"),
            data=DataConfig(
                stores={"web": StoreConfig(source="tfds:c4/en/train", heldout_permille=1)},
                tokenizer=TokenizerConfig(kind="huggingface", path="tokenizers/Meta-Llama-3-8B"),
                sequence_length=LENGTH,
                batch_size=place.rows,
            ),
            optim=OptimConfig(peak_lr=3e-4, warmup_steps=2000),
            parallel=place.parallel,
            train=TrainConfig(
                steps=round(TOKENS / (place.rows * LENGTH)),
                accumulation=place.accumulation,
                remat=place.remat,
                loss_chunk=2048,
            ),
            checkpoint=CheckpointConfig(every_steps=1000, keep_every_steps=10_000),
            eval=EvalConfig(every_steps=2000, batch_size=place.rows, documents=4096),
        )
    )
