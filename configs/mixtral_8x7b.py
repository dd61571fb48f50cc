"""Mixtral 8x7B (Jiang et al. 2024) from scratch, 260 billion tokens: 20 an active parameter.

maxlm train --config=configs/mixtral_8x7b.py:v5p-128 --workdir=runs/mixtral_8x7b

The word after the colon is the hardware, one of `PLACES`; without it, v5p-128. Text and tokenizer are yours to name:
--config.data.stores.web.source=jsonl:/data/*.jsonl.gz (or text:, parquet:, tfds:; C4, which stands here, has to be
prepared first: docs/data.md), and --config.data.tokenizer.path=DIR for a folder that holds the tokenizer.json of
mistralai/Mixtral-8x7B-v0.1, on Hugging Face.

Planned (`maxlm plan --memory_only`, libtpu 0.0.42; no run stands behind it): 46.9 of 95.7 GiB a chip, a third of it for
rows that experts might get and, where load is even, do not: no token is dropped; at even load 7.1 s a step, 2,310
tokens/s a chip.
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

TOKENS, LENGTH = 260e9, 4096
PLACES = {
    "v5p-128": Place(256, ParallelConfig(data=1, fsdp=8, expert=8), ("attention_qkv", "attention_out")),
}


def get_config(topology="v5p-128"):
    place = at(PLACES, topology)
    return as_config_dict(
        Config(
            name="mixtral_8x7b",
            model=preset("mixtral-8x7b"),
            data=DataConfig(
                stores={"web": StoreConfig(source="tfds:c4/en/train", heldout_permille=1)},
                tokenizer=TokenizerConfig(kind="huggingface", path="tokenizers/Mixtral-8x7B-v0.1"),
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
