"""Isoflop slices of small byte models on the Python standard library's sources.

maxlm study run configs/scaling/stdlib_ladder.py && maxlm study fit configs/scaling/stdlib_ladder.py

Five budgets that span a factor of 8, at each four sizes around the one expected to be best: 20 models of 0.05M to 0.6M
parameters besides embeddings. What came of it is in docs/scaling.md: 72 minutes on two cores that were busy besides.

At budgets so small a run has few steps, and what makes more of them wins: at 1.6e12 FLOPs and width 96 the held-out
loss is 2.21 nats a byte with AdamW and batches of 3,072 tokens, 1.88 with 1,024, 1.56 with Muon, and 1.52 with 512 (in
rows of 256, one seed each).
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
    StoreConfig,
    TokenizerConfig,
    TrainConfig,
)
from maxlm.study.ladder import Rules
from maxlm.study.spec import Isoflops, Machine, Study

SMALLEST = 1.4e12  # FLOPs
BUDGETS = tuple(SMALLEST * 8 ** (step / 4) for step in range(5))


def get_study():
    return Study(
        name="stdlib_ladder",
        base=Config(
            model=ModelConfig(
                vocab_size=264,
                attention=AttentionConfig(qk_norm="head"),
                mlp=MlpConfig(kind="relu2"),
                init="zero_output",
            ),
            data=DataConfig(
                stores={"stdlib": StoreConfig(source="stdlib", heldout_permille=10)},
                tokenizer=TokenizerConfig(kind="bytes"),
                sequence_length=128,
            ),
            optim=OptimConfig(
                optimizer="muon",
                muon_lr_ratio=3.0,
                schedule="linear",
                final_lr_ratio=0.0,
                weight_decay=0.05,
            ),
            train=TrainConfig(precision="float32", norms_every=0),
            checkpoint=CheckpointConfig(every_steps=1000),
            eval=EvalConfig(batch_size=16),
        ),
        rules=Rules(aspect=128, head_dim=16, tokens_per_param=32, base_rate=6e-3, batch_tokens=512),
        design=Isoflops(budgets=BUDGETS, sizes=(0.6, 1.0, 1.7, 2.8)),
        machine=Machine(name="2 CPU cores", flops_per_second=34e9, overhead_seconds=25.0, jobs=2),
    )
