"""The offline default: a small decoder on the Python standard library's own sources.

maxlm train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from maxlm.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    StoreConfig,
    TrainConfig,
)
from maxlm.resolve import as_config_dict


def get_config():
    return as_config_dict(
        Config(
            name="quickstart",
            model=ModelConfig(
                vocab_size=4096,
                embed_dim=192,
                num_layers=4,
                attention=AttentionConfig(q_heads=3, head_dim=64, qk_norm=True),
            ),
            data=DataConfig(
                stores={"stdlib": StoreConfig(source="stdlib", heldout_permille=25)},
                sequence_length=512,
                batch_size=8,
            ),
            optim=OptimConfig(
                optimizer="muon", peak_lr=3e-3, schedule="wsd", warmup_steps=50, decay_steps=700, final_lr_ratio=0.0
            ),
            train=TrainConfig(steps=1400, precision="bfloat16"),
            checkpoint=CheckpointConfig(every_steps=500),
            eval=EvalConfig(
                overlap=256, prompts=("def read_lines(path):\n", "class Queue:\n", "import os\n"), sample_tokens=120
            ),
        )
    )
