"""The run that is tormented: what it trains, its processes on this machine, and what its folder tells of it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from maxlm.checkpoint.reader import CheckpointReader
from maxlm.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MlpConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    StoreConfig,
    TokenizerConfig,
    TrainConfig,
)
from maxlm.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent
EVERY = 4  # steps between checkpoints


class Lost(Exception):
    """Something that must not be lost was, or a process behaved otherwise than documented."""


def tiny(folder: Path, *, steps: int, processes: int) -> Config:
    """A run whose corpus lies in `folder`."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    words, draw = ["the", "cat", "dog", "tree", "house", "sees", "takes", "and", "or", "then"], random.Random(0)
    for number in range(60):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(20, 200)))
        (corpus / f"{number:03d}.txt").write_text(f"document {number}\n{text}\n")
    return Config(
        name="torture",
        model=ModelConfig(
            vocab_size=264,
            embed_dim=32,
            num_layers=2,
            attention=AttentionConfig(q_heads=4, kv_heads=2, head_dim=16),
            mlp=MlpConfig(dim=64),
        ),
        data=DataConfig(
            stores={"tiny": StoreConfig(source=f"text:{corpus}/*.txt", heldout_permille=100)},
            tokenizer=TokenizerConfig(kind="bytes"),
            sequence_length=64,
            batch_size=8,
            workers=1,
        ),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=2),
        parallel=ParallelConfig(data=max(processes // 2, 1), fsdp=min(processes, 2)),
        train=TrainConfig(
            steps=steps,
            precision="float32",
            loss_chunk=256,
            compilation_cache=str(folder / "xla"),
            watchdog=(10.0, 60.0),
        ),
        checkpoint=CheckpointConfig(every_steps=EVERY, keep_latest=3),
        eval=EvalConfig(batch_size=8, prompts=()),
    )


# Processes that share two cores take up to half a minute to come. Where one is told to leave before, the others wait.
JOIN_SECONDS = 90


class Company:
    """The processes of one start of a run."""

    def __init__(self, config: Path, workdir: Path, *, processes: int, devices: int, silence: float):
        """Starts them, each on as many devices; one is lost after `silence` seconds without a sign."""
        self.workdir, self.log = workdir, config.parent / f"{workdir.name}.log"
        self.begun = self.log.stat().st_size if self.log.exists() else 0
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            where = f"localhost:{probe.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if name != "NPROC"} | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        }
        command = [sys.executable, "-m", "maxlm.cli", "train", f"--config={config}", f"--workdir={workdir}"]
        self.processes = []
        for number in range(processes):
            place = [f"--coordinator={where}", f"--processes={processes}", f"--process={number}"]
            place += [f"--silence_seconds={silence}", f"--join_seconds={JOIN_SECONDS}"]
            with self.log.open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        command + (place if processes > 1 else []), cwd=ROOT, env=environment, stdout=log, stderr=log
                    )
                )

    def said(self) -> str:
        """What the processes have printed since this start."""
        return self.log.read_bytes()[self.begun :].decode(errors="replace")

    def running(self) -> bool:
        """Whether none of them has ended."""
        return all(process.poll() is None for process in self.processes)

    def wait(self, but: int | None = None, *, within: float = 900.0) -> list[int | None]:
        """The exit codes of all, except for one that is known not to end."""
        deadline = time.monotonic() + within
        for number, process in enumerate(self.processes):
            if number != but:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0.1))
        codes = [process.returncode for process in self.processes]
        if any(code is None for number, code in enumerate(codes) if number != but):
            self.kill()
            raise Lost(f"processes did not end within {within:.0f} s: {codes}\n{self.said()[-3000:]}")
        return codes

    def kill(self) -> None:
        """SIGKILL to all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def newest(workdir: Path) -> int:
    """The step of the newest checkpoint."""
    return max(CheckpointReader(workdir / "checkpoints", log=lambda _: None).steps(), default=0)


def last_step(workdir: Path) -> int:
    """The last step that the files on the disk know of; a few seconds may be missing."""
    return max((record["step"] for record in read_metrics(workdir, "step")), default=newest(workdir))


def joined(company: Company) -> bool:
    """Whether all processes of this start had found each other, as far as can be seen from outside."""
    return len(company.processes) == 1 or company.said().count("this is process") == len(company.processes)


def digests(workdir: Path, step: int) -> Any:
    """The digests of every array of a checkpoint, as it holds them, by which equal states are equal."""
    count = len(CheckpointReader(workdir / "checkpoints", log=lambda _: None).record(step).arrays)
    asked = ocp.args.PyTreeRestore(
        item={"digests": np.zeros((count, 2), np.uint32)},
        restore_args={"digests": ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.uint32)},
        partial_restore=True,
    )
    return (
        ocp.PyTreeCheckpointHandler()
        .restore(workdir / "checkpoints" / str(step) / "state", args=asked)["digests"]
        .tolist()
    )
