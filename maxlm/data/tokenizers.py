"""Text to tokens and back, exactly: sentencepiece, Hugging Face `tokenizer.json` and plain bytes.

A tokenizer here gives back the very text that it was given; stores rely on it (held-out bytes are decoded from
tokens). Ids are below `vocab_size`; a document in a store is `[bos_id] + encode(text)`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from maxlm.errors import UserError
from maxlm.files import write_atomically

# Sentencepiece writes a space as this character and reads it back as a space.
WORD_MARK = "\u2581"
# What the begin and end tokens are called in tokenizer.json files that nothing stands beside: they do not say which of
# their special tokens these are.
BEGIN_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[BOS]", "[CLS]")
END_TOKENS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")
# A tokenizer that changes this text when it goes there and back changes most real text.
PROBE = "  Two  spaces,\n\n\ta tab;\r\n    indented = 'ÄÖÜ ﬁ Å ½ 你好 🙂'  # end  \n"
# The sentencepiece trainer keeps positions in a word in 16 bits; a line longer than this is trained on in parts.
LONGEST_LINE = 4096
# How a model is trained; docs/data.md says what each of these was worth.
TRAINING: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.9995,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 4 * LONGEST_LINE,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    # The number is kept in the model file: one taken from the machine would change the fingerprint.
    "num_threads": 2,
}


class TokenizerError(UserError):
    """A tokenizer that cannot be loaded, trained or used exactly."""


class Ends(NamedTuple):
    """What is said of the tokens that begin and end a text: names or ids, of which the first that there is counts."""

    begin: tuple[str | int, ...] = ()
    end: tuple[str | int, ...] = ()

    @classmethod
    def of(cls, bos_id: int, eos_id: int | None) -> Ends:
        """Those of a tokenizer that has been loaded before."""
        return cls((bos_id,), () if eos_id is None else (eos_id,))


class Tokenizer(Protocol):
    """What the rest of MaxLM asks of a tokenizer."""

    @property
    def kind(self) -> str:
        """The word of `data.tokenizer.kind`."""

    @property
    def file_name(self) -> str:
        """Name of the file that `save` writes inside a store; empty where there is nothing to write."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def bos_id(self) -> int:
        """The id that begins every document."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, where the vocabulary has one; stores do not use it."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the kind, of the model file's bytes, and of the begin and end tokens where those are others
        than the file alone would give."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without the begin token."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text as int32 arrays, on the calling thread alone."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text whose ids these are; begin and end tokens give nothing, broken UTF-8 a replacement character."""

    def save(self, path: Path) -> None:
        """Writes the model file."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 as the begin token."""

    kind = "bytes"
    file_name = ""
    vocab_size = 257
    bos_id = 256
    eos_id = None
    fingerprint = hashlib.sha256(b"bytes\0").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, path: Path) -> None:
        raise TokenizerError("the bytes tokenizer has no model file")


def _fingerprint(kind: str, data: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + data).hexdigest()


class _FileTokenizer:
    """What the tokenizers that live in one file share."""

    kind = ""

    def __init__(self, data: bytes):
        self._data = data
        self.fingerprint = _fingerprint(self.kind, data)

    def save(self, path: Path) -> None:
        write_atomically(path, self._data)


