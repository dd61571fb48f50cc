"""Starting one run of a study: as a process here, on some of the cores, or through a launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from maxlm import programs
from maxlm.configfile import source
from maxlm.files import write_atomically
from maxlm.study.plan import PlannedRun
from maxlm.study.spec import StudyError


class Process(Protocol):
    """What the runner asks of a started run (of subprocess.Popen)."""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""

    def terminate(self) -> None:
        """Asks it to save and leave."""


Launch = Callable[[PlannedRun, Path, Sequence[int], IO[Any]], Process]


def start_process(run: PlannedRun, workdir: Path, cores: Sequence[int], lock: IO[Any]) -> subprocess.Popen:
    """`maxlm train` on some cores; it keeps the lock for as long as it lives, and is told when this process dies."""
    words = [*programs.module_words("maxlm.cli"), "train"]
    return _start(words, run, workdir, cores, lock, environment=programs.environment())


def through(launcher: Sequence[str], study: str, *, commit: str) -> Launch:
    """Starts runs by a command of `launch/` that lasts as long as its job, with what a run is added: name, config,
    workdir and commit.

    A name is that of the run, so that a launcher that is started again finds the job that is under way. A launcher by
    itself looks HEAD up each time: a study lasts for days, and its runs are all to be of the commit that planned them.

    Args:
      commit: of this program (`identity.commit`).

    Raises:
      StudyError: there is no such commit, or the launcher is told of one.
    """
    if any(word.partition("=")[0] == "--commit" for word in launcher):
        raise StudyError(
            "--launcher says --commit, but all runs of a study are of the commit that plans them; leave it out, and "
            "check out the commit that is to run"
        )
    if commit.endswith("+"):
        raise StudyError(
            f"the tree has changes that its commit {commit[:12]} lacks, and what a launcher starts is a commit; commit "
            "them, or run the study without --launcher"
        )
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise StudyError(
            f"what a launcher starts is a commit, but the MaxLM that runs here is of none ({commit}); run the study "
            "from a checkout"
        )

    def start(run: PlannedRun, workdir: Path, cores: Sequence[int], lock: IO[Any]) -> subprocess.Popen:
        prefix = re.sub("[^a-z0-9]+", "-", study.lower()).strip("-")[:20].strip("-")
        return _start([*launcher, f"--name=s-{prefix}-{workdir.name}", f"--commit={commit}"], run, workdir, (), lock)

    return start


def _start(
    words: Sequence[str],
    run: PlannedRun,
    workdir: Path,
    cores: Sequence[int],
    lock: IO[Any],
    *,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen:
    config = workdir / "given.py"
    write_atomically(config, source(run.config))
    command = [*words, f"--config={config}", f"--workdir={workdir}"]
    with (workdir / "log.txt").open("ab") as out:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=[lock.fileno()],
            preexec_fn=lambda: _in_child(cores),
            start_new_session=True,  # Ctrl-C is for this process, which asks the runs to stop
        )


def _in_child(cores: Sequence[int]) -> None:
    """Before the program of a run begins: its share of the cores, and a SIGTERM when the parent is gone (Linux)."""
    if sys.platform != "linux":
        return
    if cores:
        os.sched_setaffinity(0, cores)
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
