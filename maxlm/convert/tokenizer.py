"""The tokenizer of a run, written into the files that `transformers` reads.

All three kinds become a `tokenizer.json`, which begins every text with the begin token, as documents begin in training:
one that did not is written with a template that does. A sentencepiece model is also kept as it is.
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

from maxlm.data.tokenizers import PROBE, WORD_MARK, Tokenizer, TokenizerError, load_tokenizer

TOKENIZER, PIECES, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
TOKENIZERS = (TOKENIZER, PIECES)
_FILES = {"huggingface": TOKENIZER, "sentencepiece": PIECES}  # by kind
_BESIDES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt")
_TEMPLATE, _GENERATION = "chat_template.jinja", "generation_config.json"
_BEGIN = "<s>"  # of the bytes tokenizer, which has no names


class _Read(NamedTuple):
    """names: of the special tokens, as tokenizer_config.json calls them."""

    pipeline: Pipeline
    names: dict[str, str]


def holds_tokenizer(folder: Path, wanted: str) -> bool:
    """Whether a file in the folder is the tokenizer of this fingerprint."""
    found = (_loaded(folder, kind) for kind in _FILES)
    return any(tokenizer is not None and tokenizer.fingerprint == wanted for tokenizer in found)


def _loaded(folder: Path, kind: str) -> Tokenizer | None:
    """The folder's tokenizer of this kind; None: there is none, or none that gives texts back as they were."""
    try:
        return load_tokenizer(kind, folder / _FILES[kind])
    except TokenizerError:
        return None


def remove_tokenizer(folder: Path, follower: Tokenizer) -> bool:
    """Removes the files of a folder's tokenizer, which another follows; whether that one only adds tokens to it.

    Then what speaks of tokens by name or id stays: templates, names, generation's ends.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return False
    grown = any(_grown(_loaded(folder, kind), follower) for kind in _FILES)
    for name in (*TOKENIZERS, *_BESIDES, *(() if grown else (SETTINGS, _TEMPLATE))):
        (folder / name).unlink(missing_ok=True)
    if grown:
        _change(folder / SETTINGS, lambda said: {k: v for k, v in said.items() if k != "added_tokens_decoder"})
        return True
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    _change(folder / _GENERATION, lambda said: {k: v for k, v in said.items() if not k.endswith("_token_id")})
    return False


def _grown(before: Tokenizer | None, follower: Tokenizer) -> bool:
    if before is None or before.vocab_size > follower.vocab_size:
        return False
    return before.encode(PROBE) == follower.encode(PROBE)


def _change(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.is_file():
        content = change(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files of a tokenizer, after seeing that they give its ids.

    Other settings that are there stay, and so do the names of special tokens, but for that of the begin token.
    """
    if tokenizer.file_name:
        tokenizer.save(folder / tokenizer.file_name)
    read = {"bytes": _from_bytes, "sentencepiece": _from_pieces, "huggingface": _as_it_is}[tokenizer.kind]
    pipeline, names = read(tokenizer, folder)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if pipeline.encode(PROBE, add_special_tokens=False).ids == tokenizer.encode(PROBE):
        if pipeline.encode(PROBE).ids[:1] != [tokenizer.bos_id]:  # else its file stays what it is, to the byte
            _beginning(pipeline, names["bos_token"], tokenizer.bos_id).save(str(folder / TOKENIZER))
    else:
        # Not of byte pairs, or with spaces put in front of texts: readers of sentencepiece models know what to do.
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    file = folder / SETTINGS
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = {name: token for name, token in there.items() if name in names and name != "bos_token" and token}
    settings |= names | kept | {"add_bos_token": True, "clean_up_tokenization_spaces": False}
    file.write_text(json.dumps(there | settings, indent=2) + "\n", encoding="utf-8")


def _as_it_is(tokenizer: Tokenizer, folder: Path) -> _Read:
    pipeline = Pipeline.from_file(str(folder / TOKENIZER))
    pipeline.encode_special_tokens = True  # as in our documents; the file does not say it
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
    return _Read(pipeline, {"bos_token": _BEGIN})


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
    return _Read(pipeline, names)


def _beginning(pipeline: Pipeline, name: str, number: int) -> Pipeline:
    """With the begin token, which texts are given in front."""
    pipeline.add_special_tokens([name])
    assert pipeline.token_to_id(name) == number, (name, number)
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, number)]
    )
    return pipeline
