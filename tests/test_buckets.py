"""Whole runs in a bucket: killed machines, failing saves, and no secret in anything that was written or said."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from maxlm.checkpoint.bucket import open_reader
from maxlm.cli import main
from maxlm.storage import Folder
from maxlm.train import loop
from maxlm.train import run as opening
from maxlm.train.loop import TrainingStopped
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train
from tests.buckets import SECRET
from tests.tiny import tiny_config, write_corpus

SMALL = {"parallel__data": 4, "parallel__fsdp": 2, "data__sequence_length": 32, "model__num_layers": 1}


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", 20)


def config(corpus: Path, steps: int, **leaves):
    given = {
        "train__steps": steps,
        "checkpoint__every_steps": 3,
        "optim__schedule": "constant",
        "eval__documents": 2,
        **SMALL,
    }
    return tiny_config(corpus, **{**given, **leaves})


def steps_of(folder: Path) -> list[tuple[int, str, str]]:
    return [(r["step"], str(r["loss"]), str(r["batch"])) for r in read_metrics(folder, "step")]


def fetch(url: str, name: str, to: Path) -> Path:
    Folder(url).download(name, to / name)
    return to


def no_secret(bucket: str, tmp_path: Path, said: str) -> None:
    """Nothing that was said or written, there or here, has the secret in it."""
    written = [Folder(bucket).read(name) for name in Folder(bucket).names()]
    written += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 50 and SECRET not in said and not any(SECRET.encode() in content for content in written)


@pytest.mark.slow
def test_a_run_in_a_bucket_outlives_a_save_that_fails_and_tells_no_secret(bucket, server, corpus, tmp_path, capfd):
    url, lines, refused = f"{bucket}/runs/one", [], []

    def third_step(method, name):  # the save after step 3 is refused
        refused.extend([name] * (not refused and method == "PUT" and "/3-" in name and "/c/" in name))
        return name in refused

    server.concerns, server.refuse = third_step, True
    assert train(config(corpus, 4), url, log=lines.append) == 0
    assert len(refused) == 1 and any("checkpoint 3 was not saved" in line for line in lines)
    assert open_reader(f"{url}/checkpoints").steps() == [4]
    copy = fetch(url, "metrics.jsonl", tmp_path / "copy")
    assert [step for step, _, _ in steps_of(copy)] == [1, 2, 3, 4]
    failed = list(read_metrics(copy, "checkpoint_failed"))
    assert [record["in_row"] for record in failed] == [1] and "PERMISSION_DENIED" in failed[0]["reason"]
    report = json.loads((fetch(url, "report.json", tmp_path / "copy") / "report.json").read_text())
    assert report["steps"] == 4 and report["failed_saves"] == 1
    assert f"--workdir={url}" in Folder(url).read("report.md").decode()
    captured = capfd.readouterr()
    no_secret(bucket, tmp_path, "\n".join([*lines, captured.out, captured.err]))


@pytest.mark.slow
def test_a_run_goes_on_on_an_empty_machine(bucket, server, corpus, tmp_path, monkeypatch, capfd):
    url, lines = f"{bucket}/runs/one", []
    assert train(config(corpus, 7), tmp_path / "whole", log=lines.append) == 0
    server.fail_every, server.delay_every, server.delay = 9, 13, 0.05
    assert train(config(corpus, 4), url, log=lines.append) == 0
    shutil.rmtree(os.environ["MAXLM_CACHE"])
    monkeypatch.setenv("MAXLM_CACHE", str(tmp_path / "another machine"))
    assert train(config(corpus, 7), url, log=lines.append) == 0
    assert any("continuing from the checkpoint of step 4" in line for line in lines), lines
    assert steps_of(fetch(url, "metrics.jsonl", tmp_path / "copy")) == steps_of(tmp_path / "whole")
    report = json.loads((fetch(url, "report.json", tmp_path / "copy") / "report.json").read_text())
    assert report["steps"] == 7 and report["processes"] == 2
    assert main(["generate", f"--workdir={url}", "--prompt=document", "--max_tokens=4"]) == 0
    captured = capfd.readouterr()
    assert "\ndocument" in captured.out
    no_secret(bucket, tmp_path, "\n".join([*lines, captured.out, captured.err]))


@pytest.mark.slow
def test_saves_that_go_on_failing_end_the_run_with_the_reason(bucket, server, corpus, tmp_path):
    url, lines = f"{bucket}/runs/two", []
    server.concerns, server.refuse = lambda method, name: method == "PUT" and "/checkpoints/" in name, True
    with pytest.raises(TrainingStopped, match="last 2 checkpoints could not be saved.*PERMISSION_DENIED"):
        train(config(corpus, 12, checkpoint__max_failures=2), url, log=lines.append)
    server.heal()
    steps = [step for step, _, _ in steps_of(fetch(url, "metrics.jsonl", tmp_path / "copy"))]
    assert 6 <= steps[-1] < 12  # two saves were tried, and the run went on after the first
    assert sum("was not saved" in line for line in lines) == 2


@pytest.mark.slow
def test_local_copies_are_taken_where_they_go_beyond_the_checkpoint(corpus, tmp_path, monkeypatch):
    def killed(run, state):
        raise KeyboardInterrupt

    lines: list[str] = []
    given = {"checkpoint__local_dir": str(tmp_path / "disk"), "checkpoint__local_every_steps": 2}
    given |= {"checkpoint__every_steps": 100, "checkpoint__mtbf_hours": 10.0, "optim__guard__max_rejections": 8}
    place = tmp_path / "run"
    assert train(config(corpus, 7), tmp_path / "whole", log=lines.append) == 0
    with monkeypatch.context() as patch:  # killed before its first checkpoint
        patch.setattr(opening, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(corpus, 5, **given), place, log=lines.append)
    assert train(config(corpus, 7, **given), place, log=lines.append) == 0
    assert any("using the local copies of step" in line for line in lines)
    assert any("continuing from the checkpoint of step" in line for line in lines)
    assert steps_of(place) == steps_of(tmp_path / "whole")
    assert {"copy", "checkpoint"} == {key for record in read_metrics(place, "pace") for key in record} - {
        "kind",
        "step",
    }
    assert not list((tmp_path / "disk").iterdir())  # the run has ended


@pytest.mark.slow
def test_a_full_disk_at_the_end_is_tried_again(corpus, tmp_path, monkeypatch):
    """The last save has no later one: it is repeated until it is there."""
    lines, place = [], tmp_path / "run"
    monkeypatch.setattr(loop, "RETRY_SECONDS", 0.1)

    def log(line: str) -> None:
        lines.append(line)
        if "was not saved" in line:
            (place / "checkpoints").unlink(missing_ok=True)  # room is made

    real = opening.finish

    def full(run, state):
        shutil.rmtree(place / "checkpoints")
        (place / "checkpoints").write_text("no folder can be made here")
        real(run, state)

    monkeypatch.setattr(opening, "finish", full)
    assert train(config(corpus, 4), place, log=log) == 0
    assert sum("checkpoint 4 was not saved" in line for line in lines) >= 1
    assert (place / "checkpoints" / "4" / "commit_success.txt").is_file()
    assert json.loads((place / "report.json").read_text())["failed_saves"] >= 1
    assert np.isfinite(json.loads((place / "report.json").read_text())["train_loss"])
