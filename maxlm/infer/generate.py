"""Continuing prompts with a key-value cache.

Prompts of unequal length are padded on the left (see `model.decoder.Cache`). One jitted function does both the prefill
and a decoding step; the host loop hands the device step n + 1 before it reads the tokens of step n, so that streaming
to a terminal costs the device nothing. Lengths are rounded up, so that few programs are compiled.

Shapes: B rows (prompts), t new tokens, C cache slots, V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import ModelConfig
from maxlm.data.tokenizers import Tokenizer
from maxlm.errors import UserError
from maxlm.infer.sampling import Sampling, penalised, sample
from maxlm.model.decoder import Cache, init_cache, merge
from maxlm.model.runtime import Runtime

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""


class RunnableModel(NamedTuple):
    """A model with its values and the way it is run."""

    config: ModelConfig
    graphdef: Any  # from `split_model`
    params: Any  # nested dict of arrays
    runtime: Runtime  # its attention has to honour a cache: segments, and an offset of the queries


class _Drawn(NamedTuple):
    tokens: jax.Array  # (B, 1) int32
    cache: Cache
    seen: jax.Array | None  # (B, V) bool: tokens that a row has; None where no penalty asks for it


def generate(
    model: RunnableModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    A row's draws depend on `key`, its index among the prompts and the position of the token that is drawn, not on the
    other prompts: rotary positions that go by how long a text is (longrope, dynamic) go by how long the row itself may
    become. Compiled programs are kept for a model, a sampling and rounded lengths.

    Args:
      prompts: token ids, with the begin token that the model was trained with; none is empty.
      max_new_tokens: at most this many tokens are added to each prompt.
      key: a typed random key; not used at temperature 0.
      stop_ids: a row ends before one of these.
      vocab_size: only ids below this are drawn, for models with more rows than the tokenizer has ids; None: all.
      on_token: called with (row, token) as tokens are drawn, in order of position; True ends the row after it.

    Returns:
      The new tokens of each row, without the one that ended it.

    Raises:
      UserError: see `check_prompts`.
    """
    check_prompts(prompts, max_new_tokens, model=model.config)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = _rounded(int(lengths.max()))
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
    cache = init_cache(
        model.config,
        len(prompts),
        capacity=_rounded(width + max_new_tokens),
        dtype=model.runtime.dtype,
        padding=jnp.asarray(width - lengths),
        longest=jnp.asarray(lengths + max_new_tokens - 1),  # the last token that is drawn is not read
    )
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(len(prompts)))
    advance = functools.partial(
        _advance,
        model.params,
        keys=keys,
        graphdef=model.graphdef,
        runtime=model.runtime,
        sampling=sampling,
        vocab_size=vocab_size or model.config.vocab_size,
    )

    out: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    penalty = sampling.repetition_penalty != 1.0
    seen = jnp.zeros((len(prompts), vocab_size or model.config.vocab_size), bool) if penalty else None
    drawn = advance(jnp.asarray(tokens), cache, seen)
    for left in reversed(range(max_new_tokens)):
        ahead = advance(drawn.tokens, drawn.cache, drawn.seen) if left else drawn
        for row, token in enumerate(jax.device_get(drawn.tokens)[:, 0].tolist()):
            if token in stop_ids:
                running.discard(row)
            if row in running:
                out[row].append(token)
                if on_token is not None and on_token(row, token):
                    running.discard(row)
        if not running:
            break
        drawn = ahead
    return out


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, *, model: ModelConfig) -> None:
    """Sees, before anything is computed or loaded, that a model can continue prompts by so many tokens.

    Raises:
      UserError: for no prompt, an empty one, one with an id that the model does not have, no token to add, or more
        positions than the model has learned.
    """
    if not prompts:
        raise UserError("there is no prompt to continue; give at least one")
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} tokens are asked for, but it has to be at least 1")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} has no token, and its tokenizer no begin token to put there; give it a text")
        if min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise UserError(
                f"prompt {row} has ids from {min(prompt)} to {max(prompt)}, but the model has 0 to "
                f"{model.vocab_size - 1}; encode it with the model's own tokenizer"
            )
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    length, places = len(prompts[longest]), model.learned_positions
    if places and length + max_new_tokens - 1 > places:  # the last token that is drawn is not read
        most = places + 1 - length
        advice = f"ask for {most} at most (--max_tokens={most}, or eval.sample_tokens for a run's samples)"
        raise UserError(
            f"prompt {longest} has {length} tokens and {max_new_tokens} more are asked for, but the model has "
            f"{places} learned positions; {advice if most > 0 else f'give a prompt of {places} tokens at most'}"
        )