class SentencePieceTokenizer(_FileTokenizer):
    """A sentencepiece model (Kudo and Richardson 2018).

    Raises:
      TokenizerError: The bytes are no model, it has no begin token, or it changes text.
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, data: bytes):
        import sentencepiece

        super().__init__(data)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise TokenizerError(f"this is no sentencepiece model ({error})") from None
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int | None = self._model.eos_id() if self._model.eos_id() >= 0 else None
        if self.bos_id < 0:
            raise TokenizerError("the sentencepiece model has no begin token: train one with bos_id set")
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in WORD_MARK.encode()]
        self._mark_ids = [] if self._model.unk_id() in mark else mark
        _check_exact(self)

    def encode(self, text: str) -> list[int]:
        # A word mark in the text itself would come back as a space; as three bytes it comes back as it was.
        if WORD_MARK not in text or not self._mark_ids:
            return self._model.encode(text)
        first, *rest = (self._model.encode(part) for part in text.split(WORD_MARK))
        return first + [i for part in rest for i in (*self._mark_ids, *part)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The model's own batch call does no more than a loop on one thread, and returns lists all the same.
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer(_FileTokenizer):
    """A `tokenizer.json` read by the `tokenizers` library.

    Special tokens that occur in a document are text like any other there.

    Args:
      ends: What the file does not say. Where nothing is said, a special token of one of the usual names counts.

    Raises:
      TokenizerError: The file is no tokenizer, its begin token is not known, or it changes text.
    """

    kind = "huggingface"
    file_name = "tokenizer.json"

    def __init__(self, data: bytes, ends: Ends | None = None):
        import tokenizers

        super().__init__(data)
        ends = ends or Ends()
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"this is no tokenizer.json ({error})") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        # Pieces of these names may be text like any other: Gemma's <s> is a tag of HTML.
        added = self._model.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        begin = next((special[name] for name in BEGIN_TOKENS if name in special), None)
        end = next((special[name] for name in END_TOKENS if name in special), None)
        bos_id = self._first(ends.begin, begin)
        if bos_id is None:
            raise TokenizerError(
                "nothing says which token of the tokenizer.json begins a text (it has no begin token of a usual name: "
                f'{", ".join(BEGIN_TOKENS)}); name it in a tokenizer_config.json beside it: {{"bos_token": "..."}}'
            )
        self.bos_id: int = bos_id
        self.eos_id: int | None = self._first(ends.end, end)
        if (self.bos_id, self.eos_id) != (begin, end):
            self.fingerprint = _fingerprint(self.kind, data + f"\0{self.bos_id} {self.eos_id}".encode())
        _check_exact(self)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        ends = (self.bos_id, self.eos_id)
        return self._model.decode([int(i) for i in ids if i not in ends], skip_special_tokens=False)

    def _first(self, said: tuple[str | int, ...], usual: int | None) -> int | None:
        """The id of the first of these names and ids that there is."""
        numbers = (self._model.token_to_id(token) if isinstance(token, str) else token for token in said)
        known = (i for i in numbers if i is not None and self._model.id_to_token(i) is not None)
        return next(known, usual)


KINDS: dict[str, Any] = {
    "sentencepiece": SentencePieceTokenizer,
    "huggingface": HuggingFaceTokenizer,
    "bytes": ByteTokenizer,
}


def load_tokenizer(kind: str, path: str | Path, *, ends: Ends | None = None) -> Tokenizer:
    """Loads a tokenizer from its file, or from the folder of a model that it came with (`bytes` has none).

    Args:
      kind: One of KINDS.
      path: Of the file or folder.
      ends: Of a tokenizer.json, which does not say them; None: as the settings beside it say.

    Raises:
      TokenizerError: The kind is unknown, or the file is missing or unfit.
    """
    if kind not in KINDS:
        raise TokenizerError(f"there is no tokenizer kind {kind!r}: choose from {', '.join(KINDS)}")
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    if Path(path).is_dir():
        path = _in_folder(kind, Path(path))
    try:
        data = Path(path).read_bytes()
        if kind != HuggingFaceTokenizer.kind:
            return KINDS[kind](data)
        return HuggingFaceTokenizer(data, ends or _ends_beside(Path(path)))
    except OSError as error:
        raise TokenizerError(f"the {kind} tokenizer {path} cannot be read: {error.strerror}") from None
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def _ends_beside(file: Path) -> Ends:
    """What the settings beside a tokenizer.json say: a token by name, or else by the id that its model has for it, or
    that it has in the store which the file is from."""
    names = ("tokenizer_config", "config", "generation_config", "manifest")
    named, *models, manifest = (_settings(file.with_name(f"{name}.json")) for name in names)
    store: Any = manifest.get("tokenizer")
    store = store if isinstance(store, dict) else {}

    def said(name: str) -> tuple[str | int, ...]:
        token = named.get(f"{name}_token")
        found = [token.get("content") if isinstance(token, dict) else token]
        for number in (*(model.get(f"{name}_token_id") for model in models), store.get(f"{name}_id")):
            found += number if isinstance(number, list) else [number]
        return tuple(entry for entry in found if isinstance(entry, str | int))

    return Ends(said("bos"), said("eos"))


def _settings(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{file} is no JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _in_folder(kind: str, folder: Path) -> Path:
    """The file of a kind of tokenizer in a Hugging Face folder, or in a converted model, which keeps it in `hf`."""
    places = [folder, folder / "hf"]
    found = next((place / KINDS[kind].file_name for place in places if (place / KINDS[kind].file_name).is_file()), None)
    if found is None:
        others = [
            name
            for name, other in KINDS.items()
            if other.file_name and any((place / other.file_name).is_file() for place in places)
        ]
        hint = f"; it has one of data.tokenizer.kind={others[0]}" if others else ""
        raise TokenizerError(f"{folder} has no {KINDS[kind].file_name}{hint}")
    return found


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a byte-pair model (Sennrich et al. 2016) that suits code and prose; gives the model file's bytes.

    Pieces may hold runs of spaces, and line breaks with what follows them, but never cross into a line: on Python
    code that takes a third fewer tokens than sentencepiece's own rules (see docs/data.md). The result depends on the
    texts and their order alone, not on the machine's cores.

    Raises:
      TokenizerError: The vocabulary does not fit the text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=2,
            **TRAINING,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"a tokenizer of {vocab_size} pieces cannot be trained on this text ({str(error).strip()}): "
            "set model.vocab_size to fit the text (at least 512, and fewer for a small corpus), or use "
            "data.tokenizer.kind=bytes"
        ) from None
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines that begin with their line breaks, so that a piece holds a break only where a line begins."""
    for text in texts:
        # The trainer refuses zeros and takes word marks for spaces.
        clean = text.replace("\0", "").replace(WORD_MARK, "")
        for line in re.split(r"(?<=[^\n])(?=\n)", clean):
            yield from (line[i : i + LONGEST_LINE] for i in range(0, len(line), LONGEST_LINE))


def _check_exact(tokenizer: Tokenizer) -> None:
    """Raises TokenizerError where a tokenizer changes text."""
    back = tokenizer.decode(tokenizer.encode(PROBE))
    if back != PROBE:
        raise TokenizerError(
            f"the tokenizer changes text ({PROBE!r} comes back as {back!r}), and bits per byte need it exact: give one "
            "without normalisation, or leave data.tokenizer.path empty to train one"
        )
