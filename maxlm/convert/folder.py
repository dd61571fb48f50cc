"""A Hugging Face folder as it is on disk: its config.json, its tensors, and the other files that belong to it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import ModelConfig
from maxlm.convert.errors import ConversionError
from maxlm.convert.quantised import unquantised
from maxlm.convert.safetensors import INDEX, StoredTensor, TensorInfo, read_header
from maxlm.model.family import Family, FamilyError, TextHalf, Whole, family_of, read_model, text_half

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = """\
import json, pathlib, torch
from safetensors.torch import save_file

folder, weight_map = pathlib.Path({folder!r}), {{}}
for file in sorted(folder.glob({pattern!r})):
    tensors = torch.load(file, weights_only=True, map_location="cpu")
    whole = file.with_suffix(".safetensors")
    save_file({{name: tensor.contiguous().clone() for name, tensor in tensors.items()}}, whole)
    weight_map |= dict.fromkeys(tensors, whole.name)
(folder / {index!r}).write_text(json.dumps({{"weight_map": weight_map}}))
"""
"""What a user is told to run: weights alone are read, with no code of the files', for one file or several."""


class Tensor(NamedTuple):
    """A tensor of any storage: `read(rows)` gives rows of its first axis."""

    info: TensorInfo
    read: Callable[[slice], np.ndarray]


class HuggingFaceFolder(NamedTuple):
    """A folder, or the text half of one whose model also sees or hears.

    config: the content of config.json. tensors: by name, quantised ones already as bfloat16. left_out: names of the
    tensors of other halves.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]


def is_huggingface_folder(path: Path) -> bool:
    """Whether it looks like one: a config.json that speaks of a model, and no run's or checkpoint's files."""
    return (path / CONFIG).is_file() and not (path / "checkpoints").exists()


def read_config(path: Path) -> dict[str, Any]:
    """The content of the folder's config.json; of a model that also sees or hears, what it says of the text half.

    Raises:
      ConversionError: it is missing, or no JSON object.
      FamilyError: it should speak of a text half, and does not.
    """
    return dict(_read_text_half(path).config)


def _read_text_half(path: Path) -> TextHalf:
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
    return text_half(content)


def open_folder(path: Path) -> HuggingFaceFolder:
    """Reads the config and all headers, and checks that every file is whole.

    Raises:
      ConversionError: a file is missing, truncated or of a format that is not read; it is named.
    """
    half = _read_text_half(path)
    stored: dict[str, StoredTensor] = {}
    for file, expected in _shards(path).items():
        header = read_header(path / file)
        if lacking := [name for name in expected if name not in header]:
            raise ConversionError(f"{path / file} lacks tensors that {INDEX} places there: {', '.join(lacking)}")
        if twice := [name for name in header if name in stored]:
            raise ConversionError(f"{path / file} repeats tensors of another file: {', '.join(twice)}")
        stored |= header
    tensors, left_out = _of_text_half(stored, half.whole)
    config = dict(half.config)
    return HuggingFaceFolder(path, config, unquantised(tensors, config), left_out)


def _of_text_half(stored: Mapping[str, StoredTensor], whole: Whole | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by the names that they have in a model without other halves, and the names of those that it lacks."""
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, tensor in stored.items():
        if whole and any(re.fullmatch(pattern, name) for pattern in whole.others):
            left_out.append(name)
            continue
        prefixes = whole.prefixes if whole else {}
        outer = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        plain = prefixes[outer] + name.removeprefix(outer) if outer else name
        tensors[plain] = Tensor(tensor.info, tensor.read)
    return tensors, tuple(left_out)


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
        usual = any(name.startswith("pytorch_model") for name in others)
        pattern = "pytorch_model*.bin" if usual else f"*{Path(others[0]).suffix}"
        script = _CONVERT.format(folder=str(path), pattern=pattern, index=INDEX)
        raise ConversionError(
            f"{path} has PyTorch files only ({', '.join(others[:3])}), which can run code when they are opened and are "
            f"not read; this writes their weights beside them, and runs none (it needs torch and safetensors):\n"
            f"python - <<'END'\n{script}END"
        )
    raise ConversionError(f"{path} has no *.safetensors file")


def tell_left_out(folder: HuggingFaceFolder, log: Callable[[str], None]) -> None:
    """Says how many tensors of which other halves are not read."""
    parts = Counter(next(part for part in name.split(".") if part != "model") for name in folder.left_out)
    if parts:
        listed = ", ".join(f"{part} ({count})" for part, count in sorted(parts.items()))
        log(f"{folder.path}: the text half alone is read; left out are the tensors of {listed}")


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


def remove_code(folder: Path) -> None:
    """Removes a model's code; a tokenizer's, which has nothing to do with the model's family, stays."""
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("auto_map") if file.is_file() else None
    for code in folder.glob("*.py"):
        if f"{code.stem}." not in json.dumps(named):
            code.unlink()
