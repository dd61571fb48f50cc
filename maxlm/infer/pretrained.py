"""Text in and out of a model that came from Hugging Face: its tokenizer, its begin and end tokens, its chat template.

Chat templates are programs that came with the weights. They are run by Jinja's sandbox, which keeps them from anything
but the messages, and only when a chat is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxlm.data.tokenizers import TokenizerError

_TOKENIZER, _PIECES = "tokenizer.json", "tokenizer.model"
_SETTINGS, _GENERATION, _CONFIG = "tokenizer_config.json", "generation_config.json", "config.json"
_TEMPLATE = "chat_template.jinja"


class PretrainedText:
    """The files of a folder that say how text becomes tokens for its model, and back.

    Raises:
      TokenizerError: there is no tokenizer in the folder, or it cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._settings = _json(folder / _SETTINGS)
        self._tokenizer, self._pieces = None, None
        if (folder / _TOKENIZER).is_file():
            import tokenizers

            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))
            except Exception as error:  # the library raises bare Exception
                raise TokenizerError(f"{folder / _TOKENIZER} is no tokenizer ({error})") from None
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        elif (folder / _PIECES).is_file():
            import sentencepiece

            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=(folder / _PIECES).read_bytes())
            self.vocab_size = max([self._pieces.get_piece_size() - 1, *self._added().values()]) + 1
        else:
            raise TokenizerError(f"{folder} has no {_TOKENIZER} and no {_PIECES}; put its tokenizer there")
        generation, config = _json(folder / _GENERATION), _json(folder / _CONFIG)
        self.stop_ids = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
        if not self.stop_ids and (end := self._id(self._special("eos_token"))) is not None:
            self.stop_ids = [end]

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the begin token that the model is used to."""
        if self._tokenizer is not None:
            return self._tokenizer.encode(text).ids
        assert self._pieces is not None
        begin = [self._pieces.bos_id()] if self._settings.get("add_bos_token", True) else []
        return [i for i in begin if i >= 0] + self._pieces.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation up to where the model answers; each message has a `role` and a `content`.

        Raises:
          TokenizerError: there is no template, or it fails or refuses the messages.
        """
        text = self.render(messages)
        if self._tokenizer is not None:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        assert self._pieces is not None
        specials = self._added() | {
            self._pieces.id_to_piece(i): i for i in range(self.vocab_size) if self._is_control(i)
        }
        marks = "|".join(re.escape(mark) for mark in sorted(specials, key=len, reverse=True)) or r"(?!)"
        ids: list[int] = []
        for part in re.split(f"({marks})", text):
            ids += [specials[part]] if part in specials else self._pieces.encode(part)
        return ids

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the template writes it, up to where the model answers."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        marks = {name: self._special(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            template = environment.from_string(self._template())
            return template.render(messages=[dict(m) for m in messages], add_generation_prompt=True, **marks)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise TokenizerError(f"the chat template of {self._folder} fails: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text, without special tokens."""
        if self._tokenizer is not None:
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        assert self._pieces is not None
        return self._pieces.decode([int(i) for i in ids if i < self._pieces.get_piece_size()])

    def _template(self) -> str:
        if (self._folder / _TEMPLATE).is_file():
            return (self._folder / _TEMPLATE).read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise TokenizerError(
                f"{self._folder} has no chat template (neither {_TEMPLATE} nor chat_template in {_SETTINGS}); "
                "generate without --chat"
            )
        return template

    def _special(self, name: str) -> str:
        value = self._settings.get(name)
        return str((value or {}).get("content", "") if isinstance(value, dict | None) else value)

    def _added(self) -> dict[str, int]:
        entries = self._settings.get("added_tokens_decoder") or {}
        return {entry["content"]: int(number) for number, entry in entries.items()}

    def _id(self, token: str) -> int | None:
        if not token:
            return None
        if self._tokenizer is not None:
            return self._tokenizer.token_to_id(token)
        assert self._pieces is not None
        return self._added().get(token, self._pieces.piece_to_id(token))

    def _is_control(self, number: int) -> bool:
        assert self._pieces is not None
        return number < self._pieces.get_piece_size() and self._pieces.is_control(number)


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{file} is no JSON: {error}") from None


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(i) for i in (value if isinstance(value, list) else [value])]
