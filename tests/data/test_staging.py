"""Stores in a bucket: made there, read by the shard, proved, and never half there."""

import errno
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from maxlm import storage
from maxlm.config import StoreConfig
from maxlm.data import staging, workers
from maxlm.data import store as stores
from maxlm.data.prepare import prepare_data, prepare_store
from maxlm.data.store import StoreError, StoreWriter, TokenStore
from maxlm.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from maxlm.files import file_digest
from maxlm.storage import Folder, StorageError, local_name
from tests.tiny import tiny_config, write_corpus

DOCUMENTS = [bytes([65 + number]) * (7 + number) for number in range(20)]


def write(folder: Path) -> TokenStore:
    """A store of several small shards."""
    writer = StoreWriter(folder, ByteTokenizer(), shard_tokens=64)
    for split, documents in (("train", DOCUMENTS), ("heldout", DOCUMENTS[:2])):
        for document in documents:
            tokens = np.array([ByteTokenizer.bos_id, *document])
            writer.add(split, tokens, lengths=[tokens.size], byte_lengths=[len(document)])
    writer.finish(heldout_permille=25)
    return TokenStore.open(folder)


@pytest.fixture
def store(bucket, tmp_path):
    """A store in a bucket of which nothing has been copied to this machine."""
    made = write(tmp_path / "store")
    remote = Folder(f"{bucket}/store")
    for file in sorted(made.path.iterdir()):
        remote.upload(file, file.name)
    return remote


def shards_of(store: TokenStore) -> list[str]:
    return sorted(path.name for path in store.path.glob("train-*.bin"))


def test_shards_are_copied_as_they_are_read_and_hold_what_was_written(store, server, tmp_path):
    server.fail_every = 4
    local, opened = TokenStore.open(tmp_path / "store"), TokenStore.open(str(store))
    assert opened.fingerprint == local.fingerprint and shards_of(opened) == []
    split, whole = opened.split("train"), local.split("train")
    np.testing.assert_array_equal(split.read(70, 130), whole.read(70, 130))
    assert shards_of(opened) == ["train-00001.bin", "train-00002.bin"]
    np.testing.assert_array_equal(split.read(0, split.num_tokens), whole.read(0, whole.num_tokens))
    assert [bytes(split.document(i)[1:].tolist()) for i in range(split.num_documents)] == DOCUMENTS
    opened.verify()
    before = server.count
    assert TokenStore.open(str(store)).split("train").read(0, 200).tolist() == whole.read(0, 200).tolist()
    # The second process copies nothing: it asks for the manifest alone.
    assert [path for _, path in server.seen[before:] if not path.endswith("manifest.json")] == []


def test_of_many_who_want_a_file_one_copies_it_and_another_file_waits_for_nobody(store, server, tmp_path):
    """Threads stand for processes here: the lock is the file's, so each opening of the store is on its own."""
    whole = TokenStore.open(tmp_path / "store").split("train")
    opened = [TokenStore.open(str(store)) for _ in range(6)]
    before = server.count
    held, asked = threading.Event(), threading.Event()

    def hold(method, path):  # the first shard does not come before the second is there
        if path.endswith("train-00000.bin"):
            asked.set()
            held.wait(20)
        return False

    server.concerns = hold
    with ThreadPoolExecutor(6) as pool:
        reads = [pool.submit(each.split("train").read, 0, 64) for each in opened]
        assert asked.wait(20)
        np.testing.assert_array_equal(TokenStore.open(str(store)).split("train").read(64, 100), whole.read(64, 100))
        assert not any(read.done() for read in reads)
        held.set()
        for read in reads:
            np.testing.assert_array_equal(read.result(), whole.read(0, 64))
    asked_for = [path.rpartition("/")[2] for _, path in server.seen[before:]]
    # Once each, in the requests that one copy takes: a part, and where the file ends before it, what is left.
    assert asked_for.count("train-00000.bin") == asked_for.count("train-00001.bin") <= 2


def test_what_comes_is_told_as_it_comes(store, server, monkeypatch, capsys):
    monkeypatch.setattr(storage, "_PIECE", 40)
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_LINES", 0.02)
    server.delay, server.delay_every = 0.03, 1
    opened, came = TokenStore.open(str(store)), []
    opened.on_arrival(lambda: came.append(None))
    capsys.readouterr()
    split = opened.split("train")
    split.read(0, 64)  # 128 bytes: 40, 40, 40 and 8
    assert len(came) == 5  # four pieces, and the file is there
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith(f"copying train-00000.bin of {store}: ") for line in said)
    assert said[-1].startswith(f"copying train-00000.bin of {store}: 0.0 of 0.0 MB, 100%, ")
    split.read(0, 64)
    assert len(came) == 5


