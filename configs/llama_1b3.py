"""A Llama of 1.3 billion parameters from scratch, 26 billion tokens: 20 a parameter.

maxlm train --config=configs/llama_1b3.py:h100x8 --workdir=runs/llama_1b3

The word after the colon is the hardware, one of `PLACES`; without it, h100x8. Text and tokenizer are yours to name:
--config.data.stores.web.source=jsonl:/data/*.jsonl.gz (or text:, parquet:, tfds:; C4, which stands here, has to be
prepared first: docs/data.md), and --config.data.tokenizer.path=DIR for a folder that holds the tokenizer.json of
meta-llama/Llama-2-7b-hf, on Hugging Face.

By the analytical model alone (docs/plan.md; no run stands behind it), on h100x8: 35.3 of 75.7 GiB a GPU, 0.52 s a
step, 63,500 tokens/s a GPU.
"""

from maxlm.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MlpConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    StoreConfig,
    TokenizerConfig,
    TrainConfig,
)
from maxlm.recipe import Place, at
from maxlm.resolve import as_config_dict

TOKENS, LENGTH = 26e9, 2048
KEPT = ("attention_qkv", "attention_out", "mlp_gate", "mlp_up")
PLACES = {
    "h100x8": Place(128, ParallelConfig(data=1, fsdp=8), KEPT),
    "h200x1": Place(16, ParallelConfig(data=1), KEPT),
}


def get_config(topology="h100x8"):
    place = at(PLACES, topology)
    return as_config_dict(
        Config(
            name="llama_1b3",
            model=ModelConfig(
                vocab_size=32_000,
                embed_dim=2048,
                num_layers=24,
                attention=AttentionConfig(q_heads=16, head_dim=128),
                mlp=MlpConfig(dim=5504),
                norm_epsilon=1e-5,
            ),
            data=DataConfig(
                stores={"web": StoreConfig(source="tfds:c4/en/train", heldout_permille=1)},
                tokenizer=TokenizerConfig(kind="huggingface", path="tokenizers/Llama-2-7b-hf"),
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
