"""Objects in a bucket: written whole, listed, copied with their hashes, and what a failing server does."""

import hashlib
import threading
from pathlib import Path

import pytest

from maxlm import storage
from maxlm.errors import UserError
from maxlm.storage import Folder, StorageError
from maxlm.train.home import Home, copied
from tests.buckets import SECRET


def test_objects_come_back_and_folders_keep_apart(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PIECE", 10)
    run, other = Folder(f"{bucket}/runs/one"), Folder(f"{bucket}/runs/one-more")
    contents = {"empty": b"", "short": b"abc", "even": b"0123456789" * 3, "odd": b"0123456789" * 3 + b"x"}
    for name, content in contents.items():
        run.write(name, content)
    (run / "deep").write("er/still", b"1")
    other.write("x", b"2")
    for name, content in contents.items():
        assert run.read(name) == content
        run.download(name, tmp_path / "copies" / name, sha256=hashlib.sha256(content).hexdigest())
        assert (tmp_path / "copies" / name).read_bytes() == content
    assert run.names() == ["deep/er/still", "empty", "even", "odd", "short"]
    run.remove("odd")
    (run / "deep").delete()
    assert run.names() == ["empty", "even", "short"] and other.names() == ["x"]
    run.upload(tmp_path / "copies" / "odd", "odd")
    assert run.read("odd") == contents["odd"]


def test_what_is_not_there_or_altered_is_never_taken(bucket, tmp_path):
    run = Folder(f"{bucket}/run")
    with pytest.raises(FileNotFoundError, match="s3://.*/run/none is not there"):
        run.read("none")
    with pytest.raises(FileNotFoundError):
        run.download("none", tmp_path / "none")
    run.write("a", b"other bytes")
    with pytest.raises(StorageError, match="SHA-256"):
        run.download("a", tmp_path / "a", sha256=hashlib.sha256(b"bytes").hexdigest())
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stumbles_is_asked_again(bucket, server):
    server.fail_every, server.delay_every, server.delay = 3, 5, 0.2
    run = Folder(f"{bucket}/run")
    for number in range(12):
        run.write(str(number), bytes([number]))
    assert [run.read(str(number)) for number in range(12)] == [bytes([number]) for number in range(12)]
    assert len(run.names()) == 12
    assert server.count > 25


def test_a_server_that_fails_for_good_is_named_with_no_secret(bucket, server, monkeypatch):
    run = Folder(f"{bucket}/run")
    run.write("a", b"1")
    asked = [lambda: run.read("a"), lambda: run.write("a", b""), run.names, run.delete]
    for setting, reason in (("refuse", "PERMISSION_DENIED"), ("fail_every", "503|retry attempts failed")):
        setattr(server, setting, 1)
        for ask in asked:
            with pytest.raises(StorageError, match=reason) as error:
                ask()
            assert run.url in str(error.value) and SECRET not in str(error.value)
        server.heal()
    with pytest.raises(StorageError, match="NoSuchBucket"):
        Folder("s3://no-such-bucket/run").names()
    assert run.read("a") == b"1"


def test_a_server_that_never_answers_is_given_up(bucket, server, monkeypatch):
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("tests.buckets.time.sleep", lambda _: threading.Event().wait(2))
    server.stall = True
    with pytest.raises(StorageError, match="did not answer within 0.5 s"):
        Folder(f"{bucket}/run").read("a")


@pytest.mark.parametrize(
    "url",
    ["s3://b", "s3:///x", "az://bucket/x", "s3://bucket/../x", "s3://bucket//x", "S3://bucket/x", "s3://bucket/a\nb"],
)
def test_a_place_that_cannot_be_is_refused(url):
    with pytest.raises(UserError, match="expected gs://BUCKET/FOLDER, s3://BUCKET/FOLDER"):
        Folder(url)


def test_names_of_copies_differ_where_urls_do():
    assert storage.local_name("s3://bucket/run") != storage.local_name("gs://bucket/run")
    assert storage.local_name("s3://bucket/run") == storage.local_name("s3://bucket/run/")
    assert storage.cache_folder() == storage.cache_folder().expanduser() and isinstance(storage.cache_folder(), Path)


def test_small_files_follow_a_run_and_the_buckets_count_unless_those_here_go_on(bucket, tmp_path):
    url = f"{bucket}/run"
    with Home(url, log=print) as home:
        (home.folder / "metrics.jsonl").write_text("1\n")
        (home.folder / "report.md").write_text("first")
        (home.folder / ".report.md.partial").write_text("half")
        (home.folder / "checkpoints").mkdir()
        (home.folder / "checkpoints" / "x").write_text("big")
    assert Folder(url).names() == ["metrics.jsonl", "report.md"]
    (home.folder / "metrics.jsonl").write_text("1\n2\n")  # written, but the process was killed before it was copied
    Folder(url).write("report.md", "from another machine")
    with Home(url, log=print) as home:
        assert (home.folder / "metrics.jsonl").read_text() == "1\n2\n"
        assert (home.folder / "report.md").read_text() == "from another machine"
    assert Folder(url).read("metrics.jsonl") == b"1\n2\n"
    Folder(url).write("metrics.jsonl", b"1\n2\n3\n")
    with Home(url, log=print, writes=False) as home:  # the second of two processes
        assert (home.folder / "metrics.jsonl").read_text() == "1\n2\n3\n"
        (home.folder / "report.md").write_text("mine")
    assert Folder(url).read("report.md") == b"from another machine"
    local = Home(tmp_path / "run", log=print)
    assert local.place == local.folder == tmp_path / "run" and local.checkpoints == tmp_path / "run" / "checkpoints"
    with pytest.raises(UserError, match="holds nothing"):
        copied(f"{bucket}/none", log=print)