def test_a_cache_without_room_is_named_and_no_damage(store, monkeypatch):
    opened = TokenStore.open(str(store))
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(
        StorageError, match="train-00000.bin, a copy.*No space left.*/cache can be written.*MAXLM_CACHE"
    ):
        opened.split("train").read(0, 64)
    assert not list(opened.path.glob(".train-00000.bin.[0-9]*")) and shards_of(opened) == []


def test_a_copy_is_hashed_once(store, monkeypatch):
    opened = TokenStore.open(str(store))
    opened.verify()  # all is copied, and proved on its way
    again, hashed = TokenStore.open(str(store)), []
    monkeypatch.setattr(staging, "file_digest", lambda path: hashed.append(path.name) or file_digest(path))
    monkeypatch.setattr(stores, "file_digest", lambda path: hashed.append(path.name) or file_digest(path))
    again.verify()
    assert len(hashed) == len(set(hashed)) >= 4
    again.verify()
    assert len(hashed) == len(set(hashed))


def test_a_damaged_copy_is_made_again_and_a_damaged_object_is_named(store):
    opened = TokenStore.open(str(store))
    expected = opened.split("train").read(0, 64).copy()
    copy = opened.path / "train-00000.bin"
    raw = bytearray(copy.read_bytes())
    raw[5] ^= 1
    copy.write_bytes(bytes(raw))
    again = TokenStore.open(str(store))
    np.testing.assert_array_equal(again.split("train").read(0, 64), expected)
    store.write("train-00001.bin", bytes(raw))  # of the right length
    with pytest.raises(StorageError, match="train-00001.bin is damaged: its SHA-256"):
        again.split("train").read(64, 100)
    store.remove("train-00002.bin")
    with pytest.raises(FileNotFoundError, match="train-00002.bin is not there"):
        again.split("train").read(128, 140)


def test_a_damaged_copy_of_the_tokenizer_is_made_again_and_a_damaged_object_is_named(bucket, tmp_path):
    """The manifest has no SHA-256 of that file, but the tokenizer's fingerprint."""
    text, others = ([f"{word} {number} of some words and others" for number in range(200)] for word in ("one", "two"))
    tokenizer, other = (
        SentencePieceTokenizer(train_sentencepiece(iter(text), 300)),
        train_sentencepiece(iter(others), 300),
    )
    StoreWriter(tmp_path / "store", tokenizer).finish(heldout_permille=25)
    remote = Folder(f"{bucket}/store")
    staging.publish(tmp_path / "store", remote)
    opened = TokenStore.open(str(remote))
    copy = opened.path / tokenizer.file_name
    whole = copy.read_bytes()
    assert other != whole  # a model like any other, and not the one of these tokens
    for damaged in (other, whole[:100]):
        copy.write_bytes(damaged)
        assert TokenStore.open(str(remote)).tokenizer().fingerprint == tokenizer.fingerprint
        assert copy.read_bytes() == whole
    remote.write(tokenizer.file_name, other)
    copy.write_bytes(other)
    with pytest.raises(StoreError, match=f"store/{tokenizer.file_name} is damaged: its fingerprint is"):
        opened.tokenizer()


def test_what_is_no_store_is_said(store, server):
    with pytest.raises(StoreError, match="s3://.*/none is not a complete token store, it has no manifest.json"):
        TokenStore.open(str(store / "none"))
    store.remove("train-offsets.npy")
    with pytest.raises(StoreError, match="train-offsets.npy is missing"):
        TokenStore.open(str(store))
    server.refuse = True
    with pytest.raises(StorageError, match="PERMISSION_DENIED"):
        TokenStore.open(str(store))


def test_a_manifest_cannot_lead_out_of_its_folder(store, tmp_path):
    opened = TokenStore.open(str(store))
    with pytest.raises(StoreError, match="no file of its folder"):
        opened._file({"file": "../../secret"})


