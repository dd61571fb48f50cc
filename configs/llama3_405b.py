"""Llama 3.1 405B (Dubey et al. 2024) from scratch, 8 trillion tokens: 20 a parameter.

maxlm train --config=configs/llama3_405b.py:v5p-1024 --workdir=runs/llama3_405b

The word after the colon is the hardware, one of `PLACES`; without it, v5p-1024. Text and tokenizer are yours to name:
--config.data.stores.web.source=jsonl:/data/*.jsonl.gz (or text:, parquet:, tfds:; C4, which stands here, has to be
prepared first: docs/data.md), and --config.data.tokenizer.path=DIR for a folder that holds the tokenizer.json of
meta-llama/Llama-3.1-405B, on Hugging Face.

Planned (`maxlm plan --memory_only`, libtpu 0.0.42; no run stands behind it): 50.2 of 95.7 GiB a chip, 53.4 s a step, 77
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

TOKENS, LENGTH = 8e12, 8192
PLACES = {
    "v5p-1024": Place(256, ParallelConfig(data=2, fsdp=64, tensor=4)),
}


def get_config(topology="v5p-1024"):
    place = at(PLACES, topology)
    return as_config_dict(
        Config(
            name="llama3_405b",
            model=preset("llama-3.1-405b"),
            data=DataConfig(
                stores={"web": StoreConfig(source="tfds:c4/en/train", heldout_permille=1)},
                tokenizer=TokenizerConfig(kind="huggingface", path="tokenizers/Llama-3.1-405B"),
                sequence_length=LENGTH,
                batch_size=place.rows,
            ),
            optim=OptimConfig(peak_lr=8e-5, warmup_steps=2000),
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
