"""Does the best learning rate stay where it is when the width grows? Widths 32 to 256 under both rules.

maxlm study run configs/scaling/transfer_sweep.py && maxlm study report configs/scaling/transfer_sweep.py

Nine learning rates in steps of the root of two, two seeds: 144 short runs of byte models on the Python standard
library's sources. Planned for two CPU cores, one run on each at a time, in less than an hour and a half.
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
from maxlm.study.ladder import Rules, Shape
from maxlm.study.spec import Machine, Study, Sweep

RATES = tuple(2 ** (exponent / 2) for exponent in range(-17, -8))  # 0.0028 to 0.044


def get_study():
    return Study(
        name="transfer_sweep",
        base=Config(
            model=ModelConfig(vocab_size=264, mlp=MlpConfig(kind="relu2")),
            data=DataConfig(
                stores={"stdlib": StoreConfig(source="stdlib", heldout_permille=5)},
                tokenizer=TokenizerConfig(kind="bytes"),
                sequence_length=128,
            ),
            optim=OptimConfig(schedule="linear", final_lr_ratio=0.0),
            train=TrainConfig(precision="float32", norms_every=0),
            checkpoint=CheckpointConfig(every_steps=1000),
            eval=EvalConfig(batch_size=16),
        ),
        rules=Rules(head_dim=16, base_head_dim=16, base_width=64),
        design=Sweep(
            shapes=tuple(Shape(layers=2, width=width) for width in (32, 64, 128, 256)),
            tokens=200_000,
            settings={"data.batch_size": (4,), "optim.peak_lr": RATES, "seed": (0, 1)},
            rules=("standard", "transfer"),
        ),
        machine=Machine(name="2 CPU cores", flops_per_second=36e9, overhead_seconds=12.0, jobs=2),
        coordinate_widths=(32, 64, 128, 256),
    )
