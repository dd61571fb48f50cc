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
from maxlm.infer.sampling import Sampling, sample
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


def generate(
    model: RunnableModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    A row's draws depend on `key`, its index among the prompts and the position of the token that is drawn, not on the
    other prompts. Compiled programs are kept for a model, a sampling and rounded lengths.

    Args:
      prompts: token ids, with the begin token that the model was trained with; none is empty.
      max_new_tokens: at most this many tokens are added to each prompt.
      key: a typed random key; not used at temperature 0.
      stop_ids: a row ends before one of these.
      vocab_size: only ids below this are drawn, for models with more rows than the tokenizer has ids; None: all.
      on_token: called with (row, token) as tokens are drawn, in order of position.

    Returns:
      The new tokens of each row, without the one that ended it.

    Raises:
      ValueError: for no prompt, an empty one, one with an id that the model does not have, or no token to add.
    """
    _check(prompts, max_new_tokens, model.config.vocab_size)
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
    drawn = advance(jnp.asarray(tokens), cache)
    for left in reversed(range(max_new_tokens)):
        ahead = advance(drawn.tokens, drawn.cache) if left else drawn
        for row, token in enumerate(jax.device_get(drawn.tokens)[:, 0].tolist()):
            if token in stop_ids:
                running.discard(row)
            if row in running:
                out[row].append(token)
                if on_token is not None:
                    on_token(row, token)
        if not running:
            break
        drawn = ahead
    return out


def generate_text(
    model: RunnableModel,
    prompts: Sequence[str],
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continues every prompt as a document of its own, until a begin or end token or `max_new_tokens`.

    Args:
      prompts: may be empty texts; the begin token is put in front.
      on_text: called with (row, piece) as soon as a piece ends with a whole character; a row's pieces, joined, are its
        result.
      The rest is as for `generate`.

    Returns:
      The continuations, without the prompts.
    """
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    streams = [TextStream(tokenizer, context=row) for row in ids]
    texts: list[list[str]] = [[] for _ in prompts]

    def tell(row: int, piece: str) -> None:
        if piece:
            texts[row].append(piece)
            if on_text is not None:
                on_text(row, piece)

    generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        stop_ids=[token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None],
        vocab_size=tokenizer.vocab_size,
        on_token=lambda row, token: tell(row, streams[row].push(token)),
    )
    for row, stream in enumerate(streams):
        tell(row, stream.finish())
    return ["".join(pieces) for pieces in texts]


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
    jax.jit, static_argnames=("graphdef", "runtime", "sampling", "vocab_size"), donate_argnames=("cache",)
)
def _advance(
    params: Any,
    tokens: jax.Array,
    cache: Cache,
    *,
    keys: jax.Array,
    graphdef: Any,
    runtime: Runtime,
    sampling: Sampling,
    vocab_size: int,
) -> _Drawn:
    """Takes tokens (B, t) into the cache and draws the one that follows; keys (B,) are the rows' own."""
    model = merge(graphdef, params)
    out = model.decode(tokens, cache=cache, runtime=runtime)
    logits = model.logits(out.hidden[:, -1:])[:, 0, :vocab_size]
    position = out.cache.used - out.cache.padding
    drawn = sample(logits, jax.vmap(jax.random.fold_in)(keys, position), settings=sampling)
    return _Drawn(drawn[:, None], out.cache)


def _rounded(length: int) -> int:
    """The next power of two from 16 on, and from 256 on the next multiple of 256."""
    if length > 256:
        return -(-length // 256) * 256
    return max(16, 1 << (length - 1).bit_length())


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int) -> None:
    if not prompts:
        raise ValueError("there is no prompt to continue; give at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but it has to be at least 1")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no token; begin it with the tokenizer's begin token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"prompt {row} has ids from {min(prompt)} to {max(prompt)}, but the model has 0 to {vocab_size - 1}; "
                "encode it with the model's own tokenizer"
            )
