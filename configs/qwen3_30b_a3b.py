"""Qwen3 30B-A3B (Yang et al. 2025) from scratch, 66 billion tokens: 20 an active parameter.

maxlm train --config=configs/qwen3_30b_a3b.py:v5p-128 --workdir=runs/qwen3_30b_a3b

The word after the colon is the hardware, one of `PLACES`; without it, v5p-128. Text and tokenizer are yours to name:
--config.data.stores.web.source=jsonl:/data/*.jsonl.gz (or text:, parquet:, tfds:; C4, which stands here, has to be
prepared first: docs/data.md), and --config.data.tokenizer.path=DIR for a folder that holds the tokenizer.json of
Qwen/Qwen3-30B-A3B-Base, on Hugging Face.

An expert takes at most twice its even share of a row (capacity_factor): with 8 choices and 16 experts a device, buffers
for all that might come would be eight times what does come.

Planned (`maxlm plan --memory_only`, libtpu 0.0.42; no run stands behind it): 31.3 of 95.7 GiB a chip; at even load
3.7 s a step, 4,450 tokens/s a chip.
"""

import dataclasses

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

TOKENS, LENGTH = 66e9, 4096
MODEL = preset("qwen3-30b-a3b")
PLACES = {
    "v5p-128": Place(256, ParallelConfig(data=1, fsdp=8, expert=8), ("attention_qkv", "attention_out")),
}


def get_config(topology="v5p-128"):
    place = at(PLACES, topology)
    return as_config_dict(
        Config(
            name="qwen3_30b_a3b",
            model=dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, capacity_factor=2.0)),
            data=DataConfig(
                stores={"web": StoreConfig(source="tfds:c4/en/train", heldout_permille=1)},
                tokenizer=TokenizerConfig(kind="huggingface", path="tokenizers/Qwen3-30B-A3B-Base"),
                sequence_length=LENGTH,
                batch_size=place.rows,
            ),
            optim=OptimConfig(peak_lr=4e-4, warmup_steps=2000),
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
