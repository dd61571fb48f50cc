"""Generation with the cache against a naive loop over whole forward passes; batches, seeds, stops and text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from maxlm.errors import UserError
from maxlm.infer.generate import (
    RunnableModel,
    StopTexts,
    TextStream,
    check_prompts,
    encode_prompts,
    generate,
    generate_text,
)
from maxlm.infer.sampling import Sampling
from maxlm.model.decoder import merge, split_model
from maxlm.model.runtime import Runtime
from maxlm.tree import map_paths

VOCAB, BOS = 64, 63
GREEDY, WARM = Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=40)
PROMPTS = [[BOS, 5, 9], [BOS], [BOS, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]


@pytest.fixture(scope="module")
def model():
    """Two kv heads for four query heads; one layer sees six tokens, the other all."""
    config = ModelConfig(
        vocab_size=VOCAB,
        embed_dim=32,
        num_layers=2,
        attention=AttentionConfig(q_heads=4, kv_heads=2, head_dim=8, windows=(6, 0)),
        mlp=MlpConfig(dim=48),
    )
    parts, rng = split_model(config), np.random.default_rng(0)

    def value(_path, spec):  # NumPy, because compiling JAX's own initialisation takes longer than the tests
        return jnp.asarray(rng.normal(0, 0.2, spec.shape), jnp.float32) + (spec.role == "vector")

    return RunnableModel(config, parts.graphdef, map_paths(value, parts.specs), Runtime())


@pytest.fixture(scope="module")
def naive_logits(model):
    """Next-token logits by a whole forward pass over one prompt, in a row of fixed length."""

    @jax.jit
    def forward(params, tokens):
        decoder = merge(model.graphdef, params)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        out = decoder.hidden(tokens, positions_BS=positions, segments_BS=None, runtime=model.runtime)
        return decoder.logits(out.hidden_BSD)

    def logits(ids):
        row = np.zeros((1, 64), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(forward(model.params, row))[0, len(ids) - 1]

    return logits


def run(model, prompts, *, count=20, sampling=GREEDY, seed=0, **rest):
    return generate(model, prompts, max_new_tokens=count, sampling=sampling, key=jax.random.key(seed), **rest)


def test_greedy_is_the_argmax_of_whole_forward_passes(model, naive_logits):
    for prompt, new in zip(PROMPTS, run(model, PROMPTS), strict=True):
        ids = list(prompt)
        for _ in range(20):
            ids.append(int(naive_logits(ids).argmax()))
        assert new == ids[len(prompt) :]
        assert len(set(new)) > 3  # a constant would be no proof


def test_longrope_goes_by_what_a_row_comes_to_have_and_not_by_the_room_that_is_made(model):
    """19 tokens and 6 more read 24 positions, as many as the original length: short factors, as in transformers."""
    rope = RopeConfig(
        scaling="longrope", factor=4.0, original_length=24, short_factors=(1.0,) * 4, long_factors=(2.0, 8.0, 8.0, 8.0)
    )
    config = dataclasses.replace(model.config, rope=rope)
    stretched = model._replace(config=config, graphdef=split_model(config).graphdef)

    @jax.jit
    def logits(tokens, longest):
        decoder, positions = merge(stretched.graphdef, model.params), jnp.arange(32, dtype=jnp.int32)[None]
        given = {"positions_BS": positions, "segments_BS": None, "runtime": model.runtime, "longest": longest}
        return decoder.logits(decoder.hidden(tokens, **given).hidden_BSD)[0]

    def naive(longest):
        ids = list(PROMPTS[2])
        for _ in range(6):
            row = np.zeros((1, 32), np.int32)
            row[0, : len(ids)] = ids
            ids.append(int(logits(row, longest)[len(ids) - 1].argmax()))
        return ids[len(PROMPTS[2]) :]

    assert naive(24) != naive(25)
    assert run(stretched, PROMPTS[2:], count=6)[0] == naive(24)
    assert run(stretched, PROMPTS[2:], count=7)[0][:6] == naive(25)
    short = PROMPTS[0] + PROMPTS[1]  # and not by what another row comes to have
    assert run(stretched, [PROMPTS[2], short], count=7)[1] == run(stretched, [short], count=7)[0]
    assert run(stretched, [PROMPTS[2], short], count=7)[1] != run(stretched, [short], count=24)[0][:7]


def test_a_prompt_does_not_feel_the_others(model):
    together = run(model, PROMPTS)
    assert together == [run(model, [prompt])[0] for prompt in PROMPTS]


def test_a_rows_draws_hang_on_seed_row_and_position_only(model):
    first = run(model, PROMPTS, sampling=WARM)
    assert run(model, PROMPTS, sampling=WARM) == first
    assert run(model, PROMPTS, sampling=WARM, seed=1) != first
    assert run(model, PROMPTS[:2], sampling=WARM) == first[:2]
    same = run(model, [PROMPTS[0]] * 2, sampling=WARM)
    assert same[0] != same[1]
    # Continuing a continuation draws what one run would have drawn.
    head = first[0][:7]
    assert run(model, [PROMPTS[0] + head, *PROMPTS[1:]], count=13, sampling=WARM)[0] == first[0][7:]


def test_filters_and_the_limit_on_ids_reach_the_draws(model):
    free = run(model, PROMPTS, sampling=Sampling(temperature=1.0, top_k=1), vocab_size=10)
    assert max(max(row) for row in free) < 10
    assert run(model, PROMPTS, sampling=Sampling(temperature=1.0, top_k=1), vocab_size=10, seed=1) == free


def test_a_stop_ends_its_row_and_no_other(model):
    free = run(model, PROMPTS)
    stop = free[0][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    told = [[] for _ in PROMPTS]
    stopped = run(model, PROMPTS, stop_ids={stop}, on_token=lambda row, token: told[row].append(token))
    assert stopped == expected == told
    assert len(stopped[0]) <= 4


def test_one_token_and_an_early_end_of_all_rows(model):
    free = run(model, PROMPTS, count=1)
    assert [len(row) for row in free] == [1, 1, 1]
    assert run(model, PROMPTS, stop_ids={row[0] for row in free}) == [[], [], []]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 1, "no prompt"),
        ([[1], []], 1, "prompt 1 has no token"),
        ([[VOCAB]], 1, "0 to 63"),
        ([[1]], 0, "at least 1"),
    ],
)
def test_what_cannot_be_continued_is_refused(model, prompts, count, message):
    with pytest.raises(UserError, match=message):
        run(model, prompts, count=count)


def test_learned_positions_are_not_overrun(model):
    learned = model._replace(config=dataclasses.replace(model.config, learned_positions=12))
    prompts = [[BOS], [BOS, 1, 2, 3, 4]]
    message = r"prompt 1 has 5 tokens and 9 more are asked for, but the model has 12 learned positions; ask for 8 at"
    with pytest.raises(UserError, match=message):
        run(learned, prompts, count=9)
    check_prompts(prompts, 8, model=learned.config)  # 5 + 8 - 1: the last token drawn is not read
    with pytest.raises(UserError, match="give a prompt of 12 tokens at most"):
        run(learned, [[BOS] * 13], count=1)


class Pieces:
    """A tokenizer whose ids stand for given byte strings; broken bytes become U+FFFD, the begin token nothing."""

    def __init__(self, pieces):
        self.pieces = [*pieces, b""]
        self.vocab_size, self.bos_id, self.eos_id = len(self.pieces), len(pieces), None

    def encode(self, text):
        return [self.pieces.index(bytes([byte])) for byte in text.encode()]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


BYTES = Pieces([bytes([byte]) for byte in range(256)])


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=12), st.text(max_size=6), st.lists(st.integers(1, 40), max_size=20))
def test_a_stream_tells_whole_characters_and_loses_nothing(text, context, cuts):
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    tokenizer = Pieces([context.encode(), *pieces])
    stream = TextStream(tokenizer, context=[0])
    told = [stream.push(i + 1) for i in range(len(pieces))]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in told)
        assert stream.finish() == ""
        assert "".join(told) == text
    else:
        assert "".join(told) + stream.finish() == text


def test_a_stream_tells_characters_as_soon_as_they_are_whole():
    stream = TextStream(BYTES, context=[])
    assert [stream.push(byte) for byte in "aé→b".encode()] == ["a", "", "é", "", "", "→", "b"]


def test_a_stream_ends_with_what_never_became_a_character():
    stream = TextStream(BYTES, context=[])
    assert [stream.push(byte) for byte in b"a\xe2\x86"] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_text_is_what_the_tokens_say(model):
    tokenizer = Pieces([bytes([byte]) for byte in range(64)])
    tokenizer.bos_id = BOS
    tokenizer.vocab_size = VOCAB
    prompts = ["\x05\x09", ""]
    told = [[], []]
    texts = generate_text(
        model,
        encode_prompts(tokenizer, prompts),
        tokenizer=tokenizer,
        max_new_tokens=20,
        sampling=WARM,
        key=jax.random.key(3),
        on_text=lambda row, piece: told[row].append(piece),
    )
    ids = run(model, [[BOS, 5, 9], [BOS]], sampling=WARM, seed=3, stop_ids={BOS})
    assert texts == [tokenizer.decode(row) for row in ids] == ["".join(row) for row in told]


def test_a_stop_text_ends_a_row_before_it_and_is_never_shown(model):
    tokenizer = Pieces([bytes([byte]) for byte in range(64)])
    tokenizer.bos_id, tokenizer.vocab_size = BOS, VOCAB
    settings = {"tokenizer": tokenizer, "max_new_tokens": 20, "sampling": WARM, "key": jax.random.key(3)}
    free = generate_text(model, [[BOS, 5, 9], [BOS]], **settings)
    stop = free[0][6:9]
    told = [[], []]
    texts = generate_text(
        model, [[BOS, 5, 9], [BOS]], stop=[stop], on_text=lambda row, piece: told[row].append(piece), **settings
    )
    assert texts == [text.split(stop)[0] for text in free] == ["".join(row) for row in told]
    assert len(texts[0]) < len(free[0])


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_stop_texts_pass_on_all_that_comes_before(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends, told = StopTexts(stops), ""
    for piece in pieces:
        told += ends.push(piece)
        assert not any(stop in told for stop in stops)
    told += ends.finish()
    # Text is passed on as it comes: of two stops, the one that is whole first counts.
    whole = [min((i for i in range(len(text) + 1) if text[:i].endswith(stop)), default=None) for stop in stops]
    assert ends.found == any(end is not None for end in whole)
    assert text.startswith(told) and (ends.found or told == text)
    if ends.found:
        assert any(text[len(told) :].startswith(stop) for stop in stops)


def test_a_repetition_penalty_counts_the_prompt_and_what_was_drawn(model, naive_logits):
    penalty = 1.7
    settings = Sampling(temperature=0.0, repetition_penalty=penalty)
    plain = run(model, PROMPTS)
    for prompt, new, without in zip(PROMPTS, run(model, PROMPTS, sampling=settings), plain, strict=True):
        ids = list(prompt)
        for _ in range(20):
            logits = naive_logits(ids).copy()
            for token in set(ids):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            ids.append(int(logits.argmax()))
        assert new == ids[len(prompt) :]
        assert len(set(new)) > len(set(without))
