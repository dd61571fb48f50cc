"""Preparation: one store however it is cut, spread over processes or killed; made once, refused when it differs."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from maxlm.config import Config, DataConfig, ModelConfig, StoreConfig, TokenizerConfig
from maxlm.data import pieces, prepare, sources, tokenizers
from maxlm.data.loader import DataError, Loader
from maxlm.data.prepare import heldout_documents, prepare_data, prepare_store, prepare_tokenizer
from maxlm.data.sources import SourceError, list_source
from maxlm.data.store import StoreError, StoreWriter, TokenStore
from maxlm.data.tokenizers import ByteTokenizer, Ends, TokenizerError
from maxlm.data.workers import Progress, WorkerError, WorkerPool
from maxlm.files import write_among_others

PERMILLE = 200


def make_documents(count, *, size=60):
    dice = random.Random(7)
    words = ["def", "return", "é", "\n    ", "self", "(x)", " = ", "🙂"]
    return [f"{i} {''.join(dice.choice(words) for _ in range(dice.randint(1, size)))}".encode() for i in range(count)]


def write_files(folder, documents):
    folder.mkdir(parents=True, exist_ok=True)
    for i, document in enumerate(documents):
        (folder / f"{i:05d}.txt").write_bytes(document)
    return folder


def in_order(documents):
    """What a store should hold: the splits' documents, each once, by their hashes."""
    hashed = sorted((hashlib.sha256(document).hexdigest(), document) for document in set(documents))
    held = [document for digest, document in hashed if int(digest[:8], 16) % 1000 < PERMILLE]
    return [document for _, document in hashed if document not in held], held


def texts_of(store, split):
    part = store.split(split)
    return [store.tokenizer().decode(part.document(i)[1:].tolist()).encode() for i in range(part.num_documents)]


def entry(source, **changes):
    return StoreConfig(source=source, heldout_permille=PERMILLE, **changes)


def config(source, *, vocab_size=512, path="", cache="", **tokenizer):
    data = DataConfig(
        stores={"text": entry(source, path=path)}, tokenizer=TokenizerConfig(**tokenizer), cache_dir=cache, workers=1
    )
    return Config(model=ModelConfig(vocab_size=vocab_size), data=data)


def with_store(run, **changes):
    store = dataclasses.replace(run.data.stores["text"], **changes)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, stores={"text": store}))


@pytest.fixture
def corpus(tmp_path):
    return write_files(tmp_path / "corpus", make_documents(60))


def test_a_store_holds_each_document_once_split_and_ordered_by_hash(tmp_path, capsys):
    documents = make_documents(60)
    folder = write_files(tmp_path / "corpus", [*documents, documents[3], documents[4], b"", b"\xff", documents[3]])
    made = prepare_store(entry(f"text:{folder}"), ByteTokenizer(), tmp_path / "out", workers=2)
    train, held = in_order(documents)
    assert train and held
    assert texts_of(made.store, "train") == train
    assert texts_of(made.store, "heldout") == held == list(heldout_documents(made.store))
    assert made.store.split("train").byte_lengths.tolist() == [len(document) for document in train]
    assert all(made.store.split("train").document(i)[0] == 256 for i in range(len(train)))
    assert made.report.skipped == {"duplicate": 3, "empty": 1, "not_utf8": 1}
    assert made.report.documents == 60 and made.report.megabytes_per_second > 0
    made.store.verify()
    assert not (tmp_path / "out.partial").exists()
    assert "MB/s" in capsys.readouterr().err


def test_the_store_is_the_same_whatever_form_and_names_the_documents_had(tmp_path):
    documents = make_documents(40)
    write_files(tmp_path / "files", documents)
    lines = "".join(json.dumps({"text": text.decode()}) + "\n" for text in documents[::-1])
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    made = [
        prepare_store(entry(spec), ByteTokenizer(), tmp_path / f"out{i}", workers=1).store
        for i, spec in enumerate((f"text:{tmp_path}/files", f"jsonl:{tmp_path}/x.jsonl.gz"))
    ]
    assert made[0].fingerprint == made[1].fingerprint


