"""From a Hugging Face folder to a checkpoint of ours and back, a tile at a time: memory is that of a few tiles."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import maxlm
from maxlm import tree
from maxlm.checkpoint.blocks import BlockReader, BlockWriter
from maxlm.checkpoint.reader import ArrayInfo
from maxlm.config import Config, ModelConfig
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import CONFIG, HuggingFaceFolder, carry, described_by, open_folder, remove_code, tell_left_out
from maxlm.convert.safetensors import ShardWriter, TensorInfo
from maxlm.convert.stored import CARRIED, CHECKPOINTS, VOCABULARY, StoredModel, open_stored
from maxlm.convert.tiles import Region, Tile, chunks, tiles
from maxlm.convert.tokenizer import TOKENIZERS, holds_tokenizer, remove_tokenizer, write_tokenizer
from maxlm.data.prepare import prepare_data
from maxlm.data.tokenizers import TokenizerError
from maxlm.data.workers import Progress
from maxlm.errors import UserError
from maxlm.model.decoder import split_model
from maxlm.model.family import Family, FamilyError, families, family_of, hf_config, read_model, unlike
from maxlm.model.param import ParamSpec
from maxlm.model.table import BoundRow, bind
from maxlm.resolve import as_config_dict, resolve

FLOATS: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD_BYTES = 5 * 10**9
"""What `transformers` puts into one file, too."""
_OF_ALL_FAMILIES = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")
"""Of a config.json, the words that stay when a model is written as another family's."""

Log = Callable[[str], None]


class FamilyModel(NamedTuple):
    """A model as its family describes it, without padding of the vocabulary.

    specs: ParamSpec of each parameter by path. rows: the family's table at the model's shapes.
    """

    family: Family
    model: ModelConfig
    specs: dict[str, ParamSpec]
    rows: tuple[BoundRow, ...]


def family_model(family: Family, model: ModelConfig) -> FamilyModel:
    """Binds the family's table to a model."""
    specs = split_model(model).specs
    return FamilyModel(family, model, tree.paths(specs), bind(family.table(model), specs))


def open_model(path: Path, *, further: bool = True) -> tuple[HuggingFaceFolder, FamilyModel]:
    """A Hugging Face folder with its family, after checking names and shapes of all tensors.

    Args:
      further: whether layers that predict further tokens are wanted, where there are such.

    Raises:
      ConversionError, FamilyError: the folder is not whole, its family is unknown, or tensors are missing, unexpected
        or of the wrong shape; all of them are listed.
    """
    folder = open_folder(path)
    family, model = described_by(path, folder.config, folder.tensors)
    described = family_model(family, model if further else dataclasses.replace(model, mtp_layers=0))
    if (outer := family.table(described.model).outer) and not any(name.startswith(outer) for name in folder.tensors):
        folder = folder._replace(tensors={outer + name: tensor for name, tensor in folder.tensors.items()})
    _check_tensors(folder, described)
    return folder, described


