"""Sampling from the newest checkpoint of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxlm import tree
from maxlm.checkpoint.reader import CheckpointReader
from maxlm.compilation import use_compilation_cache
from maxlm.config import Config
from maxlm.data.prepare import prepare_data
from maxlm.errors import UserError
from maxlm.infer.generate import RunnableModel, generate_text
from maxlm.infer.sampling import Sampling
from maxlm.kernels.attention import plain
from maxlm.model.decoder import split_model
from maxlm.model.runtime import Runtime
from maxlm.parallel.mesh import single_device_mesh
from maxlm.parallel.sharding import named_sharding
from maxlm.resolve import resolve


def runnable(config: Config, params: Any) -> RunnableModel:
    """The model of a config with these parameters, brought to one device of this process."""
    device = jax.local_devices()[0]
    return RunnableModel(
        config=config.model,
        graphdef=split_model(config.model).graphdef,
        params=jax.device_put(params, device),
        runtime=Runtime(dtype=jnp.dtype(config.train.precision), attend=plain),
    )


def load_run(workdir: Path, *, log: Callable[[str], None]) -> tuple[Config, RunnableModel]:
    """The config and the model of a run's newest whole checkpoint; of the moving average where there is one.

    Raises:
      UserError: there is no run, or no whole checkpoint, in `workdir`.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run: {path.name} is missing; give the --workdir of `maxlm train`")
    reader = CheckpointReader(workdir / "checkpoints", log=log)
    described = reader.latest_metadata()
    if described is None:
        raise UserError(f"{workdir} has no checkpoint yet; train on, or lower checkpoint.every_steps")
    config = resolve(described.metadata["config"])
    use_compilation_cache(config.train.compilation_cache)
    sharding = named_sharding(single_device_mesh(), ())
    abstract = tree.map_paths(
        lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding),
        split_model(config.model).specs,
    )
    restored = reader.restore_params(abstract, part="average" if config.optim.ema_decay else "params")
    if restored is None:
        raise UserError(f"{workdir} has no checkpoint yet; train on, or lower checkpoint.every_steps")
    log(f"from the checkpoint of step {restored.step}")
    return config, runnable(config, restored.state)


def generate_from_run(
    workdir: Path,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    log: Callable[[str], None],
    write: Callable[[str], None],
) -> None:
    """Continues the prompts with the run's newest checkpoint; a single prompt is streamed as it comes."""
    config, model = load_run(workdir, log=log)
    tokenizer = prepare_data(config, workdir, build=False).tokenizer
    streamed = len(prompts) == 1
    if streamed:
        write(prompts[0])
    texts = generate_text(
        model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=max_tokens,
        sampling=sampling,
        key=jax.random.key(seed),
        on_text=(lambda _, piece: write(piece)) if streamed else None,
    )
    if streamed:
        write("\n")
        return
    for prompt, text in zip(prompts, texts, strict=True):
        write(f"--- {json.dumps(prompt)}\n{prompt}{text}\n")
