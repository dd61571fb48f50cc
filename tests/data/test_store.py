"""The store gives back what was written, over shards' edges too, and every damage is named."""

import json
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data import store as store_module
from maxlm.data.store import StoreError, StoreWriter, TokenStore, token_dtype
from maxlm.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece

BOS = ByteTokenizer.bos_id


def write(folder, documents, *, shard_tokens=2**28, tokenizer=None):
    """A store whose train split is `documents` (bytes) and whose held-out split is the first of them."""
    writer = StoreWriter(folder, tokenizer or ByteTokenizer(), shard_tokens=shard_tokens)
    for split, chosen in (("train", documents), ("heldout", documents[:1])):
        for document in chosen:
            tokens = np.array([BOS, *document])
            writer.add(split, tokens, lengths=[tokens.size], byte_lengths=[len(document)])
    writer.finish(heldout_permille=25, source={"spec": "none"}, skipped={"empty": 2})
    return TokenStore.open(folder)


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "store", [b"one", b"two two", b"three three three"], shard_tokens=8)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), documents=st.lists(st.binary(min_size=1, max_size=12), max_size=8), shard=st.integers(1, 40))
def test_read_gives_slices_of_the_joined_documents(tmp_path_factory, data, documents, shard):
    folder = tmp_path_factory.mktemp("store") / "s"
    split = write(folder, documents, shard_tokens=shard).split("train")
    flat = np.array([token for document in documents for token in (BOS, *document)], np.int32)
    start = data.draw(st.integers(0, flat.size))
    stop = data.draw(st.integers(start, flat.size))
    np.testing.assert_array_equal(split.read(start, stop), flat[start:stop])
    assert split.read(start, stop).dtype == np.int32
    assert [bytes(split.document(i)[1:].tolist()) for i in range(split.num_documents)] == documents
    assert split.byte_lengths.tolist() == [len(document) for document in documents]
    assert (split.num_tokens, split.num_bytes) == (flat.size, sum(map(len, documents)))
    shutil.rmtree(folder)


READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, int(sys.argv[2])))
from maxlm.data.store import StoreError, TokenStore
split = TokenStore.open(sys.argv[1]).split("train")
try:
    print(int(split.read(0, split.num_tokens).sum()))
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("hard", "said"), [(4096, str(90 * (BOS + ord("a")))), (64, "no more than 64 open; type `ulimit -n 65536`")]
)
def test_more_shards_than_a_shell_lets_a_process_open(tmp_path, hard, said):
    store = write(tmp_path / "many", [b"a"] * 90, shard_tokens=2)
    run = subprocess.run(
        [sys.executable, "-c", READ, str(store.path), str(hard)], capture_output=True, text=True, check=True
    )
    assert said in run.stdout, run


@pytest.mark.parametrize(
    ("allowed", "soft", "ends"), [(2**20, 256, 65536), (24576, 256, 10240), (24576, 20000, 20000), (256, 256, 256)]
)
def test_a_system_that_refuses_so_many_open_files_is_asked_for_fewer(monkeypatch, allowed, soft, ends):
    """As macOS does, where no hard limit is said and the kernel's own is lower."""
    limits = [soft, resource.RLIM_INFINITY]

    def set_limit(_what, given):
        if given[0] > allowed:
            raise ValueError("current limit exceeds maximum limit")
        limits[:] = given

    monkeypatch.setattr(resource, "getrlimit", lambda _what: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    store_module._allow_open_files()
    assert limits == [ends, resource.RLIM_INFINITY]


def test_ranges_outside_a_split_are_refused(store):
    split = store.split("train")
    for start, stop in ((-1, 2), (0, split.num_tokens + 1), (5, 4)):
        with pytest.raises(IndexError, match="were asked of a split"):
            split.read(start, stop)


def test_the_fingerprint_is_of_content_not_of_place(store, tmp_path):
    documents = [b"one", b"two two", b"three three three"]
    assert write(tmp_path / "elsewhere", documents, shard_tokens=8).fingerprint == store.fingerprint
    assert write(tmp_path / "other", documents[::-1], shard_tokens=8).fingerprint != store.fingerprint
    assert store.manifest["skipped"] == {"empty": 2}


def test_tokens_are_as_narrow_as_the_vocabulary_allows():
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32


def test_the_tokenizer_inside_is_the_one_that_was_given(tmp_path):
    tokenizer = SentencePieceTokenizer(train_sentencepiece(["some words to train on\n" * 9], 290))
    store = write(tmp_path / "s", [b"x"], tokenizer=tokenizer)
    assert store.tokenizer().fingerprint == tokenizer.fingerprint
    store.verify()
    told = r"was made with a sentencepiece tokenizer \w{12} that begins with 1, the run's is bytes"
    with pytest.raises(StoreError, match=told):
        store.check_tokenizer(ByteTokenizer())
    (store.path / "tokenizer.model").unlink()
    with pytest.raises(StoreError, match="tokenizer.model is missing"):
        TokenStore.open(store.path)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-offsets.npy", "heldout-bytes.npy"])
def test_missing_and_cut_files_are_named_on_opening(store, name):
    whole = (store.path / name).read_bytes()
    (store.path / name).write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=name):
        TokenStore.open(store.path)
    (store.path / name).unlink()
    with pytest.raises(StoreError, match=name):
        TokenStore.open(store.path)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-offsets.npy", "heldout-bytes.npy"])
def test_a_flipped_bit_is_found_by_verify(store, name):
    store.verify()
    damaged = bytearray((store.path / name).read_bytes())
    damaged[-1] ^= 1
    (store.path / name).write_bytes(damaged)
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        TokenStore.open(store.path).verify()


def test_folders_that_are_no_store_are_named(store, tmp_path):
    with pytest.raises(StoreError, match="it has no manifest.json"):
        TokenStore.open(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        TokenStore.open(store.path / "train-00000.bin")
    manifest = store.path / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(StoreError, match="of format 99, this version reads format 1"):
        TokenStore.open(store.path)
    content["splits"]["train"]["tokens"] -= 1
    manifest.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="was changed after it was written"):
        TokenStore.open(store.path)
    manifest.write_text(json.dumps(content)[:-9])
    with pytest.raises(StoreError, match="cannot be read"):
        TokenStore.open(store.path)


def test_lengths_that_do_not_add_up_are_refused(tmp_path):
    writer = StoreWriter(tmp_path, ByteTokenizer())
    with pytest.raises(ValueError, match="3 tokens do not make 1 documents of 4"):
        writer.add("train", np.arange(3), lengths=[4], byte_lengths=[3])
