"""Real processes of a tiny run, started, watched and killed by tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.reader import CheckpointReader
from maxlm.configfile import source
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.metrics import read_metrics
from maxlm.train.setup import make_setup
from tests.conftest import FAST_COMPILE
from tests.tiny import tiny_config, write_corpus

ROOT = Path(__file__).parent.parent
STEPS = 120


class Runs:
    """Starts processes of one config, which share a corpus and a cache of compiled programs."""

    def __init__(self, folder: Path, *, steps: int = STEPS, **leaves):
        self.folder, self.total = folder, steps
        corpus = write_corpus(folder / "corpus")
        leaves = {"checkpoint__every_steps": 4, "train__compilation_cache": str(folder / "xla")} | leaves
        config = tiny_config(corpus, train__steps=steps, **leaves)
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

    @staticmethod
    def place(processes: int) -> list[str]:
        """Flags that say where processes on this machine meet: coordinator first."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        return [f"--coordinator=localhost:{port}", f"--processes={processes}"]

    def start_together(self, name: str, *, processes: int, **kwargs) -> list[subprocess.Popen]:
        """A run of several processes on this machine, process 0 first."""
        given, place = kwargs.pop("overrides", ()), self.place(processes)
        return [
            self.start(name, overrides=(*given, *place, f"--process={number}"), **kwargs) for number in range(processes)
        ]

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
            restored = checkpointer.restore(setup.abstract_state(), step=self.total)
        assert restored is not None
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored.state)]
