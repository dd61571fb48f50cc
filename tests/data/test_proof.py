"""Stores are read in full beside the run, and a flipped bit in one of them ends it."""

import errno
import os
import threading

import pytest

from maxlm.data.prepare import prepare_data
from maxlm.data.proof import Proof
from maxlm.data.staging import publish
from maxlm.data.store import StoreError, TokenStore
from maxlm.resolve import resolve
from maxlm.storage import Folder
from tests.tiny import tiny_config, write_corpus


@pytest.fixture
def stores(tmp_path):
    return prepare_data(resolve(tiny_config(write_corpus(tmp_path / "corpus", 8))), tmp_path).stores


def test_a_flipped_bit_is_found_and_the_file_named(stores):
    Proof(stores).check(wait=10)
    shard = stores["tiny"].path / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    again = {"tiny": TokenStore.open(stores["tiny"].path)}  # opening looks at sizes
    with pytest.raises(StoreError, match="train-00000.bin is damaged.*may have seen damaged tokens"):
        Proof(again).check(wait=10)


def test_a_bucket_that_does_not_answer_is_no_damage(stores, bucket, server, capsys):
    publish(stores["tiny"].path, Folder(f"{bucket}/store"))
    opened = TokenStore.open(f"{bucket}/store")
    server.refuse, server.concerns = True, lambda method, path: path.endswith(".bin")
    Proof({"away": opened, "tiny": stores["tiny"]}).check(wait=30)
    said = capsys.readouterr().err
    assert f"{bucket}/store was not read in full: " in said and "PERMISSION_DENIED" in said
    server.heal()
    Proof({"away": opened}).check(wait=30)
    assert not capsys.readouterr().err


def test_a_full_disk_under_the_copies_is_no_damage(stores, bucket, capsys, monkeypatch):
    publish(stores["tiny"].path, Folder(f"{bucket}/store"))
    opened = TokenStore.open(f"{bucket}/store")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(os, "fsync", full)
        Proof({"away": opened, "tiny": stores["tiny"]}).check(wait=30)
    said = capsys.readouterr().err
    assert f"{bucket}/store was not read in full: " in said and "No space left" in said and "MAXLM_CACHE" in said


def test_nobody_waits_for_a_large_store(stores, monkeypatch):
    reading, go = threading.Event(), threading.Event()

    def slow(self):
        reading.set()
        go.wait(10)
        raise StoreError("late")

    monkeypatch.setattr(TokenStore, "verify", slow)
    proof = Proof(stores)
    reading.wait(10)
    proof.check(wait=0.01)  # goes on
    go.set()
    with pytest.raises(StoreError, match="late"):
        proof.check(wait=10)
