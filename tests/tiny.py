"""A tiny run for tests: a few kilobytes of made-up text, the byte tokenizer, a decoder of two layers."""

import dataclasses
import random
from pathlib import Path
from typing import Any

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
from maxlm.data.batch import Batch
from maxlm.train.compare import example_batch

MODEL = ModelConfig(
    vocab_size=264,
    embed_dim=32,
    num_layers=2,
    attention=AttentionConfig(q_heads=4, kv_heads=2, head_dim=16, qk_norm="head"),
    mlp=MlpConfig(dim=64),
)


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """Made-up sentences, one file a document, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "tree",
        "house",
        "sees",
        "takes",
        "finds",
        "leaves",
        "quickly",
        "slowly",
        "red",
        "blue",
        "and",
        "or",
        "but",
        "then",
    ]
    for number in range(documents):
        text = f"document {number}\n" + " ".join(rng.choice(words) for _ in range(rng.randint(20, 200))) + "\n"
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def tiny_config(corpus: Path, **leaves: Any) -> Config:
    """A run on `corpus`; `leaves` are settings by dotted path, with __ for the dots."""
    config = Config(
        name="tiny",
        model=MODEL,
        data=DataConfig(
            stores={"tiny": StoreConfig(source=f"text:{corpus}/*.txt", heldout_permille=100)},
            tokenizer=TokenizerConfig(kind="bytes"),
            sequence_length=64,
            batch_size=8,
            workers=1,
        ),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=2),
        train=TrainConfig(steps=20, precision="float32", norms_every=10, loss_chunk=256, compilation_cache=""),
        checkpoint=CheckpointConfig(every_steps=5),
        eval=EvalConfig(batch_size=8, prompts=()),  # generating takes a compilation, and two tests look at it
    )
    for path, value in leaves.items():
        config = replace(config, path.split("__"), value)
    return config


def replace(section: Any, path: list[str], value: Any) -> Any:
    """The section with one leaf, or subsection, replaced."""
    name, *rest = path
    return dataclasses.replace(section, **{name: replace(getattr(section, name), rest, value) if rest else value})


def random_batch(seed: int, rows: int = 8, length: int = 64) -> Batch:
    """A batch for the tiny model."""
    return example_batch(seed, rows=rows, length=length, vocab=MODEL.vocab_size)