def from_hf(source: Path, out: Path, *, dtype: str | None = None, pad_vocab: int = 1, log: Log) -> None:
    """Converts a Hugging Face folder into `out`, which holds `checkpoints/0` and the carried files in `hf`.

    Args:
      dtype: of the arrays, one of FLOATS; None: that of each tensor.
      pad_vocab: rows of zeros are added to embedding and head until the vocabulary is a multiple of this.

    Raises:
      ConversionError, FamilyError: nothing is left behind at `out`.
    """
    folder, described = open_model(source)
    tell_left_out(folder, log)
    padded = dataclasses.replace(described.model, vocab_size=-(-described.model.vocab_size // pad_vocab) * pad_vocab)
    specs = tree.paths(split_model(padded).specs)
    dtypes = _dtypes(folder, described, dtype)
    arrays = {f"params/{path}": ArrayInfo(spec.shape, str(dtypes[path])) for path, spec in sorted(specs.items())}
    grids = {f"params/{path}": chunk for row in described.rows for path, chunk in chunks(row).items()}
    log(f"{source}: {described.family.name}, {sum(spec.size for spec in specs.values()):,} parameters")
    with staged(out, log=log) as place:
        writer = BlockWriter(place / CHECKPOINTS / "0", arrays, grids)
        total = sum(folder.tensors[name].info.nbytes for row in described.rows for name, _ in row.tensors())
        with Progress("converting", total) as progress:
            for tile in _all_tiles(described):
                for path, block in tile.ours(lambda name, rows: folder.tensors[name].read(rows)).items():
                    writer.write(f"params/{path}", tile.regions[path], block.astype(dtypes[path], copy=False))
                progress.advance(tile.elements * folder.tensors[tile.names[0]].info.dtype.itemsize)
        for path, region in _padding(described.specs, specs).items():
            writer.write(f"params/{path}", region, np.zeros([r.stop - r.start for r in region], dtypes[path]))
        metadata = {
            "config": {"model": as_config_dict(Config(model=padded)).to_dict()["model"]},
            "family": described.family.name,
            VOCABULARY: described.model.vocab_size,
            "version": maxlm.__version__,
        }
        writer.finish(0, metadata)
        carry(source, place / CARRIED)
    log(f"{out}: written")


def to_hf(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    log: Log,
) -> None:
    """Writes a converted checkpoint, or a checkpoint of a run, as a Hugging Face folder.

    Args:
      source: what `from_hf` wrote, or the workdir of a run.
      dtype: of the tensors, one of FLOATS; None: that of the arrays.
      family: name of the family; None: that which the weights came from, or the one that can express the model.
      step: of the checkpoint; None: the newest.

    Raises:
      ConversionError, FamilyError, CheckpointError: nothing is left behind at `out`.
    """
    stored = open_stored(source, step=step, log=log)
    described = family_model(
        _family_for(stored, family), dataclasses.replace(stored.model, vocab_size=stored.vocab_size)
    )
    content = _content(stored, described)
    precise = described.family.table(described.model).precise
    out_dtypes = {
        path: _chosen(dtype, np.dtype(stored.info(path).dtype), precise=path.endswith(precise))
        for path in described.specs
    }
    tensors = {
        name: TensorInfo(row.shape, np.result_type(*(out_dtypes[piece.ours] for piece in row.row.pieces)))
        for row in described.rows
        for name, _ in row.tensors()
    }
    copies: dict[str, list[str]] = {}
    for name, original in described.family.table(described.model).repeats.items():
        copies.setdefault(original, []).append(name)
        tensors[name] = tensors[original]
    log(f"{source}, step {stored.record.step}: {described.family.name}, {len(tensors)} tensors")
    with staged(out, log=log) as place:
        if stored.carried:
            carry(stored.carried, place)
            if _is_other(stored, described.family):
                remove_code(place)
        content = _with_tokenizer(content, stored, source, place, log=log)
        (place / CONFIG).write_text(json.dumps(_with_dtype(content, tensors), indent=2) + "\n")
        reader = BlockReader(stored.folder, stored.record)
        total = sum(info.nbytes for info in tensors.values())
        with ShardWriter(place, tensors, shard_bytes=shard_bytes) as writer, Progress("converting", total) as progress:
            for tile in _all_tiles(described):
                blocks = {
                    path: reader.read(f"{stored.part}/{path}", region).astype(out_dtypes[path], copy=False)
                    for path, region in tile.regions.items()
                }
                for original, rows in tile.theirs(blocks):
                    for name in (original, *copies.get(original, ())):
                        writer.write(name, rows.astype(tensors[name].dtype, copy=False), row=tile.rows.start)
                        progress.advance(rows.nbytes)
        for path, region in _padding(described.specs, stored.specs).items():
            reader.read(f"{stored.part}/{path}", region)  # its digest is that of the whole array
        reader.prove()
    log(f"{out}: written")


@contextlib.contextmanager
def staged(out: Path, *, log: Log) -> Iterator[Path]:
    """A folder beside `out` that is moved there in the end, or removed if something fails.

    Raises:
      ConversionError: `out` exists already, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} exists already; choose another place or remove it")
    place = out.with_name(f".{out.name}.partial")
    if place.exists():
        log(f"removed {place}: a conversion was interrupted there")
        shutil.rmtree(place)
    try:
        place.mkdir(parents=True)
        yield place
        if out.is_dir():
            out.rmdir()
        place.rename(out)
    except OSError as error:
        raise ConversionError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _all_tiles(described: FamilyModel) -> Iterator[Tile]:
    for row in described.rows:
        yield from tiles(row)


def _check_tensors(folder: HuggingFaceFolder, described: FamilyModel) -> None:
    table = described.family.table(described.model)
    copies = {**table.copies, **table.repeats}
    expected = {name: row.shape for row in described.rows for name, _ in row.tensors()}
    found = {name: tensor.info for name, tensor in folder.tensors.items()}
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in table.ignored) or r"(?!)")
    problems = [f"{name} {list(shape)} is missing" for name, shape in expected.items() if name not in found]
    problems += [
        f"{name} {list(info.shape)} is unexpected"
        for name, info in found.items()
        if name not in expected and name not in copies and not ignored.fullmatch(name)
    ]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems += [
        f"{name} is of dtype {found[name].dtype}, expected floats"
        for name in expected
        if name in found and found[name].dtype.kind in "iub"
    ]
    problems += [
        f"{name} is of dtype {found[name].dtype} and has no scale"
        for name in expected
        if name in found and found[name].dtype.kind not in "iub" and found[name].dtype.itemsize == 1
    ]
    if not problems:
        problems = [
            f"{name} differs from {original}, of which it has to be a copy"
            for name, original in copies.items()
            if name in found and not _same(folder, name, original)
        ]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConversionError(f"{folder.path} does not hold the tensors that its config.json calls for:{listed}")


def _same(folder: HuggingFaceFolder, name: str, original: str) -> bool:
    one, other = folder.tensors[name], folder.tensors[original]
    if one.info != other.info:
        return False
    height, step = one.info.shape[0], 4096
    return all(
        np.array_equal(one.read(slice(i, i + step)).view(np.uint8), other.read(slice(i, i + step)).view(np.uint8))
        for i in range(0, height, step)
    )


def _dtypes(folder: HuggingFaceFolder, described: FamilyModel, dtype: str | None) -> dict[str, np.dtype]:
    """Of each of our parameters: what is asked for, or that of its tensors, float32 where they differ."""
    out: dict[str, np.dtype] = {}
    precise = described.family.table(described.model).precise
    for row in described.rows:
        found = {folder.tensors[name].info.dtype for name, _ in row.tensors()}
        own = found.pop() if len(found) == 1 else np.dtype(np.float32)
        out |= {p.ours: _chosen(dtype, own, precise=p.ours.endswith(precise)) for p in row.row.pieces}
    return out


def _chosen(asked: str | None, own: np.dtype, *, precise: bool) -> np.dtype:
    """The dtype asked for, if any; what is to stay `precise` is not made narrower."""
    chosen = np.dtype(FLOATS[asked]) if asked else own
    return own if precise and chosen.itemsize < own.itemsize else chosen


def _padding(plain: Mapping[str, ParamSpec], padded: Mapping[str, ParamSpec]) -> dict[str, Region]:
    """The blocks by which arrays of a padded vocabulary are longer, by path."""
    return {
        path: tuple(
            slice(old if old < new else 0, new) for old, new in zip(spec.shape, padded[path].shape, strict=True)
        )
        for path, spec in plain.items()
        if spec.shape != padded[path].shape
    }


def _family_for(stored: StoredModel, name: str | None) -> Family:
    """The family asked for, that of the carried config.json, or the only one that can express the model."""
    known = families()
    if name is not None:
        if name not in known:
            raise FamilyError(f"there is no family {name!r}; these are: {', '.join(known)}")
        if not stored.hf or _is_other(stored, known[name]):
            hf_config(known[name], stored.model)  # what it cannot express is told
        return known[name]
    if stored.hf:
        return family_of(stored.hf)
    fitting, reasons = [], []
    for family in known.values():
        try:
            hf_config(family, stored.model)
            fitting.append(family)
        except FamilyError as error:
            reasons.append(f"\n  {family.name}: {error}")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(family.name for family in fitting)
        raise FamilyError(f"the model can be written as any of {names}: choose one with --family")
    raise FamilyError(f"no family can express this model:{''.join(reasons)}")


def _content(stored: StoredModel, described: FamilyModel) -> dict[str, Any]:
    """Of config.json: what was carried, with what training or an edit has changed.

    Another family's words, and its code above all, mean nothing here, or something else.
    """
    if not stored.hf or _is_other(stored, described.family):
        known = {key: value for key, value in (stored.hf or {}).items() if key in _OF_ALL_FAMILIES}
        return _with_length(known | hf_config(described.family, described.model), stored, described)
    content = {key: value for key, value in stored.hf.items() if key != "quantization_config"}
    if unlike(described.model, read_model(described.family, content)):
        content |= hf_config(described.family, described.model)
    return content


def _is_other(stored: StoredModel, family: Family) -> bool:
    """Whether what came along is of another family."""
    return stored.hf is not None and family_of(stored.hf) is not family


def _with_length(content: dict[str, Any], stored: StoredModel, described: FamilyModel) -> dict[str, Any]:
    """The content with how long texts may be: as long as the run's rows, or as its positions are stretched to; without,
    where the family reads the word for it as something else."""
    data, rope = stored.record.metadata["config"].get("data", {}), described.model.rope
    lengths = [data.get("sequence_length", 0), *(phase["sequence_length"] for phase in data.get("phases", {}).values())]
    longest = max(*lengths, round(rope.original_length * rope.factor) if rope.scaling != "none" else 0)
    longest = max(longest, (stored.hf or {}).get("max_position_embeddings") or 0)
    said = {"max_position_embeddings": longest} | content
    same = not described.model.learned_positions and not unlike(described.model, read_model(described.family, said))
    return said if longest and same else content


def _with_tokenizer(
    content: dict[str, Any], stored: StoredModel, source: Path, place: Path, *, log: Log
) -> dict[str, Any]:
    """The content with the begin and end tokens of the tokenizer that a run was trained with, whose files are written
    where those that came along, if any did, are another's."""
    wanted = stored.record.metadata.get("tokenizer")
    if wanted is None or holds_tokenizer(place, wanted):
        return content
    try:
        tokenizer = prepare_data(resolve(stored.record.metadata["config"]), source, build=False).tokenizer
        if tokenizer.fingerprint != wanted:
            raise TokenizerError(f"the stores of {source} have another tokenizer than the checkpoint")
    except UserError as error:
        other = any((place / name).is_file() for name in TOKENIZERS)
        what = "the tokenizer that came along, not the run's own, is written" if other else "no tokenizer is written"
        log(f"{what}: {error}")
        return content
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if remove_tokenizer(place, tokenizer) and content.get("eos_token_id") is not None:
        ids.pop("eos_token_id")  # a chat's ends are more, or others, than that of a document
    write_tokenizer(tokenizer, place)
    return content | ids


def _with_dtype(content: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The content with the dtype that most of the weights have, under the key that it was under."""
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[str(info.dtype)] = sizes.get(str(info.dtype), 0) + info.nbytes
    key = "dtype" if "dtype" in content else "torch_dtype"
    return content | {key: max(sizes, key=lambda dtype: sizes[dtype])}
