"""A Hugging Face folder as it is on disk: its config.json, its tensors, and the other files that belong to it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import ModelConfig
from maxlm.convert.errors import ConversionError
from maxlm.convert.quantised import unquantised
from maxlm.convert.safetensors import INDEX, StoredTensor, TensorInfo, read_header
from maxlm.model.family import Family, FamilyError, family_of, read_model

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")


class Tensor(NamedTuple):
    """A tensor of any storage: `read(rows)` gives rows of its first axis."""

    info: TensorInfo
    read: Callable[[slice], np.ndarray]


class HuggingFaceFolder(NamedTuple):
    """config: the content of config.json. tensors: by name, quantised ones already as bfloat16."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]


def is_huggingface_folder(path: Path) -> bool:
    """Whether it looks like one: a config.json that speaks of a model, and no run's or checkpoint's files."""
    return (path / CONFIG).is_file() and not (path / "checkpoints").exists()


def read_config(path: Path) -> dict[str, Any]:
    """The content of the folder's config.json; of a model that also sees or hears, what it says of the text half.

    Raises:
      ConversionError: it is missing, or no JSON object.
    """
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(
            f"{path} is no Hugging Face folder: {CONFIG} cannot be read ({error.strerror}); give the folder that "
            "holds config.json and *.safetensors"
        ) from None
    except ValueError as error:
        raise ConversionError(f"{path / CONFIG} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path / CONFIG} holds no JSON object")
    return content


def open_folder(path: Path) -> HuggingFaceFolder:
    """Reads the config and all headers, and checks that every file is whole.

    Raises:
      ConversionError: a file is missing, truncated or of a format that is not read; it is named.
    """
    config = read_config(path)
    stored: dict[str, StoredTensor] = {}
    for file, expected in _shards(path).items():
        header = read_header(path / file)
        if lacking := [name for name in expected if name not in header]:
            raise ConversionError(f"{path / file} lacks tensors that {INDEX} places there: {', '.join(lacking)}")
        if twice := [name for name in header if name in stored]:
            raise ConversionError(f"{path / file} repeats tensors of another file: {', '.join(twice)}")
        stored |= header
    tensors = {name: Tensor(tensor.info, tensor.read) for name, tensor in stored.items()}
    return HuggingFaceFolder(path, config, unquantised(tensors, config))


def described_by(path: Path, config: Mapping[str, Any], names: Collection[str] | None) -> tuple[Family, ModelConfig]:
    """The family and the model of the config.json in a folder and the tensors beside it.

    Layers that predict further tokens may be left out though the config speaks of them, as `transformers` does.

    Args:
      names: of the tensors; None: not known.

    Raises:
      FamilyError: the family is unknown, or does not have a setting, or a word of it is missing.
    """
    try:
        family = family_of(config)
        model = read_model(family, config)
    except FamilyError as error:
        raise FamilyError(f"{path / CONFIG}: {error}") from error
    if model.mtp_layers and names is not None:
        rows = [row for row in family.table(model).rows if row.pieces[0].ours.startswith("mtp/")]
        if not any(row.theirs.format(layer=model.num_layers, expert=0) in names for row in rows):
            model = dataclasses.replace(model, mtp_layers=0)
    return family, model


def folder_model(path: Path) -> ModelConfig:
    """The model of a Hugging Face folder, whose weights need not all be there.

    Raises:
      ConversionError, FamilyError: as of `read_config` and `described_by`.
    """
    config, names = read_config(path), None
    if (path / INDEX).is_file() or len(list(path.glob("*.safetensors"))) == 1:
        names = {name for file, named in _shards(path).items() for name in named or read_header(path / file)}
    return described_by(path, config, names)[1]


def _shards(path: Path) -> dict[str, list[str]]:
    """The weight files and what the index, where there is one, places in each."""
    if (path / INDEX).is_file():
        try:
            weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards: dict[str, list[str]] = {}
            for name, file in weight_map.items():
                shards.setdefault(file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{path / INDEX} is no index of safetensors files: {error}") from None
        if missing := [file for file in shards if not (path / file).is_file()]:
            raise ConversionError(f"{path} lacks {', '.join(missing)}, which {INDEX} names; get the files anew")
        return shards
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if len(files) == 1:
        return {files[0]: []}
    if files:
        raise ConversionError(
            f"{path} has {len(files)} safetensors files but no {INDEX} that says what belongs together"
        )
    if others := sorted(file.name for file in path.iterdir() if file.name.endswith(_TORCH)):
        raise ConversionError(
            f"{path} has PyTorch files only ({', '.join(others[:3])}), which can run code when they are opened and are "
            'not read; convert them with: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path}-safetensors')\""
        )
    raise ConversionError(f"{path} has no *.safetensors file")


def carry(source: Path, target: Path) -> None:
    """Copies all but the weights: config, generation config, tokenizer, chat templates, licence.

    Code among them is copied like the rest, and never run.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or file.name.endswith(_WEIGHTS):
            continue
        if file.is_file():
            shutil.copyfile(file, target / file.name)
        elif file.name == "additional_chat_templates":
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