def test_the_store_does_not_depend_on_units_runs_buckets_or_processes(tmp_path, corpus, monkeypatch):
    whole = prepare_store(entry(f"text:{corpus}"), ByteTokenizer(), tmp_path / "whole", workers=1).store
    monkeypatch.setattr(sources, "_unit_bytes", lambda total: 500)
    listing = list_source(f"text:{corpus}", "text")
    assert len(listing.units) > 5
    cut = prepare_store(entry(f"text:{corpus}"), ByteTokenizer(), tmp_path / "cut", workers=3, listing=listing).store
    assert cut.fingerprint == whole.fingerprint
    # Runs and buckets far smaller than a unit, in this process.
    monkeypatch.setattr(pieces, "RUN_BYTES", 100)
    monkeypatch.setattr(pieces, "BUCKET_BYTES", 1000)
    (tmp_path / "runs").mkdir()
    reports = [
        pieces.tokenise_unit(unit, pieces.TokenizerFile("bytes", "", Ends()), str(tmp_path / "runs"), f"u{i}")
        for i, unit in enumerate(listing.units)
    ]
    assert sum(len(report.runs) for report in reports) > len(reports)
    writer = StoreWriter(tmp_path / "merged", ByteTokenizer())
    # A unit that is merged twice is found to be nothing but duplicates.
    again = [*reports, reports[0]]
    duplicates = pieces.merge_runs(tmp_path / "runs", again, writer=writer, vocab_size=257, permille=PERMILLE)
    writer.finish(heldout_permille=PERMILLE)
    assert TokenStore.open(tmp_path / "merged").fingerprint == whole.fingerprint
    assert duplicates == len(listing.units[0].files)


SCRIPT = """
import sys
from pathlib import Path
from maxlm.config import StoreConfig
from maxlm.data import sources
from maxlm.data.prepare import prepare_store
from maxlm.data.tokenizers import load_tokenizer
sources._unit_bytes = lambda total: 20_000
entry = StoreConfig(source=sys.argv[1], heldout_permille=200)
prepare_store(entry, load_tokenizer("sentencepiece", sys.argv[2]), Path(sys.argv[3]), workers=2)
"""


def test_sigkill_at_any_moment_ends_with_the_same_store(tmp_path):
    documents = make_documents(900, size=400)
    source = f"text:{write_files(tmp_path / 'corpus', documents)}"
    model = tmp_path / "t.model"
    model.write_bytes(tokenizers.train_sentencepiece((text.decode() for text in documents[:200]), 400))
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", SCRIPT, source, str(model), str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    kept: set[Path] = set()
    for units in (1, 4, 9):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(partial.glob("*/unit-*.json"))) < units and process.poll() is None:
            assert time.monotonic() < deadline, "the preparation does not get on"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists(), "the preparation ended before it could be killed: make the corpus larger"
        reports = set(partial.glob("*/unit-*.json"))
        assert kept <= reports
        kept = reports
    times = {path: path.stat().st_mtime_ns for path in kept}
    # What a kill during the merge leaves behind, and a file that was being written.
    plan = next(iter(kept)).parent
    (plan / "store").mkdir()
    (plan / "store" / "train-00000.bin").write_bytes(b"half")
    (plan / "unit-000000-000.tokens.123").write_bytes(b"half")
    seen: dict[Path, int] = {}

    def watch(folder, reports, **rest):
        seen.update({path: path.stat().st_mtime_ns for path in kept})
        return merge(folder, reports, **rest)

    merge = pieces.merge_runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_unit_bytes", lambda total: 20_000)
        patch.setattr(pieces, "merge_runs", watch)
        tokenizer = tokenizers.load_tokenizer("sentencepiece", model)
        survived = prepare_store(entry(source), tokenizer, out, workers=2).store
        patch.setattr(pieces, "merge_runs", merge)
        clean = prepare_store(entry(source), tokenizer, tmp_path / "clean", workers=1).store
    assert seen == times, "finished parts were made again"
    assert survived.fingerprint == clean.fingerprint
    survived.verify()
    assert not partial.exists()


def test_leftovers_of_a_kill_after_the_commit_are_cleaned_up(tmp_path, corpus):
    out = tmp_path / "out"
    first = prepare_store(entry(f"text:{corpus}"), ByteTokenizer(), out, workers=1)
    (tmp_path / "out.partial" / "abc").mkdir(parents=True)
    again = prepare_store(entry(f"text:{corpus}"), ByteTokenizer(), out, workers=1)
    assert again.report.reused and not first.report.reused
    assert again.store.fingerprint == first.store.fingerprint
    assert not (tmp_path / "out.partial").exists()


