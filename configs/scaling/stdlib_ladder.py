"""Isoflop slices of small byte models on the Python standard library's sources.

maxlm study run configs/scaling/stdlib_ladder.py && maxlm study fit configs/scaling/stdlib_ladder.py

Five budgets that span a factor of 8, at each four sizes around the one expected to be best: 20 models of 0.05M to 2M
parameters besides embeddings. Planned for two CPU cores, one run on each at a time, in less than an hour.
"""

from maxlm.config import (
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

SMALLEST = 2.4e12  # FLOPs
BUDGETS = tuple(SMALLEST * 8 ** (step / 4) for step in range(5))


def get_study():
    return Study(
        name="stdlib_ladder",
        base=Config(
            model=ModelConfig(vocab_size=264, mlp=MlpConfig(kind="relu2")),
            data=DataConfig(
                stores={"stdlib": StoreConfig(source="stdlib", heldout_permille=10)},
                tokenizer=TokenizerConfig(kind="bytes"),
                sequence_length=256,
            ),
            optim=OptimConfig(schedule="linear", final_lr_ratio=0.0),
            train=TrainConfig(precision="float32", norms_every=0),
            checkpoint=CheckpointConfig(every_steps=200, keep_latest=1),
            eval=EvalConfig(batch_size=16),
        ),
        rules=Rules(rule="transfer", aspect=128, head_dim=16, base_head_dim=16, base_width=64, base_rate=8e-3),
        design=Isoflops(budgets=BUDGETS, sizes=(0.7, 1.2, 2.0, 3.4)),
        machine=Machine(name="2 CPU cores", flops_per_second=70e9, overhead_seconds=20.0, jobs=2),
        coordinate_widths=(32, 64, 128, 256),
    )
