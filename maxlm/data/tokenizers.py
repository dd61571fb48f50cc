"""Text to tokens and back, exactly: sentencepiece, Hugging Face `tokenizer.json` and plain bytes.

A tokenizer here gives back the very text that it was given; stores rely on it (held-out bytes are decoded from
tokens). Ids are below `vocab_size`; a document in a store is `[bos_id] + encode(text)`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maxlm.errors import UserError
from maxlm.files import write_atomically

# Sentencepiece writes a space as this character and reads it back as a space.
WORD_MARK = "\u2581"
# What the begin and end tokens are called in tokenizer.json files, which do not say which of theirs they are.
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
        """SHA-256 (hex) of the kind and of the model file's bytes."""

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


def fingerprint(kind: str, data: bytes) -> str:
    """The fingerprint of a tokenizer of this kind with these bytes as its model file."""
    return hashlib.sha256(kind.encode() + b"\0" + data).hexdigest()


class _FileTokenizer:
    """What the tokenizers that live in one file share."""

    kind = ""

    def __init__(self, data: bytes):
        self._data = data
        self.fingerprint = fingerprint(self.kind, data)

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

    Raises:
      TokenizerError: The file is no tokenizer, has none of the known begin tokens, or changes text.
    """

    kind = "huggingface"
    file_name = "tokenizer.json"

    def __init__(self, data: bytes):
        import tokenizers

        super().__init__(data)
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"this is no tokenizer.json ({error})") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        begin = [vocabulary[token] for token in BEGIN_TOKENS if token in vocabulary]
        end = [vocabulary[token] for token in END_TOKENS if token in vocabulary]
        if not begin:
            raise TokenizerError(f"the tokenizer.json has no begin token, none of {', '.join(BEGIN_TOKENS)}: add one")
        self.bos_id: int = begin[0]
        self.eos_id: int | None = end[0] if end else None
        _check_exact(self)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        ends = (self.bos_id, self.eos_id)
        return self._model.decode([int(i) for i in ids if i not in ends], skip_special_tokens=False)


KINDS: dict[str, Any] = {
    "sentencepiece": SentencePieceTokenizer,
    "huggingface": HuggingFaceTokenizer,
    "bytes": ByteTokenizer,
}


def load_tokenizer(kind: str, path: str | Path) -> Tokenizer:
    """Loads a tokenizer from its file, or from the folder of a model that it came with (`bytes` has none).

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
        return KINDS[kind](Path(path).read_bytes())
    except OSError as error:
        raise TokenizerError(f"the {kind} tokenizer {path} cannot be read: {error.strerror}") from None
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


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
