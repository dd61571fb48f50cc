"""Objects in a bucket: written whole, listed, copied with their hashes, and what a failing server does."""

import datetime
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maxlm import storage
from maxlm.errors import UserError
from maxlm.storage import Folder, StorageError
from maxlm.train import home as home_module
from maxlm.train.home import EVENTS, PROFILE, Home, began, beside, copied, first_start, run_id
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


def test_pieces_come_at_once_and_in_their_order(bucket, server, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PIECE", 10)
    run, content = Folder(f"{bucket}/run"), bytes(range(200))
    run.write("a", content)
    here, most, lock = [0], [0], threading.Lock()

    def slow(method, path):  # no answer before others have asked, too
        with lock:
            here[0] += 1
            most[0] = max(most[0], here[0])
        time.sleep(0.05)
        with lock:
            here[0] -= 1
        return False

    server.concerns, sizes = slow, []
    run.download("a", tmp_path / "a", sha256=hashlib.sha256(content).hexdigest(), came_on=sizes.append)
    assert (tmp_path / "a").read_bytes() == content and sum(sizes) == 200
    assert 3 <= most[0] <= storage._AT_ONCE


def test_what_this_machine_refuses_is_put_down_to_it(bucket, tmp_path):
    run = Folder(f"{bucket}/run")
    run.write("a", b"1")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be kept on this machine \(File exists\).*MAXLM_CACHE"):
        run.download("a", tmp_path / "file" / "a")


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


def test_a_rollback_that_the_bucket_never_had_is_not_gone_where_the_run_went_on_without(bucket):
    url, said = f"{bucket}/run", []
    first_start(url)
    with Home(url, log=said.append) as home:
        (home.folder / "rollbacks.json").write_text('[{"at": 8, "to": 4}]')
    assert Folder(url).read("rollbacks.json")
    with Home(url, log=said.append) as home:
        assert (home.folder / "rollbacks.json").exists() and not said
    Folder(url).remove("rollbacks.json")  # as if the copy into the bucket had failed
    with Home(url, log=said.append) as home:
        assert not (home.folder / "rollbacks.json").exists()
    assert "rollbacks.json" not in Folder(url).names()
    assert len(said) == 1 and said[0].endswith(f"rollbacks.json: {url} has none, and the run goes on as it is there")


def test_who_looks_at_a_run_or_prepares_it_leaves_the_files_of_its_training_alone(bucket):
    """After a rollback the bucket's metrics go further than those here, to which the training appends."""
    url = f"{bucket}/run"
    with Home(url, log=print) as home, (home.folder / "metrics.jsonl").open("a") as live:
        live.write("1\n2\n")
        live.flush()
        home.push()
        live.truncate(2)
        with beside(url, log=print) as other:
            assert (other.folder / "metrics.jsonl").read_text() == "1\n2\n" and other.place == home.place
            (other.folder / "report.md").write_text("mine")
        with beside(url, log=print, writes=True) as preparing:
            (preparing.folder / "data").mkdir()
            (preparing.folder / "data" / "prepared.json").write_text("{}")
        assert not other.folder.exists() and not preparing.folder.exists()
        assert Folder(url).names() == ["data/prepared.json", "metrics.jsonl"]
        assert copied(url, log=print) != home.folder
        live.write("3\n")
        live.flush()
        assert (home.folder / "metrics.jsonl").read_text() == "1\n3\n"


def test_a_file_that_is_too_large_for_an_object_is_told_and_the_rest_goes_on(bucket, server, monkeypatch):
    monkeypatch.setattr(home_module, "PUSH_SECONDS", 0.05)
    monkeypatch.setitem(storage._LARGEST, "s3", 100)
    said: list[str] = []

    def wait_for(happened):
        deadline = time.monotonic() + 20
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with Home(f"{bucket}/run", log=said.append) as home:
        (home.folder / "metrics.jsonl").write_text("x" * 101)
        wait_for(lambda: said)
        with pytest.raises(StorageError, match="metrics.jsonl has 0.0 GiB, and an object of s3://"):
            home.push()
        (home.folder / "metrics.jsonl").write_text("x" * 100)
        wait_for(lambda: puts(server, "metrics.jsonl"))  # by the thread
    assert "metrics and reports could not be copied" in said[0] and storage._LARGEST["gs"] > storage._LARGEST["s3"]


def puts(server, name):
    return sum(method == "PUT" and path.endswith(f"/{name}") for method, path in server.seen)


def test_large_files_and_what_a_restart_does_not_need_wait(bucket, server, monkeypatch):
    monkeypatch.setattr(home_module, "PUSH_SECONDS", 0.05)
    monkeypatch.setattr(home_module, "LARGE", 1000)
    url, metrics, small = f"{bucket}/run", "metrics.jsonl", "goodput.jsonl"

    def copied_again(name, known):
        deadline = time.monotonic() + 20
        while puts(server, name) == known:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return puts(server, name)

    with Home(url, log=print) as home:
        for name in (f"{EVENTS}/events", f"{PROFILE}/trace", metrics, small):
            (home.folder / name).parent.mkdir(exist_ok=True)
            (home.folder / name).write_text("x" * (10 if name == small else 2000))
        large, light = copied_again(metrics, 0), copied_again(small, 0)
        for size in (2100, 2200):  # by a twentieth, and by a tenth since it was copied
            with (home.folder / metrics).open("a") as file:
                file.write("x" * (size - (home.folder / metrics).stat().st_size))
            with (home.folder / small).open("a") as file:
                file.write("x")
            light = copied_again(small, light)
        time.sleep(0.2)
        assert puts(server, metrics) == large
        with (home.folder / metrics).open("a") as file:
            file.write("x")
        large = copied_again(metrics, large)
        events = copied_again("events", 0)
        for name in (metrics, f"{EVENTS}/events"):
            with (home.folder / name).open("a") as file:
                file.write("x")
        home.push()  # as before a commit
        assert len(Folder(url).read(metrics)) == 2202
        assert (puts(server, metrics), puts(server, "events")) == (large + 1, events)
        assert puts(server, "trace") == 0
    assert len(Folder(url).read(f"{EVENTS}/events")) == 2001 and len(Folder(url).read(f"{PROFILE}/trace")) == 2000
    before = server.count
    (home.folder / metrics).write_text("of another run")
    with Home(url, log=print) as again:
        assert len((again.folder / metrics).read_text()) == 2202
    asked = [path.rpartition("/")[2] for method, path in server.seen[before:] if method == "GET"]
    assert asked.count(metrics) == asked.count("events") == 1 and "trace" not in asked


def commit(run: Folder, name: str, *, objects: int = 6) -> None:
    """Writes a checkpoint whose objects hold its name."""
    for number in range(objects):
        (run / "checkpoints" / name).write(f"state/{number}", name)
    (run / "checkpoints" / "commits").write(name, b"\n")


def held(folder: Path, step: int) -> list[str]:
    return [file.read_text() for file in sorted((folder / "checkpoints" / str(step) / "state").iterdir())]


def test_processes_that_copy_the_same_checkpoint_do_it_once_and_get_all_of_it(bucket, server, tmp_path):
    run = Folder(f"{bucket}/run")
    run.write("config.json", "{}")
    commit(run, "1500-abc-1")
    left = tmp_path / "cache" / "copies" / f"{storage.local_name(run.url)}-1000-abc-1.partial-x"
    left.mkdir(parents=True)
    server.delay, server.delay_every = 0.02, 1
    lines: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: copied(run.url, log=lines.append), range(8)))
    assert len(folders) == 1 and not left.exists()
    assert held(folders.pop(), 1500) == ["1500-abc-1"] * 6
    assert sum(line.startswith("copying checkpoint") for line in lines) == 1


