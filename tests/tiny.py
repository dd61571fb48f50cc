"""A tiny run for tests: a few kilobytes of made-up text, the byte tokenizer, a decoder of two layers."""

import dataclasses
import math
import random
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from maxlm import tree
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
from maxlm.optim.optimizers import Updated
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.setup import make_setup, place_batch
from maxlm.train.state import initial_state, make_state

MODEL = ModelConfig(
    vocab_size=264,
    embed_dim=32,
    num_layers=2,
    attention=AttentionConfig(q_heads=4, kv_heads=2, head_dim=16, qk_norm=True),
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
        eval=EvalConfig(batch_size=8, prompts=("document 1\n",), sample_tokens=8),
    )
    for path, value in leaves.items():
        config = replace(config, path.split("__"), value)
    return config


def replace(section: Any, path: list[str], value: Any) -> Any:
    """The section with one leaf, or subsection, replaced."""
    name, *rest = path
    return dataclasses.replace(section, **{name: replace(getattr(section, name), rest, value) if rest else value})


def random_batch(seed: int, rows: int = 8, length: int = 64) -> Batch:
    """Rows of two documents each, the last row half padding, so that rows differ in how many positions bear loss."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 264, (rows, length + 1), dtype=np.int32)
    cut = rng.integers(5, length - 5, rows)
    places = np.arange(length)
    segments = 1 + (places >= cut[:, None]).astype(np.int32)
    positions = np.where(places >= cut[:, None], places - cut[:, None], places).astype(np.int32)
    weights = (places != cut[:, None] - 1).astype(np.float32)
    segments[-1, length // 2 :] = 0
    weights[-1, length // 2 - 1 :] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, weights)


# --- what a step computes, held against another's --------------------------------------------------------------------


class _Recorder:
    """Stands in for the optimizer: parameters stay, and the state it leaves behind is the step's gradients."""

    def __init__(self, specs: dict[str, Any]):
        self.specs = specs

    def init(self, params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, grads: Any, opt_state: Any, params: Any, *, lr: Any) -> Updated:
        return Updated(jax.tree.map(jnp.zeros_like, params), grads)

    def shardings(self, opt_state: Any, place: Any) -> Any:
        return tree.map_paths(lambda _, spec: place(spec.logical), self.specs)


class Computed(NamedTuple):
    """What a step on a batch computes: scalars, gradients by path, the parameters after it, and the program's text."""

    metrics: dict[str, Any]
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    program: str


def loss_and_gradients(config: Config, batch: Batch, *, params: Any = None, devices: Any = None) -> Computed:
    """One step of the config's program on its mesh, without clipping and with an optimizer that records gradients.

    Args:
      config: unresolved.
      batch: global, as NumPy arrays.
      params: to start from; None: those of the config's seed.
      devices: of the mesh; None: as many of the first as its sizes ask for.
    """
    devices = devices or jax.devices()[: math.prod(config.parallel.sizes.values())]
    config = replace(resolve(config, devices=len(devices)), ["optim", "clip_norm"], 0.0)
    with mock.patch("maxlm.train.setup.make_optimizer", lambda _, specs: _Recorder(specs)):
        setup = make_setup(config, make_mesh(config.parallel, devices))
    if params is None:
        state = make_state(config, setup.optimizer, setup.shardings)
    else:  # spares the compilation of the draw
        with mock.patch("maxlm.train.state.init_params", lambda *_: params):
            state = jax.device_put(initial_state(config, setup.optimizer), setup.shardings)
    placed = place_batch(setup.mesh, batch.tokens.shape, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    program = setup.compile(*batch.tokens.shape)
    state, metrics = program(state, placed)
    gradients, params = (tree.paths(jax.device_get(x)) for x in (state.opt_state, state.params))
    return Computed(jax.device_get(metrics), gradients, params, program.as_text())


def differences(got: Computed, expected: Computed) -> list[str]:
    """Where loss or gradients are further apart than float32 sums in another order are; empty if nowhere.

    Loss within 1e-5, and of each gradient leaf |difference| <= 1e-4 |leaf| + 1e-7 |all|, as some are zero.
    """
    found = []
    for name in ("loss", "z_loss", "balance_loss", "router_z_loss"):
        if name in expected.metrics and not np.isclose(got.metrics[name], expected.metrics[name], rtol=1e-5, atol=1e-7):
            found.append(f"{name} is {got.metrics[name]}, not {expected.metrics[name]}")
    everything = math.sqrt(sum(float(np.sum(np.square(g))) for g in expected.gradients.values()))
    for path, g in expected.gradients.items():
        apart, allowed = np.linalg.norm(got.gradients[path] - g), 1e-4 * np.linalg.norm(g) + 1e-7 * everything
        if not apart <= allowed:
            found.append(f"the gradient of {path} is {apart:.3g} away, which is more than {allowed:.3g}")
    return found
