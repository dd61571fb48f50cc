"""The tokenizer of a run, written into the files that `transformers` reads.

All three kinds become a `tokenizer.json`, which begins every text with the begin token, as documents begin in training.
A sentencepiece model is also kept as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from maxlm.data.tokenizers import KINDS, PROBE, WORD_MARK, Tokenizer, TokenizerError, fingerprint

TOKENIZER, PIECES, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
TOKENIZERS = (TOKENIZER, PIECES)
_FILES = {"huggingface": TOKENIZER, "sentencepiece": PIECES}  # by kind
_BESIDES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt")
_TEMPLATE, _GENERATION = "chat_template.jinja", "generation_config.json"
_BEGIN = "<s>"  # of the bytes tokenizer, which has no names


class _Read(NamedTuple):
    """pipeline: None where a file cannot say it. names: of the special tokens, as tokenizer_config.json calls them."""

    pipeline: Pipeline | None
    names: dict[str, str]


def holds_tokenizer(folder: Path, wanted: str) -> bool:
    """Whether a file in the folder is the tokenizer of this fingerprint."""
    files = ((kind, folder / name) for kind, name in _FILES.items())
    return any(file.is_file() and fingerprint(kind, file.read_bytes()) == wanted for kind, file in files)


def remove_tokenizer(folder: Path, follower: Tokenizer) -> None:
    """Removes the files of a folder's tokenizer, which another follows.

    Where that one only adds tokens, what speaks of tokens by name or id stays: templates, names, generation's ends.
    """
    files = {kind: folder / name for kind, name in _FILES.items() if (folder / name).is_file()}
    if not files:
        return
    grown = any(_grown(kind, file, follower) for kind, file in files.items())
    for name in (*TOKENIZERS, *_BESIDES, *(() if grown else (SETTINGS, _TEMPLATE))):
        (folder / name).unlink(missing_ok=True)
    if grown:
        _change(folder / SETTINGS, lambda said: {k: v for k, v in said.items() if k != "added_tokens_decoder"})
        return
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    _change(folder / _GENERATION, lambda said: {k: v for k, v in said.items() if not k.endswith("_token_id")})


def _grown(kind: str, file: Path, follower: Tokenizer) -> bool:
    try:
        before = KINDS[kind](file.read_bytes())
    except TokenizerError:  # it does not give texts back as they were, as ours do
        return False
    return before.vocab_size <= follower.vocab_size and before.encode(PROBE) == follower.encode(PROBE)


def _change(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.is_file():
        content = change(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files of a tokenizer, after seeing that they give its ids. Other settings that are there stay."""
    if tokenizer.file_name:
        tokenizer.save(folder / tokenizer.file_name)
    read = {"bytes": _from_bytes, "sentencepiece": _from_pieces, "huggingface": _as_it_is}[tokenizer.kind]
    pipeline, names = read(tokenizer, folder)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if pipeline is None or pipeline.encode(PROBE, add_special_tokens=False).ids != tokenizer.encode(PROBE):
        # Not of byte pairs, or with spaces put in front of texts: readers of sentencepiece models know what to do.
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    elif tokenizer.file_name != TOKENIZER:
        pipeline.save(str(folder / TOKENIZER))
    settings |= names | {"clean_up_tokenization_spaces": False}
    file = folder / SETTINGS
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(there | settings, indent=2) + "\n", encoding="utf-8")


def _as_it_is(tokenizer: Tokenizer, folder: Path) -> _Read:
    pipeline = Pipeline.from_file(str(folder / TOKENIZER))
    pipeline.encode_special_tokens = True
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return _Read(pipeline, {name: str(pipeline.id_to_token(i)) for name, i in ids.items() if i is not None})


def _from_bytes(tokenizer: Tokenizer, folder: Path) -> _Read:
    """Every byte is a token whose id is the byte. The library writes bytes as characters of an alphabet of its own."""
    del folder
    whole = "".join(map(chr, range(256)))
    written = {}
    for character in whole:
        (spelt, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)
        for byte, sign in zip(character.encode(), spelt, strict=True):
            written[byte] = sign
    # No text has these bytes; the alphabet's signs that are left are theirs.
    left = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(written.values()))
    written |= dict(zip((byte for byte in range(256) if byte not in written), left, strict=True))
    pipeline = Pipeline(models.BPE(vocab={sign: byte for byte, sign in written.items()}, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.decoder = decoders.ByteLevel()
    return _Read(_beginning(pipeline, _BEGIN, tokenizer.bos_id), {"bos_token": _BEGIN})


def _from_pieces(tokenizer: Tokenizer, folder: Path) -> _Read:
    """The merges of a byte-pair model are not in its file: a pair is merged if what it makes is a piece, the piece of
    the highest score first."""
    model = sentencepiece.SentencePieceProcessor(model_proto=(folder / PIECES).read_bytes())
    vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    usual = {
        piece
        for piece, i in vocabulary.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
    }
    merges = [
        (-model.get_score(vocabulary[piece]), vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece, cut)
        for piece in usual
        for cut in range(1, len(piece))
        if piece[:cut] in usual and piece[cut:] in usual
    ]
    names = {"unk_token": model.id_to_piece(model.unk_id()), "bos_token": model.id_to_piece(tokenizer.bos_id)}
    if tokenizer.eos_id is not None:
        names["eos_token"] = model.id_to_piece(tokenizer.eos_id)
    pipeline = Pipeline(
        models.BPE(
            vocab=vocabulary,
            merges=[(piece[:cut], piece[cut:]) for *_, piece, cut in sorted(merges)],
            unk_token=names["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    pipeline.normalizer = normalizers.Replace(" ", WORD_MARK)
    pipeline.decoder = decoders.Sequence([decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    pipeline.add_special_tokens([name for key, name in names.items() if key != "bos_token"])
    return _Read(_beginning(pipeline, names["bos_token"], tokenizer.bos_id), names)


def _beginning(pipeline: Pipeline, name: str, number: int) -> Pipeline:
    """With the begin token, which texts are given in front."""
    pipeline.add_special_tokens([name])
    assert pipeline.token_to_id(name) == number, (name, number)
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, number)]
    )
    return pipeline
