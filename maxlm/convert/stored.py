"""Where weights can come from: a Hugging Face folder, what was converted from one, or the workdir of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from maxlm import tree
from maxlm.checkpoint.reader import PARAMS, ArrayInfo, CheckpointReader, Record, describe
from maxlm.config import ModelConfig
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import CONFIG, folder_model, is_huggingface_folder, read_config
from maxlm.model.decoder import split_model
from maxlm.model.param import ParamSpec
from maxlm.resolve import resolve_model
from maxlm.storage import is_bucket

CHECKPOINTS, CARRIED = "checkpoints", "hf"
VOCABULARY = "vocab_size"
"""In a checkpoint's metadata: rows of the vocabulary without padding."""
_AVERAGE = "average"


class StoredModel(NamedTuple):
    """A model in a checkpoint of ours.

    folder: of the checkpoint. part: of its state that holds the parameters. model: with the vocabulary as it is stored.
    vocab_size: without padding. carried: the folder of files that came along. hf: its config.json's content.
    """

    folder: Path
    record: Record
    part: str
    model: ModelConfig
    specs: dict[str, ParamSpec]
    vocab_size: int
    carried: Path | None
    hf: dict[str, Any] | None

    def info(self, path: str) -> ArrayInfo:
        """Shape and dtype of a parameter as stored."""
        return self.record.arrays[f"{self.part}/{path}"]


def open_stored(path: Path, *, step: int | None = None, log: Callable[[str], None]) -> StoredModel:
    """The newest checkpoint of a run, or that of a converted model; reads no arrays.

    A run's moving average of the weights is preferred where there is one.

    Raises:
      ConversionError: there is none, or it does not hold what its config says.
    """
    reader = CheckpointReader(path / CHECKPOINTS, log=log)
    steps = reader.steps()
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}, only {steps}"
        raise ConversionError(f"{path} has {wanted}; give the folder of a converted model, or the workdir of a run")
    step = steps[-1] if step is None else step
    try:
        record = reader.record(step)
    except (OSError, ValueError) as error:
        raise ConversionError(f"checkpoint {step} of {path} is damaged: {describe(error)}") from None
    model = resolve_model(record.metadata["config"]["model"])
    specs = tree.paths(split_model(model).specs)
    part = _AVERAGE if any(name.startswith(f"{_AVERAGE}/") for name in record.arrays) else PARAMS
    saved = {name.removeprefix(f"{part}/"): i.shape for name, i in record.arrays.items() if name.startswith(f"{part}/")}
    if saved != {name: spec.shape for name, spec in specs.items()}:
        raise ConversionError(f"checkpoint {step} of {path} does not hold the arrays of its config")
    carried = path / CARRIED if (path / CARRIED / CONFIG).is_file() else None
    hf = read_config(carried) if carried else None
    vocab_size = record.metadata.get(VOCABULARY, model.vocab_size)
    return StoredModel(reader.path(step), record, part, model, specs, vocab_size, carried, hf)


def vocabulary(path: Path) -> int:
    """Rows of a model's vocabulary, without padding.

    Raises:
      ConversionError, FamilyError: as of `model_config`.
    """
    return folder_model(path).vocab_size if is_huggingface_folder(path) else open_stored(path, log=_silent).vocab_size


def model_config(path: str | Path) -> ModelConfig:
    """The model that a Hugging Face folder, a converted model or a run on this machine holds; for config files.

    Raises:
      ConversionError, FamilyError: it holds none, or one of no family that is known.
    """
    if is_bucket(path):
        raise ConversionError(
            f"{path} is in a bucket, and a config file reads models on this machine: type `maxlm convert to-hf {path} "
            "FOLDER` and give that folder"
        )
    folder = Path(path).expanduser()
    if is_huggingface_folder(folder):
        return folder_model(folder)
    return open_stored(folder, log=_silent).model


def carried_files(path: Path) -> Path | None:
    """The folder with the config.json, tokenizer and templates that belong to a model; None: there is none."""
    if is_huggingface_folder(path):
        return path
    return path / CARRIED if (path / CARRIED / CONFIG).is_file() else None


def _silent(_line: str) -> None:
    """What is only asked for its size says nothing."""