def test_a_copy_is_of_the_save_that_counts_now(bucket):
    run = Folder(f"{bucket}/run")
    commit(run, "1500-abc-1")
    before = copied(run.url, log=print)
    run.write("config.json", "new")
    commit(run, "1500-abc-3")  # as a rollback does
    (run / "checkpoints" / "commits").remove("1500-abc-1")
    now = copied(run.url, log=print)
    assert held(now, 1500) == ["1500-abc-3"] * 6 and (now / "config.json").read_text() == "new"
    assert held(before, 1500) == ["1500-abc-1"] * 6  # who reads it still, reads on
    commit(run, "1000-abd-1")
    (run / "checkpoints" / "commits").remove("1500-abc-3")  # the run went back: what was copied of step 1500 is past
    later = copied(run.url, log=print)
    assert [path.name for path in (later / "checkpoints").iterdir()] == ["1000"] and later.name.endswith("1000-abd-1")


def test_the_checkpoint_that_is_asked_for_is_copied(bucket):
    run = Folder(f"{bucket}/run")
    for name in ("500-abc-1", "1500-abc-2"):
        commit(run, name)
    older = copied(run.url, log=print, step=500)
    assert held(older, 500) == ["500-abc-1"] * 6 and not (older / "checkpoints" / "1500").exists()
    assert held(copied(run.url, log=print), 1500) == ["1500-abc-2"] * 6
    with pytest.raises(UserError, match=r"/run has no checkpoint of step 700, only \[500, 1500\]"):
        copied(run.url, log=print, step=700)


