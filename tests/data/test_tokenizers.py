"""Tokenizers give back exactly what they were given, refuse what cannot, and are trained the same every time."""

import hashlib
import io
import json
import random

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import StoreConfig
from maxlm.data.prepare import prepare_store
from maxlm.data.store import TokenStore
from maxlm.data.tokenizers import (
    WORD_MARK,
    ByteTokenizer,
    SentencePieceTokenizer,
    TokenizerError,
    load_tokenizer,
    train_sentencepiece,
)

CODE = [
    f"def name_{i}(self, value):\n    for item in value:\n        if item == {i}:\n            return item\n\n\n"
    f"class Thing{i % 7}:\n    def other(self):\n\t\tself.value = '{'ab' * (i % 5)}'\n"
    for i in range(200)
]
AWKWARD = [
    "",
    " ",
    "\n",
    "\0",
    WORD_MARK,
    f" {WORD_MARK} a{WORD_MARK}{WORD_MARK}",
    "<s>",
    "</s>",
    "<0x41>",
    "\u2585",
    "\r\n\t",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",))),
    st.lists(st.sampled_from([*AWKWARD, "def ", "    ", "self.", "\n        return", "é", "🙂"])).map("".join),
)


def byte_level() -> hf.Tokenizer:
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CODE, trainer)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A trained model file of every kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "code.model").write_bytes(train_sentencepiece(CODE, 512))
    byte_level().save(str(folder / "tokenizer.json"))
    return {"sentencepiece": folder / "code.model", "huggingface": folder / "tokenizer.json", "bytes": ""}


@pytest.fixture(scope="module")
def loaded(files):
    return {kind: load_tokenizer(kind, path) for kind, path in files.items()}


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "bytes"])
def test_text_comes_back_exactly(loaded, kind):
    tokenizer = loaded[kind]

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.bos_id for i in ids)
        assert tokenizer.encode_batch([text, text])[1].tolist() == ids
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == text

    check()
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_does_not_depend_on_the_run_and_fills_the_vocabulary(files):
    again = train_sentencepiece(CODE, 512)
    assert again == files["sentencepiece"].read_bytes()
    assert SentencePieceTokenizer(again).vocab_size == 512
    shuffled = random.Random(0).sample(CODE, len(CODE) // 2)
    assert (
        SentencePieceTokenizer(train_sentencepiece(shuffled, 512)).fingerprint
        != SentencePieceTokenizer(again).fingerprint
    )


def test_pieces_hold_runs_of_spaces_and_never_cross_into_a_line(files):
    model = sentencepiece.SentencePieceProcessor(model_file=str(files["sentencepiece"]))
    pieces = [model.id_to_piece(i).replace(WORD_MARK, " ") for i in range(model.get_piece_size())]
    assert "    " in pieces
    assert not any(" " in piece.strip() for piece in pieces), "a piece holds more than one word"
    assert all("\n" not in piece.lstrip("\n") for piece in pieces)


def test_long_lines_zeros_and_word_marks_do_not_stop_training():
    texts = [*CODE, "x = '" + "0123456789" * 20_000 + "'\n", "a\0b", WORD_MARK * 50]
    assert SentencePieceTokenizer(train_sentencepiece(texts, 512)).vocab_size == 512


def test_a_folder_may_be_named_instead_of_its_file(loaded, tmp_path):
    for kind in ("sentencepiece", "huggingface"):
        (tmp_path / kind / "hf").mkdir(parents=True)
        loaded[kind].save(tmp_path / kind / loaded[kind].file_name)
        assert load_tokenizer(kind, tmp_path / kind).fingerprint == loaded[kind].fingerprint
        (tmp_path / kind / loaded[kind].file_name).rename(tmp_path / kind / "hf" / loaded[kind].file_name)
        assert load_tokenizer(kind, tmp_path / kind).fingerprint == loaded[kind].fingerprint
    with pytest.raises(TokenizerError, match="no tokenizer.model; it has one of data.tokenizer.kind=huggingface"):
        load_tokenizer("sentencepiece", tmp_path / "huggingface")
    with pytest.raises(TokenizerError, match="has no tokenizer.json$"):
        load_tokenizer("huggingface", tmp_path)


def test_fingerprints_tell_models_apart_and_survive_saving(loaded, tmp_path):
    assert len({tokenizer.fingerprint for tokenizer in loaded.values()}) == 3
    for kind in ("sentencepiece", "huggingface"):
        loaded[kind].save(tmp_path / loaded[kind].file_name)
        assert load_tokenizer(kind, tmp_path / loaded[kind].file_name).fingerprint == loaded[kind].fingerprint
    assert (loaded["bytes"].vocab_size, loaded["bytes"].bos_id, ByteTokenizer().encode("é")) == (257, 256, [195, 169])


def test_special_tokens_in_a_document_are_text(loaded):
    tokenizer = loaded["huggingface"]
    assert tokenizer.bos_id not in tokenizer.encode("a<s>b</s>")
    assert tokenizer.decode(tokenizer.encode("a<s>b</s>")) == "a<s>b</s>"


def of_bytes(*specials, plain=()):
    """A tokenizer.json: an id a byte, then pieces that are text like any other, then special tokens."""
    vocabulary = {sign: i for i, sign in enumerate([*sorted(hf.pre_tokenizers.ByteLevel.alphabet()), *plain])}
    model = hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    model.post_processor = hf.processors.ByteLevel(trim_offsets=False)
    model.add_tokens(list(plain))
    model.add_special_tokens([hf.AddedToken(token, special=True) for token in specials])
    return model


def test_the_ends_of_texts_are_special_tokens_or_those_that_the_settings_name(tmp_path):
    """Gemma has <s> and </s> as pieces of HTML."""
    model = of_bytes("<bos>", "<eos>", "<turn>", plain=["<s>", "</s>"])
    file = tmp_path / "tokenizer.json"
    model.save(str(file))
    bare = load_tokenizer("huggingface", tmp_path)
    assert (bare.bos_id, bare.eos_id) == tuple(map(model.token_to_id, ("<bos>", "<eos>"))) == (258, 259)
    assert bare.fingerprint == hashlib.sha256(b"huggingface\0" + file.read_bytes()).hexdigest()
    settings = tmp_path / "tokenizer_config.json"
    for said, expected in (
        ({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}, (258, 259)),
        ({"bos_token": "<bos>", "eos_token": {"content": "<turn>"}}, (258, 260)),
        ({"bos_token": "<turn>", "eos_token": None}, (260, 259)),
        ({"bos_token": "no such token"}, (258, 259)),
    ):
        settings.write_text(json.dumps(said))
        found = load_tokenizer("huggingface", tmp_path)
        assert (found.bos_id, found.eos_id) == expected
        assert (found.fingerprint == bare.fingerprint) == (expected == (258, 259))
    settings.write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer_config.json is no JSON"):
        load_tokenizer("huggingface", tmp_path)


def test_ends_of_unusual_names_are_known_from_the_settings_and_by_the_store(tmp_path):
    """DeepSeek's."""
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    of_bytes(begin, end).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match='no begin token.*tokenizer_config.json beside it: {"bos_token"'):
        load_tokenizer("huggingface", tmp_path)
    (tmp_path / "config.json").write_text('{"bos_token_id": 256, "eos_token_id": [257, 3]}')
    by_id = load_tokenizer("huggingface", tmp_path)
    (tmp_path / "config.json").write_text('{"bos_token_id": 999}')
    named = {"bos_token": {"content": begin}, "eos_token": end}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = load_tokenizer("huggingface", tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (by_id.bos_id, by_id.eos_id) == (256, 257)
    assert tokenizer.fingerprint == by_id.fingerprint
    # A store keeps the file alone, and knows the rest.
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}")
    entry = StoreConfig(source=f"text:{tmp_path}/text/*.txt", heldout_permille=0)
    store = prepare_store(entry, tokenizer, tmp_path / "store", workers=1).store
    store.verify()
    reopened = TokenStore.open(tmp_path / "store")
    for found in (reopened.tokenizer(), load_tokenizer("huggingface", tmp_path / "store")):
        assert (found.bos_id, found.eos_id, found.fingerprint) == (256, 257, tokenizer.fingerprint)
    assert reopened.split("train").document(0)[0] == 256


