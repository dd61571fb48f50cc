"""DeepSeek-V3 (DeepSeek-AI 2024b) from scratch, 740 billion tokens: 20 an active parameter.

maxlm train --config=configs/deepseek_v3.py:v5p-1024 --workdir=runs/deepseek_v3

The word after the colon is the hardware, one of `PLACES`; without it, v5p-1024. Text and tokenizer are yours to name:
--config.data.stores.web.source=jsonl:/data/*.jsonl.gz (or text:, parquet:, tfds:; C4, which stands here, has to be
prepared first: docs/data.md), and --config.data.tokenizer.path=DIR for a folder that holds the tokenizer.json of
deepseek-ai/DeepSeek-V3-Base, on Hugging Face.

An expert takes at most twice its even share of a row (capacity_factor): the buffers of 32 devices that may each send
all their tokens to one would take 15 GB apiece. Balance is the selection bias's work, and hardly that of the loss.

Planned (`maxlm plan --memory_only`, libtpu 0.0.42; no run stands behind it): 57.8 of 95.7 GiB a chip; at even
load 16.8 s a step, 489 tokens/s a chip, a fifth of it waiting for rows that travel to experts.
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

TOKENS, LENGTH = 740e9, 4096
MODEL = preset("deepseek-v3")
PLACES = {
    "v5p-1024": Place(1024, ParallelConfig(data=1, fsdp=16, expert=32)),
}


def get_config(topology="v5p-1024"):
    place = at(PLACES, topology)
    return as_config_dict(
        Config(
            name="deepseek_v3",
            model=dataclasses.replace(
                MODEL, moe=dataclasses.replace(MODEL.moe, capacity_factor=2.0, balance_loss=1e-4)
            ),
            data=DataConfig(
                stores={"web": StoreConfig(source="tfds:c4/en/train", heldout_permille=1)},
                tokenizer=TokenizerConfig(kind="huggingface", path="tokenizers/DeepSeek-V3-Base"),
                sequence_length=LENGTH,
                batch_size=place.rows,
            ),
            optim=OptimConfig(peak_lr=2.2e-4, warmup_steps=2000),
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
