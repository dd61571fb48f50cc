"""GPT-2 124M (Radford et al. 2019) from scratch, 2.5 billion tokens: 20 a parameter.

maxlm train --config=configs/gpt2_124m.py:h100x8 --workdir=runs/gpt2_124m

The word after the colon is the hardware, one of `PLACES`; without it, h100x8. Text and tokenizer are yours to name:
--config.data.stores.web.source=jsonl:/data/*.jsonl.gz (or text:, parquet:, tfds:; C4, which stands here, has to be
prepared first: docs/data.md), and --config.data.tokenizer.path=DIR for a folder that holds the tokenizer.json of
openai-community/gpt2, on Hugging Face.

By the analytical model alone (docs/plan.md; no run stands behind it), on h100x8: 13.4 of 75.7 GiB a GPU, 0.12 s a
step, 535,000 tokens/s a GPU.
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

TOKENS, LENGTH = 2.5e9, 1024
KEPT = ("attention_qkv", "attention_out", "mlp_up")
PLACES = {
    "h100x8": Place(512, ParallelConfig(data=8), KEPT),
    "h200x1": Place(64, ParallelConfig(data=1), KEPT),
}


def get_config(topology="h100x8"):
    place = at(PLACES, topology)
    return as_config_dict(
        Config(
            name="gpt2_124m",
            model=preset("gpt2"),
            data=DataConfig(
                stores={"web": StoreConfig(source="tfds:c4/en/train", heldout_permille=1)},
                tokenizer=TokenizerConfig(kind="huggingface", path="tokenizers/gpt2"),
                sequence_length=LENGTH,
                batch_size=place.rows,
            ),
            optim=OptimConfig(peak_lr=6e-4, warmup_steps=700),
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
