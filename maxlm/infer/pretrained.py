"""Text in and out of a model that came from Hugging Face: its tokenizer, its begin and end tokens, its chat template.

Chat templates are programs that came with the weights. They are run by Jinja's sandbox, which keeps them from anything
but the messages, and only when a chat is asked for.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxlm.data.tokenizers import TokenizerError

_TOKENIZER, _PIECES = "tokenizer.json", "tokenizer.model"
_SETTINGS, _GENERATION, _CONFIG = "tokenizer_config.json", "generation_config.json", "config.json"
_TEMPLATE = "chat_template.jinja"
_PREFIX = ("[gMASK]", "sop")
"""Where a tokenizer has both, texts begin with them (GLM Team 2024)."""


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

            try:
                self._pieces = sentencepiece.SentencePieceProcessor(model_proto=(folder / _PIECES).read_bytes())
            except RuntimeError as error:
                raise TokenizerError(
                    f"{folder / _PIECES} is no sentencepiece model ({error}); put a {_TOKENIZER} there"
                ) from None
            self.vocab_size = max([self._pieces.get_piece_size() - 1, *self._added().values()]) + 1
        else:
            raise TokenizerError(f"{folder} has no {_TOKENIZER} and no {_PIECES}; put its tokenizer there")
        generation, config = _json(folder / _GENERATION), _json(folder / _CONFIG)
        self.stop_ids = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
        if not self.stop_ids and (end := self._id(self._special("eos_token"))) is not None:
            self.stop_ids = [end]

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the begin token that the model is used to.

        Raises:
          TokenizerError: nothing says what texts begin with.
        """
        if self._tokenizer is not None:
            ids, begin = self._tokenizer.encode(text).ids, self._id(self._special("bos_token"))
            # DeepSeek's tokenizer.json leaves it to the settings; newer versions of `transformers` do not look there.
            if begin is not None and self._settings.get("add_bos_token") and ids[:1] != [begin]:
                return [begin, *ids]
            return ids
        assert self._pieces is not None
        return [*self._beginning(), *self._pieces.encode(text)]

    def _beginning(self) -> list[int]:
        """What a sentencepiece model's texts begin with, which its file does not say."""
        assert self._pieces is not None
        added, settings = self._added(), self._settings
        if all(token in added for token in _PREFIX):
            return [added[token] for token in _PREFIX]
        own_code = "AutoTokenizer" in (settings.get("auto_map") or {})
        if own_code and "add_bos_token" not in settings and not self._special("bos_token"):
            raise TokenizerError(
                f"the tokenizer of {self._folder} is a program of its own ({settings.get('tokenizer_class')}), which "
                f"is not run, and {_SETTINGS} does not say what texts begin with: add add_bos_token there, or "
                f"{' and '.join(_PREFIX)} to added_tokens_decoder, or put a {_TOKENIZER} there"
            )
        begin = self._pieces.bos_id() if settings.get("add_bos_token", True) else -1
        return [begin] if begin >= 0 else []

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

        environment = _environment()
        marks = {name: self._special(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            template = environment.from_string(self._template())
            return template.render(messages=[dict(m) for m in messages], add_generation_prompt=True, **marks)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise TokenizerError(f"the chat template of {self._folder} fails: {error}") from None

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written like this; None: there is none."""
        if self._tokenizer is not None:
            added = self._tokenizer.get_added_tokens_decoder()
            return next((i for i, token in added.items() if token.special and token.content == text), None)
        number = self._id(text)
        return number if number is not None and (text in self._added() or self._is_control(number)) else None

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


def _environment() -> Any:
    """Jinja's sandbox, with what templates written for `transformers` may call."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model has said, for training's sake; the text is as without it."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = to_json  # Jinja's own escapes what HTML needs escaped
    return environment


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{file} is no JSON: {error}") from None


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(i) for i in (value if isinstance(value, list) else [value])]
