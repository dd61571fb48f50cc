"""Models to sample from: a run's newest checkpoint, a converted model or a Hugging Face folder, on all devices here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxlm import tree
from maxlm.compilation import settle_cpu_devices, use_compilation_cache
from maxlm.config import Config, ModelConfig, ParallelConfig
from maxlm.configfile import known
from maxlm.convert.errors import ConversionError
from maxlm.convert.stored import carried_files, model_config, open_stored
from maxlm.convert.weights import open_weights
from maxlm.data.prepare import prepare_data
from maxlm.errors import UserError
from maxlm.infer.generate import RunnableModel, check_prompts, check_stops, encode_prompts, generate_text
from maxlm.infer.pretrained import PretrainedText
from maxlm.infer.sampling import Sampling
from maxlm.kernels import grouped
from maxlm.kernels.attention import dispatch
from maxlm.model.decoder import split_model
from maxlm.model.rotary import pays_by_products
from maxlm.model.runtime import Runtime
from maxlm.parallel.experts import sharded_experts
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import RULES, constrainer, named_sharding
from maxlm.resolve import resolve

Log = Callable[[str], None]
_RUN = "config.json"


class Asked(NamedTuple):
    """What to continue, and how.

    chat: each prompt is a message of a conversation of its own, and the model's chat template is applied.
    stop: texts that end a continuation.
    """

    prompts: Sequence[str]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: Sequence[str] = ()
    chat: bool = False


def generation_mesh(model: ModelConfig, devices: Sequence[jax.Device]) -> Mesh:
    """As many of the devices as divide the model's dims: `tensor` first, which cuts each product, then `fsdp`."""
    specs = tree.paths(split_model(model).specs).values()

    def largest(axis: str, limit: int) -> int:
        dims = {n for s in specs for n, logical in zip(s.shape, s.logical, strict=True) if axis in RULES[logical]}
        return max(n for n in range(1, limit + 1) if limit % n == 0 and all(dim % n == 0 for dim in dims))

    tensor = largest("tensor", len(devices))
    fsdp = largest("fsdp", len(devices) // tensor)
    return make_mesh(ParallelConfig(data=1, fsdp=fsdp, tensor=tensor), list(devices)[: fsdp * tensor])


def generation_runtime(mesh: Mesh, dtype: Any) -> Runtime:
    """Every device works on all rows, which are few, and on its part of the weights: those never travel, but for
    experts' from `fsdp`, and layers' over the stages of a run's pipeline, as in an evaluation."""
    place = constrainer(mesh)

    def constrain(x: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
        return place(x, tuple(None if name in ("batch", "seq", "residual") else name for name in logical))

    platform = mesh.devices.flat[0].platform
    experts = sharded_experts(grouped.choose(platform, dtype), mesh, rows=None)
    return Runtime(
        dtype=dtype,
        constrain=constrain,
        attend=dispatch(platform),
        experts=experts,
        turn_by_products=pays_by_products(platform, dtype),
    )


def load_model(path: Path, *, dtype: str, log: Log, devices: Sequence[jax.Device] | None = None) -> RunnableModel:
    """The model at `path`, spread over the devices (all local ones by default), its matrices in the compute dtype: a
    cast of each at every step would take more of the memory's bandwidth than the step.

    Raises:
      UserError: there is none, or it is damaged.
    """
    # Nothing here has a use for layers that predict further tokens.
    model = dataclasses.replace(model_config(path), mtp_layers=0)
    mesh = generation_mesh(model, devices or jax.local_devices())
    parts = split_model(model)
    shardings = tree.map_paths(lambda _, spec: named_sharding(mesh, spec.logical), parts.specs)
    params = open_weights(path, model, dtype=dtype, log=log)(shardings)
    return RunnableModel(model, parts.graphdef, params, generation_runtime(mesh, jnp.dtype(dtype)))


def generate_from(path: Path, asked: Asked, *, log: Log, write: Callable[[str], None]) -> None:
    """Continues the prompts with the model at `path`; a single prompt is streamed as it comes.

    Raises:
      UserError: there is no model, no tokenizer or chat template for what is asked, or the model cannot do it.
    """
    check_stops(asked.stop)
    settle_cpu_devices()
    carried, run = carried_files(path), _run_config(path)
    text: Any  # both have `encode`, `decode` and `vocab_size`
    if run is not None and not asked.chat:
        use_compilation_cache(run.train.compilation_cache)
        text = prepare_data(run, path, build=False).tokenizer
        check_tokenizer(text.fingerprint, path, log=log)
        ids, stop_ids = encode_prompts(text, asked.prompts), None
    elif carried is None:
        raise UserError(f"{path} has no tokenizer and no chat template that came with its weights; leave out --chat")
    else:
        text = PretrainedText(carried)
        chats = [[{"role": "user", "content": prompt}] for prompt in asked.prompts]
        ids = [text.encode_chat(chat) for chat in chats] if asked.chat else [text.encode(p) for p in asked.prompts]
        ends = {
            stop: text.special_id(stop) for stop in asked.stop
        }  # they are never decoded, and so never found in text
        stop_ids = [*text.stop_ids, *(number for number in ends.values() if number is not None)]
        asked = asked._replace(stop=[stop for stop, number in ends.items() if number is None])
    check_prompts(ids, asked.max_tokens, model=model_config(path))
    usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"  # CPUs without units for it are slow at it
    model = load_model(path, dtype=run.train.precision if run else usual, log=log)
    streamed = len(asked.prompts) == 1
    if streamed and not asked.chat:
        write(asked.prompts[0])
    texts = generate_text(
        model,
        ids,
        tokenizer=text,
        max_new_tokens=asked.max_tokens,
        sampling=asked.sampling,
        key=jax.random.key(asked.seed),
        stop_ids=stop_ids,
        stop=asked.stop,
        on_text=(lambda _, piece: write(piece)) if streamed else None,
    )
    if streamed:
        write("\n")
        return
    for prompt, continuation in zip(asked.prompts, texts, strict=True):
        write(f"--- {json.dumps(prompt)}\n{'' if asked.chat else prompt}{continuation}\n")


def check_tokenizer(fingerprint: str, path: Path, *, log: Log) -> None:
    """Raises UserError where the weights at `path` were trained with another tokenizer."""
    wanted = open_stored(path, log=log).record.metadata.get("tokenizer", fingerprint)
    if wanted != fingerprint:
        raise UserError(
            f"the stores of {path} have another tokenizer ({fingerprint[:12]}) than its weights were trained with "
            f"({wanted[:12]}): its data was prepared again after the text had changed. Bring the text back, or name "
            "the former file as data.tokenizer.path, and type the command of the training again"
        )


def _run_config(path: Path) -> Config | None:
    """The config of a run; None where `path` is no run's workdir."""
    if not (path / "checkpoints").exists():
        if carried_files(path) is None:
            raise ConversionError(
                f"{path} holds no model: give a Hugging Face folder, a converted model, or the workdir of a run that "
                "has saved a checkpoint"
            )
        return None
    if not (path / _RUN).exists():
        return None
    given, dropped = known(json.loads((path / _RUN).read_text()))
    if lost := [setting for setting in dropped if setting.startswith(("model.", "data.tokenizer."))]:
        raise ConversionError(
            f"{path / _RUN} records {', '.join(lost)}, which this version has no more, so that it would be another "
            "model; use the version of MaxLM that trained it"
        )
    return resolve(given)
