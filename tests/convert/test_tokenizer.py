"""A tokenizer that is written for `transformers` gives the ids that it gives here."""

import json

import pytest
from tokenizers import Tokenizer as Pipeline

from maxlm.convert.tokenizer import holds_tokenizer, remove_tokenizer, write_tokenizer
from maxlm.data.tokenizers import (
    KINDS,
    PROBE,
    ByteTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from maxlm.infer.pretrained import PretrainedText
from tests.data.test_tokenizers import CODE, byte_level

TEXTS = [
    PROBE,
    *CODE[:5],
    "",
    " ",
    "\n\n\n",
    "a  b\t\tc   ",
    "über 你好 🙂 \x00\x7f",
    "aaaaaaa return returned\n        self.",
]


def made(kind):
    if kind == "bytes":
        return ByteTokenizer()
    data = train_sentencepiece(CODE, 600) if kind == "sentencepiece" else byte_level().to_str().encode()
    return KINDS[kind](data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_give_the_same_ids(kind, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="NOT tested with transformers: pip install -e '.[parity]'"
    )
    ours = made(kind)
    write_tokenizer(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.bos_token_id == ours.bos_id and theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text), text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs(TEXTS[0])["input_ids"] == [ours.bos_id, *ours.encode(TEXTS[0])]
    assert PretrainedText(tmp_path).encode(TEXTS[0]) == [ours.bos_id, *ours.encode(TEXTS[0])]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_one_that_begins_texts_by_itself_is_written_to_the_byte(tmp_path):
    model = byte_level()
    first = KINDS["huggingface"](model.to_str().encode())
    write_tokenizer(first, tmp_path)  # with a template, which it did not have
    assert not holds_tokenizer(tmp_path, first.fingerprint)
    again = load_tokenizer("huggingface", tmp_path)
    assert (again.bos_id, again.encode(PROBE)) == (first.bos_id, first.encode(PROBE))
    (tmp_path / "there").mkdir()
    write_tokenizer(again, tmp_path / "there")
    assert (tmp_path / "there/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert holds_tokenizer(tmp_path / "there", again.fingerprint)


def test_a_tokenizer_takes_the_place_of_another_and_of_its_own_it_keeps_what_is_said(tmp_path):
    first = made("huggingface")
    first.save(tmp_path / "tokenizer.json")
    assert holds_tokenizer(tmp_path, first.fingerprint)
    for name, text in {
        "tokenizer_config.json": json.dumps(
            {"chat_template": "T", "added_tokens_decoder": {}, "pad_token": "p", "eos_token": "<|eot_id|>"}
        ),
        "generation_config.json": '{"eos_token_id": [2, 3], "top_p": 0.5}',
        "chat_template.jinja": "T",
        "added_tokens.json": "{}",
    }.items():
        (tmp_path / name).write_text(text)
    assert not holds_tokenizer(tmp_path, made("sentencepiece").fingerprint)
    assert not holds_tokenizer(tmp_path, first.fingerprint)  # which, by itself, ends with another token

    content = json.loads((tmp_path / "tokenizer.json").read_text())
    more = Pipeline.from_str(json.dumps(content))
    more.add_tokens(["<turn>"])
    grown = KINDS["huggingface"](more.to_str().encode())
    assert grown.vocab_size == first.vocab_size + 1
    assert remove_tokenizer(tmp_path, grown)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer_config.json",
    ]
    write_tokenizer(grown, tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["pad_token"] == "p" and "added_tokens_decoder" not in said
    assert (said["bos_token"], said["eos_token"]) == ("<s>", "<|eot_id|>")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 3]

    assert not remove_tokenizer(tmp_path, ByteTokenizer())
    assert [file.name for file in tmp_path.iterdir()] == ["generation_config.json"]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"top_p": 0.5}


def test_a_model_that_the_file_cannot_express_is_kept_as_it_is(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE * 3),
        model_writer=model,
        vocab_size=400,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    write_tokenizer(SentencePieceTokenizer(model.getvalue()), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert (tmp_path / "tokenizer.model").read_bytes() == model.getvalue()
