"""Gemma 3 27B (Gemma Team 2025), text, from scratch, 540 billion tokens: 20 a parameter.

maxlm train --config=configs/gemma3_27b.py:v5p-128 --workdir=runs/gemma3_27b

The word after the colon is the hardware, one of `PLACES`; without it, v5p-128. Text and tokenizer are yours to name:
--config.data.stores.web.source=jsonl:/data/*.jsonl.gz (or text:, parquet:, tfds:; C4, which stands here, has to be
prepared first: docs/data.md), and --config.data.tokenizer.path=DIR for a folder that holds the tokenizer.json of
google/gemma-3-27b-pt, on Hugging Face.

Planned (`maxlm plan --memory_only`, libtpu 0.0.42; no run stands behind it): 69.8 of 95.7 GiB a chip,
attention_qkv, attention_out and mlp_up kept for the backward pass, 5.8 s a step, 1,420 tokens/s a chip.
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

TOKENS, LENGTH = 540e9, 8192
PLACES = {
    "v5p-128": Place(64, ParallelConfig(data=4, fsdp=16), ("attention_qkv", "attention_out", "mlp_up")),
}


def get_config(topology="v5p-128"):
    place = at(PLACES, topology)
    return as_config_dict(
        Config(
            name="gemma3_27b",
            model=preset("gemma-3-27b"),
            data=DataConfig(
                stores={"web": StoreConfig(source="tfds:c4/en/train", heldout_permille=1)},
                tokenizer=TokenizerConfig(kind="huggingface", path="tokenizers/gemma-3-27b-pt"),
                sequence_length=LENGTH,
                batch_size=place.rows,
            ),
            optim=OptimConfig(peak_lr=2e-4, warmup_steps=2000),
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