def test_a_store_is_prepared_into_a_bucket_its_manifest_last(bucket, server, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 20)
    entry, url = StoreConfig(source=f"text:{corpus}/*.txt", heldout_permille=100), f"{bucket}/made"
    whole = prepare_store(entry, ByteTokenizer(), tmp_path / "local", workers=1).store
    server.refuse, server.concerns = True, lambda method, path: method == "PUT" and "offsets" in path
    with pytest.raises(StorageError, match="PERMISSION_DENIED"):
        prepare_store(entry, ByteTokenizer(), url, workers=1)
    assert Folder(url).names() and "manifest.json" not in Folder(url).names()
    server.heal()
    server.fail_every = 5
    made = prepare_store(entry, ByteTokenizer(), url, workers=1)
    assert made.store.fingerprint == whole.fingerprint and made.store.place == url
    puts = [path.rpartition("/")[2] for method, path in server.seen if method == "PUT"]
    assert puts[-1] == "manifest.json" and puts.count("manifest.json") <= 2  # 2: the first may have failed
    again = prepare_store(entry, ByteTokenizer(), url, workers=1)
    assert again.report.reused and again.store.fingerprint == whole.fingerprint
    Folder(url).delete()
    shutil.rmtree(made.store.path)
    Folder(url).write("manifest.json", b"{}")
    with pytest.raises(StoreError, match="cannot be read"):
        prepare_store(entry, ByteTokenizer(), url, workers=1)


def test_a_store_of_too_many_documents_is_refused_before_any_of_it_is_copied(bucket, tmp_path, monkeypatch):
    made, remote = write(tmp_path / "store"), Folder(f"{bucket}/made")
    largest = max(path.stat().st_size for path in made.path.glob("*.npy"))
    with monkeypatch.context() as patch:
        patch.setitem(storage._LARGEST, "s3", largest - 1)
        with pytest.raises(StorageError, match=f"offsets.npy has .*make several stores.* is whole in {made.path}"):
            staging.publish(made.path, remote)
        assert remote.names() == []
    staging.publish(made.path, remote)
    TokenStore.open(remote.url).verify()


@pytest.mark.parametrize("copied", [False, True])
def test_a_kill_between_the_manifest_and_the_move_leaves_no_second_copy(bucket, server, tmp_path, copied):
    corpus = write_corpus(tmp_path / "corpus", 20)
    entry, url = StoreConfig(source=f"text:{corpus}/*.txt", heldout_permille=100), f"{bucket}/made"
    stores = tmp_path / "cache" / "stores"
    built = stores / local_name(url)
    built.parent.mkdir(parents=True)
    whole = prepare_store(entry, ByteTokenizer(), built, workers=1).store
    for file in built.iterdir():
        Folder(url).upload(file, file.name)
    if copied:  # by another run on this machine
        TokenStore.open(url).verify()
    made = prepare_store(entry, ByteTokenizer(), url, workers=1)
    assert made.report.reused and made.store.fingerprint == whole.fingerprint
    assert [path.name for path in stores.iterdir() if path.is_dir()] == [whole.fingerprint]
    before = server.count
    made.store.verify()
    assert server.count == before  # all of it is here


def test_what_a_killed_process_was_copying_is_removed_when_nobody_writes_it_any_more(store):
    folder = TokenStore.open(str(store)).path
    left, alive = folder / ".train-00000.bin.12345", folder / ".train-00001.bin.12346"
    for path in (left, alive):
        path.write_bytes(b"half")
    os.utime(left, (0, time.time() - staging.ABANDONED_SECONDS - 1))
    TokenStore.open(str(store))
    assert alive.exists() and not left.exists()


def test_a_run_in_a_bucket_finds_its_stores_from_any_machine(bucket, tmp_path, monkeypatch):
    config = tiny_config(write_corpus(tmp_path / "corpus", 20))
    made = prepare_data(config, tmp_path / "one", home=f"{bucket}/run")
    assert made.stores["tiny"].place.startswith(f"{bucket}/run/data/tiny-")
    monkeypatch.setenv("MAXLM_CACHE", str(tmp_path / "another machine"))
    (tmp_path / "two" / "data").mkdir(parents=True)
    (tmp_path / "one" / "data" / "prepared.json").rename(tmp_path / "two" / "data" / "prepared.json")
    other = prepare_data(config, tmp_path / "two", build=False)
    assert other.fingerprint() == made.fingerprint()
    end = made.stores["tiny"].split("train").num_tokens
    np.testing.assert_array_equal(
        other.stores["tiny"].split("train").read(0, end), made.stores["tiny"].split("train").read(0, end)
    )
