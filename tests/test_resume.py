"""Real processes, killed at random moments: the run that was killed ends exactly like the one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.reader import CheckpointReader
from maxlm.configfile import source
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.goodput import BUCKETS
from maxlm.train.metrics import read_metrics
from maxlm.train.setup import make_setup
from maxlm.train.signals import EXIT_PREEMPTED
from tests.conftest import FAST_COMPILE
from tests.tiny import tiny_config, write_corpus

ROOT = Path(__file__).parent.parent
STEPS = 120


class Runs:
    """Starts processes of one config, which share a corpus and a cache of compiled programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        corpus = write_corpus(folder / "corpus")
        config = tiny_config(
            corpus, train__steps=STEPS, checkpoint__every_steps=4, train__compilation_cache=str(folder / "xla")
        )
        self.config = folder / "config.py"
        self.config.write_text(source(config))

    def start(self, name: str, *, devices: int = 1, overrides: tuple[str, ...] = ()) -> subprocess.Popen:
        environment = dict(os.environ)
        environment.pop("NPROC", None)  # the program is to find its own
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
        command = [
            sys.executable,
            "-m",
            "maxlm.cli",
            "train",
            f"--config={self.config}",
            f"--workdir={self.folder / name}",
        ]
        with open(self.folder / f"{name}.log", "a") as log:
            return subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment, stdout=log, stderr=log)

    def finish(self, name: str, **kwargs) -> None:
        assert self.start(name, **kwargs).wait(timeout=300) == 0, self.log(name)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def newest(self, name: str) -> int:
        return max(CheckpointReader(self.folder / name / "checkpoints", log=lambda _: None).steps(), default=0)

    def kill_after(self, name: str, step: int, delay: float, **kwargs) -> None:
        """Starts, waits for a checkpoint of at least `step`, waits `delay` more, and kills with SIGKILL."""
        process = self.start(name, **kwargs)
        deadline = time.monotonic() + 200
        while self.newest(name) < step:
            assert process.poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def steps(self, name: str) -> list[dict]:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(self.folder / name, "step")]

    def arrays(self, name: str) -> list[bytes]:
        """The bytes of every array of the last checkpoint: parameters, optimizer state and the rest."""
        config = resolve(json.loads((self.folder / name / "config.json").read_text()), devices=1)
        setup = make_setup(config, make_mesh(config.parallel, jax.devices()[:1]))
        with Checkpointer(self.folder / name / "checkpoints", config.checkpoint, log=lambda _: None) as checkpointer:
            restored = checkpointer.restore(setup.abstract_state(), step=STEPS)
        assert restored is not None
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored.state)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("resume"))
    runs.finish("whole")
    return runs


def test_a_whole_run_accounts_for_its_time_and_reports(runs):
    report = json.loads((runs.folder / "whole" / "report.json").read_text())
    assert set(report["goodput"]) == set(BUCKETS)
    assert sum(report["goodput"].values()) == pytest.approx(report["wall_seconds"], abs=0.01)
    assert report["steps"] == report["updates"] == STEPS
    assert 0 < report["heldout_bits_per_byte"] < 8
    assert report["xz_bits_per_byte"] > 0
    assert report["samples"][0]["prompt"] == "document 1\n"
    losses = [record["loss"] for record in runs.steps("whole")]
    assert len(losses) == STEPS and losses[-1] < losses[0]


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


def test_finished_and_started_again_it_changes_nothing(runs):
    before = runs.arrays("whole")
    runs.finish("whole")
    assert runs.arrays("whole") == before
    assert len(runs.steps("whole")) == STEPS


def test_another_corpus_is_refused(runs):
    (runs.folder / "corpus" / "new.txt").write_text("a document that was not there before\n")
    try:
        process = runs.start("whole")
        assert process.wait(timeout=100) == 1
        assert "Traceback" not in runs.log("whole")
    finally:
        (runs.folder / "corpus" / "new.txt").unlink()