def test_an_interrupted_preparation_of_other_data_is_removed(tmp_path, corpus, capsys):
    stale = tmp_path / "out.partial" / "0123456789abcdef"
    stale.mkdir(parents=True)
    (stale / "unit-000000.json").write_text("{}")
    prepare_store(entry(f"text:{corpus}"), ByteTokenizer(), tmp_path / "out", workers=1)
    assert f"removing {stale}" in capsys.readouterr().err


def test_two_preparations_of_one_store_do_not_meet(tmp_path, corpus):
    made = []

    def work():
        made.append(prepare_store(entry(f"text:{corpus}"), ByteTokenizer(), tmp_path / "out", workers=1))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.report.reused for one in made) == [False, True]


def test_nobody_clears_up_beside_another_who_does(tmp_path, corpus, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    inside, most, rmtree = [], [], prepare.shutil.rmtree
    begun, done = threading.Event(), []

    def slowly(path, **options):
        if Path(path) != partial:
            return rmtree(path, **options)
        inside.append(path)
        most.append(len(inside))
        (partial / "lock").unlink(missing_ok=True)  # a folder's entries come in any order
        begun.set()
        time.sleep(0.5)
        rmtree(path, **options)
        inside.pop()

    def work():
        done.append(prepare_store(entry(f"text:{corpus}"), ByteTokenizer(), out, workers=1).store.fingerprint)

    monkeypatch.setattr(prepare.shutil, "rmtree", slowly)
    first, second = threading.Thread(target=work), threading.Thread(target=work)
    first.start()
    assert begun.wait(60)
    second.start()
    first.join()
    second.join()
    assert len(done) == 2 and done[0] == done[1] and max(most) == 1 and not partial.exists()


def test_prepare_data_trains_builds_and_then_only_opens(tmp_path, corpus, monkeypatch):
    run = config(f"text:{corpus}")
    first = prepare_data(run, tmp_path / "run")
    assert first.tokenizer.vocab_size == 512
    assert first.stores["text"].tokenizer().fingerprint == first.tokenizer.fingerprint
    assert not first.reports["text"].reused

    def not_again(*args):
        raise AssertionError("the corpus was read again")

    monkeypatch.setattr(prepare, "WorkerPool", not_again)
    again = prepare_data(run, tmp_path / "run")
    assert again.reports["text"].reused and again.reports["text"].fingerprint == first.stores["text"].fingerprint
    other = prepare_data(run, tmp_path / "run", build=False)
    assert other.stores["text"].fingerprint == first.stores["text"].fingerprint
    assert other.tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(StoreError, match="was written for other data settings"):
        prepare_data(with_store(run, heldout_permille=7), tmp_path / "run", build=False)
    with pytest.raises(StoreError, match="the process that builds has to come first"):
        prepare_data(run, tmp_path / "other", build=False)
    # A store that is there already brings its tokenizer along.
    ready = with_store(run, source="", path=str(first.stores["text"].path))
    assert prepare_data(ready, tmp_path / "ready").tokenizer.fingerprint == first.tokenizer.fingerprint
    monkeypatch.undo()
    # Changed text is another store in the cache, beside the old one.
    (corpus / "new.txt").write_text("something new")
    changed = prepare_data(run, tmp_path / "run")
    assert changed.stores["text"].path != first.stores["text"].path
    assert first.stores["text"].path.exists()


def test_a_tokenizer_is_trained_on_the_first_training_documents_by_hash(tmp_path, corpus, monkeypatch):
    train, _ = in_order(make_documents(60))
    limit = 700
    seen = []

    def fake(texts, vocab_size):
        seen.append((list(texts), vocab_size))
        return model

    model = tokenizers.train_sentencepiece((text.decode() for text in train), 512)
    monkeypatch.setattr(tokenizers, "train_sentencepiece", fake)
    prepare_tokenizer(config(f"text:{corpus}", sample_bytes=limit), tmp_path / "a")
    monkeypatch.setattr(sources, "_unit_bytes", lambda total: 300)
    prepare_tokenizer(config(f"text:{corpus}", sample_bytes=limit), tmp_path / "b")
    assert seen[0] == seen[1]
    texts, vocab_size = seen[0]
    assert vocab_size == 512
    assert "".join(texts) == b"".join(train)[:limit].decode(errors="ignore")


def test_a_sample_of_a_large_file_does_not_hold_its_text(tmp_path):
    """A packed file is one unit, of any size."""
    documents = [f"{number} {os.urandom(500).hex()}".encode() for number in range(6000)]  # 6 MB
    lines = b"".join(json.dumps({"text": text.decode()}).encode() + b"\n" for text in documents)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    train, _ = in_order(documents)
    (unit,) = list_source(f"jsonl:{tmp_path}", "text").units
    del documents, lines
    tracemalloc.start()
    try:
        sampled = pieces.sample_unit(unit, PERMILLE, 100_000, b"")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    found = [text for _, text in sampled.documents]
    assert found == train[: len(found)] and 100_000 <= sum(map(len, found)) < 102_000
    assert peak < 1_000_000, peak


def test_what_a_tokenizer_cannot_give_back_is_left_out_and_counted(tmp_path):
    class Lossy(ByteTokenizer):
        def decode(self, ids):
            return super().decode(ids).replace("🙂", ":)")

    folder = write_files(tmp_path / "corpus", [b"plain", "smile 🙂".encode()])
    (tmp_path / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_cached_tokenizer", lambda file: Lossy())
        (unit,) = list_source(f"text:{folder}", "text").units
        report = pieces.tokenise_unit(unit, pieces.TokenizerFile("bytes", "", Ends()), str(tmp_path / "runs"), "u")
    assert report.skipped == {"changed_by_tokenizer": 1}
    assert report.tokens == 1 + len(b"plain")


def test_a_store_of_something_else_is_never_used_or_overwritten(tmp_path, corpus):
    run = config(f"text:{corpus}", path=str(tmp_path / "mine"), kind="bytes")
    before = prepare_data(run, tmp_path / "run").stores["text"].fingerprint
    with pytest.raises(StoreError, match="holds out 200 documents in a thousand, not 7"):
        prepare_data(with_store(run, heldout_permille=7), tmp_path / "run")
    with pytest.raises(StoreError, match="was made with a bytes tokenizer"):
        prepare_data(config(f"text:{corpus}", path=str(tmp_path / "mine")), tmp_path / "run")
    (corpus / "new.txt").write_text("something new")
    with pytest.raises(StoreError, match=r"mine was made from 'text:.*' as it was then"):
        prepare_data(run, tmp_path / "run")
    assert TokenStore.open(tmp_path / "mine").fingerprint == before
    (tmp_path / "mine" / "manifest.json").unlink()
    with pytest.raises(StoreError, match="mine is not a complete token store"):
        prepare_data(run, tmp_path / "run")


def test_a_failed_preparation_leaves_nothing_under_the_final_name(tmp_path):
    folder = write_files(tmp_path / "corpus", [b"", b"\xff"])
    with pytest.raises(SourceError, match=r"gives no documents \(skipped: .*'empty': 1"):
        prepare_store(entry(f"text:{folder}"), ByteTokenizer(), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packing", ["split", "pack"])
def test_a_store_that_is_all_held_out_is_one_and_trained_on_by_none(tmp_path, corpus, packing):
    judge = write_files(tmp_path / "judge", [f"judge {number}".encode() for number in range(5)])
    run = config(f"text:{corpus}", kind="bytes")
    stores = run.data.stores | {"judge": StoreConfig(source=f"text:{judge}", heldout_permille=1000)}
    data = dataclasses.replace(run.data, stores=stores, packing=packing, sequence_length=16, batch_size=4)
    made = prepare_data(dataclasses.replace(run, data=data), tmp_path / "run")
    assert made.reports["judge"].documents == made.stores["judge"].split("heldout").num_documents == 5
    made.stores["judge"].verify()
    loader = Loader(made.stores, data, seed=0)
    assert set(loader.rows(3)) == {"text"} and loader.batch(3).tokens.shape == (4, 16)
    with pytest.raises(DataError, match="the store 'judge' has no tokens to train on: take it out of the mixture"):
        Loader(made.stores, dataclasses.replace(data, mixture=(("text", 1.0), ("judge", 1.0))), seed=0)


def test_prepared_stores_are_found_through_links_and_from_where_the_run_was_moved_to(tmp_path, corpus):
    (tmp_path / "deep" / "er" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "deep" / "er" / "run")
    for path in ("", str(tmp_path / "mine")):
        run = config(f"text:{corpus}", path=path, kind="bytes")
        made = prepare_data(run, tmp_path / "run").fingerprint()
        assert prepare_data(run, tmp_path / "run", build=False).fingerprint() == made
        moved = (tmp_path / "deep" / "er" / "run").rename(tmp_path / "moved")
        assert prepare_data(run, moved, build=False).fingerprint() == made
        moved.rename(tmp_path / "deep" / "er" / "run")


def test_what_a_run_reads_is_written_down_whole(tmp_path, corpus, monkeypatch):
    synced, sync = [], os.fsync

    def fsync(number):
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    run = config(f"text:{corpus}")
    prepare_data(run, tmp_path / "run")
    names = [Path(path).name.removeprefix(".").rpartition(".")[0] for path in synced]
    assert "prepared.json" in names and any(name.startswith("tokenizer-") for name in names)
    (tmp_path / "run" / "data" / "prepared.json").write_bytes(b"")  # as a crash of the machine leaves what was not
    with pytest.raises(StoreError, match="prepared.json is not there, or not whole: the process that builds"):
        prepare_data(run, tmp_path / "run", build=False)
    prepare_data(run, tmp_path / "run")
    prepare_data(run, tmp_path / "run", build=False)


def test_settings_that_cannot_work_are_refused(tmp_path, corpus):
    with pytest.raises(SourceError, match="data.stores is empty"):
        prepare_data(Config(), tmp_path)
    with pytest.raises(
        TokenizerError, match="257 ids and the embedding only 100 rows: set model.vocab_size=257 or more"
    ):
        prepare_data(config(f"text:{corpus}", vocab_size=100, kind="bytes"), tmp_path)
    with pytest.raises(TokenizerError, match=r"kind=huggingface needs its file: set data.tokenizer.path"):
        prepare_data(config(f"text:{corpus}", kind="huggingface"), tmp_path)
    with pytest.raises(StoreError, match=r"data.stores.text has neither a source nor a path"):
        prepare_data(config("", kind="bytes"), tmp_path)


def test_a_damaged_heldout_document_is_named(tmp_path, corpus):
    store = prepare_store(entry(f"text:{corpus}"), ByteTokenizer(), tmp_path / "out", workers=1).store
    store.split("heldout").byte_lengths = store.split("heldout").byte_lengths + np.array([1])
    with pytest.raises(StoreError, match="held-out document 0 of .* decodes to"):
        list(heldout_documents(store))


def test_workers_do_not_import_jax_and_their_death_is_told():
    with WorkerPool(2) as pool:
        list(pool.map(eval, [("__import__('maxlm.data.prepare') and 0",)] * 2))
        assert list(pool.map(eval, [("'jax' in __import__('sys').modules",)] * 4)) == [False] * 4
        with pytest.raises(ZeroDivisionError):
            list(pool.map(divmod, [(1, 0)]))
    with WorkerPool(1) as pool, pytest.raises(WorkerError, match="ended with code 3"):
        list(pool.map(os._exit, [(3,)]))


def test_what_a_unit_reports_is_on_the_disk_before_its_report(tmp_path, monkeypatch):
    """A crash of the machine leaves a report only where the files that it names are whole."""
    synced: list[tuple[str, int]] = []
    sync = os.fsync

    def fsync(number):
        synced.append((Path(os.readlink(f"/proc/self/fd/{number}")).name, os.fstat(number).st_size))
        assert synced[-1][0].rpartition(".")[2].isdigit()  # by which it is known as one that is being written
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    source = write_files(tmp_path / "source", make_documents(9))
    (unit,) = list_source(f"text:{source}", "text").units
    out = tmp_path / "out"
    out.mkdir()
    report = pieces.tokenise_unit(unit, pieces.TokenizerFile("bytes", "", Ends()), str(out), "unit")
    sizes = [(f".{path.name}", path.stat().st_size) for path in out.iterdir()]
    assert len(report.runs) == 1 and len(sizes) == 3 and all(size for _, size in sizes)
    written = [(name.rpartition(".")[0], size) for name, size in synced]
    assert sorted(written) == sorted(sizes) and written[-1][0] == ".unit.json"


def test_processes_of_one_number_that_write_the_same_file_each_write_a_whole_one(tmp_path, monkeypatch):
    """As the first processes of two containers that share a disk: of what one writes the other takes nothing away."""
    path, sync, beside = tmp_path / "file", os.fsync, []

    def fsync(number):
        beside.append(os.readlink(f"/proc/self/fd/{number}"))
        if len(beside) == 1:
            write_among_others(path, "the second")
            assert path.read_text() == "the second"
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_among_others(path, "first")
    assert path.read_text() == "first" and len(set(beside)) == 2 and list(tmp_path.iterdir()) == [path]


def test_a_bar_names_a_source_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("tokenising text:x[/v2]", 10) as progress:
        progress.advance(10)
    assert "tokenising text:x[/v2]" in capsys.readouterr().err
