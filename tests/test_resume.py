"""Real processes, killed at random moments: the run that was killed ends exactly like the one that never was."""

import json
import random
import signal
import time

import numpy as np
import pytest

from maxlm.train.goodput import BUCKETS
from maxlm.train.signals import EXIT_PREEMPTED
from tests.runs import STEPS, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("resume"))
    runs.finish("whole")
    return runs


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Runs:
    samples = {"eval__prompts": ("document 1\n",), "eval__sample_tokens": 8}
    runs = Runs(tmp_path_factory.mktemp("short"), steps=20, **samples)
    runs.finish("whole")
    return runs


def test_a_whole_run_accounts_for_its_time_and_reports(short):
    report = json.loads((short.folder / "whole" / "report.json").read_text())
    assert set(report["goodput"]) == set(BUCKETS)
    assert sum(report["goodput"].values()) == pytest.approx(report["wall_seconds"], abs=0.01)
    assert report["steps"] == report["updates"] == short.total
    assert 0 < report["heldout_bits_per_byte"] < 8
    assert report["xz_bits_per_byte"] > 0
    assert report["samples"][0]["prompt"] == "document 1\n"
    losses = [record["loss"] for record in short.steps("whole")]
    assert len(losses) == short.total and losses[-1] < losses[0]


@pytest.mark.slow
def test_killed_several_times_it_ends_bit_identical(runs):
    rng = random.Random(time.time_ns())  # another moment each time: the property has to hold at every one
    moments = sorted(rng.randrange(4, STEPS - 8, 4) for _ in range(3))
    delays = [rng.uniform(0.0, 0.05) for _ in moments]  # right after a checkpoint appears, the next is under way soon
    for moment, delay in zip(moments, delays, strict=True):
        runs.kill_after("killed", moment, delay)
    runs.finish("killed")
    told = f"killed at {moments} after {delays}"
    assert runs.steps("killed") == runs.steps("whole"), told
    assert runs.arrays("killed") == runs.arrays("whole"), told
    goodput = json.loads((runs.folder / "killed" / "report.json").read_text())["goodput"]
    assert goodput["restore"] > 0


@pytest.mark.slow
def test_other_device_counts_consume_the_same_tokens(runs):
    runs.kill_after("elastic", 20, 0.02, devices=8, overrides=("--config.parallel.fsdp=4",))
    runs.kill_after("elastic", 60, 0.0, devices=4, overrides=("--config.parallel.tensor=2",))
    runs.finish("elastic", devices=2)
    whole, elastic = runs.steps("whole"), runs.steps("elastic")
    assert [record["batch"] for record in elastic] == [record["batch"] for record in whole]
    assert len({record["batch"] for record in whole}) == STEPS
    np.testing.assert_allclose(
        [record["loss"] for record in elastic], [record["loss"] for record in whole], rtol=1e-4
    )  # over 120 steps the last bits of different meshes add up


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_its_own_exit_code(runs):
    process = runs.start("stopped")
    while runs.newest("stopped") < 8:
        assert process.poll() is None, runs.log("stopped")
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED, runs.log("stopped")
    saved = runs.newest("stopped")
    assert len(runs.steps("stopped")) == saved  # it left at the step that it saved
    runs.finish("stopped")
    assert runs.steps("stopped") == runs.steps("whole")
    assert runs.arrays("stopped") == runs.arrays("whole")


def test_finished_and_started_again_it_changes_nothing(short):
    before = short.arrays("whole")
    short.finish("whole")
    assert short.arrays("whole") == before
    assert len(short.steps("whole")) == short.total


def test_another_corpus_is_refused(short):
    (short.folder / "corpus" / "new.txt").write_text("a document that was not there before\n")
    try:
        process = short.start("whole")
        assert process.wait(timeout=100) == 1
        assert "Traceback" not in short.log("whole")
    finally:
        (short.folder / "corpus" / "new.txt").unlink()