def test_a_tokenizer_that_changes_text_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE), model_writer=model, vocab_size=300, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    with pytest.raises(TokenizerError, match=r"lossy.model: the tokenizer changes text"):
        load_tokenizer("sentencepiece", tmp_path / "lossy.model")
    lower = byte_level()
    lower.normalizer = hf.normalizers.Lowercase()
    lower.save(str(tmp_path / "lower.json"))
    with pytest.raises(TokenizerError, match=r"changes text"):
        load_tokenizer("huggingface", tmp_path / "lower.json")


def test_errors_are_one_clear_sentence(tmp_path):
    with pytest.raises(
        TokenizerError, match=r"no tokenizer kind 'wordpiece': choose from sentencepiece, huggingface, bytes"
    ):
        load_tokenizer("wordpiece", "")
    with pytest.raises(TokenizerError, match=r"none.model cannot be read: No such file"):
        load_tokenizer("sentencepiece", tmp_path / "none.model")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(TokenizerError, match=r"no sentencepiece model"):
        load_tokenizer("sentencepiece", tmp_path / "junk")
    with pytest.raises(TokenizerError, match=r"no tokenizer.json"):
        load_tokenizer("huggingface", tmp_path / "junk")
    nameless = hf.Tokenizer(hf.models.BPE(vocab={"a": 0}, merges=[]))
    nameless.save(str(tmp_path / "nameless.json"))
    with pytest.raises(TokenizerError, match=r"no begin token"):
        load_tokenizer("huggingface", tmp_path / "nameless.json")
    with pytest.raises(TokenizerError, match=r"50000 pieces cannot be trained on this text"):
        train_sentencepiece(CODE[:3], 50_000)
    with pytest.raises(TokenizerError, match=r"100 pieces cannot be trained on this text"):
        train_sentencepiece(CODE[:3], 100)