def check_stops(stops: Sequence[str]) -> None:
    """Raises UserError where a stop is empty."""
    if "" in stops:
        raise UserError("a stop is empty, which would end every text at once; leave --stop='' out, or give it a text")


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Each text, which may be empty, as the beginning of a document."""
    return [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]


def generate_text(
    model: RunnableModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    stop_ids: Collection[int] | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continues every prompt until a stop or `max_new_tokens`.

    Args:
      prompts: token ids, as `encode_prompts` makes them.
      stop_ids: a row ends before one of these; None: the tokenizer's begin and end tokens.
      stop: a row ends before the first of these texts.
      on_text: called with (row, piece) as soon as a piece ends with a whole character and cannot be the beginning of a
        stop; a row's pieces, joined, are its result.
      The rest is as for `generate`.

    Returns:
      The continuations, without the prompts.

    Raises:
      UserError: see `check_prompts` and `check_stops`.
    """
    if stop_ids is None:
        stop_ids = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None]
    streams = [TextStream(tokenizer, context=row) for row in prompts]
    ends = [StopTexts(stop) for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]

    def tell(row: int, piece: str) -> None:
        if piece:
            texts[row].append(piece)
            if on_text is not None:
                on_text(row, piece)

    def push(row: int, token: int) -> bool:
        tell(row, ends[row].push(streams[row].push(token)))
        return ends[row].found

    generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        stop_ids=stop_ids,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
        on_token=push,
    )
    for row, stream in enumerate(streams):
        tell(row, ends[row].push(stream.finish()))
        tell(row, ends[row].finish())
    return ["".join(pieces) for pieces in texts]


class StopTexts:
    """Passes text on up to the first of the stops, and holds back what may be the beginning of one.

    Raises:
      UserError: see `check_stops`.
    """

    def __init__(self, stops: Sequence[str]):
        check_stops(stops)
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What has become certain; nothing once a stop was found."""
        if self.found:
            return ""
        self._held += piece
        starts = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        back = max((self._beginning(stop) for stop in self._stops), default=0)
        certain = self._held[: len(self._held) - back]
        self._held = self._held[len(certain) :]
        return certain

    def finish(self) -> str:
        """What was held back, where no stop came."""
        return "" if self.found else self._held

    def _beginning(self, stop: str) -> int:
        """How many characters at the end of what is held begin this stop."""
        return next((n for n in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStream:
    """Tokens to text, a piece at a time, never cutting a character whose bytes lie in several tokens.

    Args:
      context: the ids before the first one pushed: how a token is written may hang on what stands before it.
    """

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(context)  # from the beginning of the last piece told on
        self._told = len(self._ids)  # how many of them have been told

    def push(self, token: int) -> str:
        """The text that has become certain; empty while a character lacks bytes."""
        self._ids.append(token)
        fresh = self._fresh()
        if not fresh or fresh.endswith(BROKEN):
            return ""
        return self._tell(fresh)

    def finish(self) -> str:
        """What is left; bytes that never became a character are told as U+FFFD."""
        return self._tell(self._fresh())

    def _fresh(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._told])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _tell(self, fresh: str) -> str:
        # The piece told now is the context of the next: all that came before it would be decoded in vain.
        self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        return fresh


@functools.partial(
    jax.jit, static_argnames=("graphdef", "runtime", "sampling", "vocab_size"), donate_argnames=("cache", "seen")
)
def _advance(
    params: Any,
    tokens: jax.Array,
    cache: Cache,
    seen: jax.Array | None,
    *,
    keys: jax.Array,
    graphdef: Any,
    runtime: Runtime,
    sampling: Sampling,
    vocab_size: int,
) -> _Drawn:
    """Takes tokens (B, t) into the cache and draws the one that follows; keys (B,) are the rows' own."""
    if seen is not None:
        slots = cache.used + jnp.arange(tokens.shape[1])
        known = jnp.where(slots >= cache.padding[:, None], tokens, seen.shape[1])  # padding is dropped as out of range
        seen = seen.at[jnp.arange(len(tokens))[:, None], known].set(True, mode="drop")
    model = merge(graphdef, params)
    out = model.decode(tokens, cache=cache, runtime=runtime)
    logits = model.logits(out.hidden[:, -1:])[:, 0, :vocab_size]
    if seen is not None:
        logits = penalised(logits, seen, sampling.repetition_penalty)
    position = out.cache.used - out.cache.padding
    drawn = sample(logits, jax.vmap(jax.random.fold_in)(keys, position), settings=sampling)
    return _Drawn(drawn[:, None], out.cache, seen)


def _rounded(length: int) -> int:
    """The next power of two from 16 on, and from 256 on the next multiple of 256."""
    if length > 256:
        return -(-length // 256) * 256
    return max(16, 1 << (length - 1).bit_length())