def test_copies_that_nobody_asks_for_any_more_are_removed(bucket):
    run, other = Folder(f"{bucket}/run"), Folder(f"{bucket}/other")
    commit(run, "1500-abc-1")
    commit(other, "7-abc-1")
    first, lines = copied(run.url, log=print), []
    month = time.time() - 31 * 86400
    os.utime(first, (month, month))
    assert copied(run.url, log=lines.append) == first  # asked for again, late
    os.utime(first, (month, month))
    left, under_way = (first.with_name(f"{first.name[:-1]}{n}.partial-x") for n in (2, 3))
    for folder in (left, under_way):
        (folder / "checkpoints").mkdir(parents=True)
    os.utime(left, (month, month))  # of a run that nobody asks for, either
    assert held(copied(other.url, log=lines.append), 7) == ["7-abc-1"] * 6
    assert not first.exists() and f"removed {first}: nobody has asked for it in 30 days" in lines
    assert not list(first.parent.glob("*unused*"))
    assert not left.exists() and under_way.exists() and f"removed {left}: it was not copied to its end" in lines


def test_a_checkpoint_that_is_retired_while_it_is_copied_gives_way_to_the_next(bucket, server):
    run = Folder(f"{bucket}/run")
    commit(run, "1000-abc-1")
    gone = []

    def retire(method, path):  # as the run does that goes on: the commit first
        if path.endswith("/1000-abc-1/state/3") and not gone:
            gone.append(path)
            commit(run, "2000-abc-2")
            (run / "checkpoints" / "commits").remove("1000-abc-1")
            (run / "checkpoints" / "1000-abc-1").delete()
        return False

    server.concerns = retire
    folder = copied(run.url, log=print)
    assert gone and held(folder, 2000) == ["2000-abc-2"] * 6
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")] == [folder.name]


def test_a_run_begun_again_in_the_place_of_another_does_not_find_its_files(bucket, tmp_path):
    url, lines = f"{bucket}/run", []
    first = first_start(url)
    assert first_start(url) == first != ""
    with Home(url, log=lines.append, run=first) as home:
        (home.folder / "rollbacks.json").write_text('[{"at": 9, "to": 6}]')
        (home.folder / "config.json").write_text("{}")
    assert Home(url, log=lines.append).folder == home.folder and not lines
    Folder(url).delete()
    second = first_start(url)
    assert second != first
    with Home(url, log=lines.append, run=second) as again:
        assert [path.name for path in again.folder.iterdir()] == ["run.json"]
    assert Folder(url).names() == ["run.json"] and run_id(url) == second
    assert len(lines) == 1 and lines[0].startswith(f"left out {home.folder}: ")
    folder = tmp_path / "run"  # on a disk alike
    assert began(folder) is None
    first, now = first_start(folder), datetime.datetime.now(datetime.UTC)
    assert abs(began(folder) - now) < datetime.timedelta(seconds=60) and began(url) is not None
    (folder / "run.json").write_text(json.dumps({"id": first, "began": "2026-01-02T03:04:05+00:00"}))
    assert first_start(folder) == first and Home(folder, log=print).run == first
    assert began(folder).year == 2026 and began(folder).minute == 4  # of the first start, whatever came after
    shutil.rmtree(folder)
    assert first_start(folder) != first


def test_a_run_from_before_there_were_ids_goes_on_without(bucket, tmp_path):
    url = f"{bucket}/run"
    with Home(url, log=print) as home:
        (home.folder / "config.json").write_text("{}")
        (home.folder / "metrics.jsonl").write_text("1\n")
    assert first_start(url) == "" and "run.json" not in Folder(url).names()
    with Home(url, log=print, run="") as again:
        assert again.folder == home.folder and (again.folder / "metrics.jsonl").read_text() == "1\n"
    (tmp_path / "config.json").write_text("{}")
    assert first_start(tmp_path) == "" and not (tmp_path / "run.json").exists()
