"""What the accounts of tortured runs say of their costs, and what the simulator of `maxlm plan` makes of these.

The simulator (`maxlm.plan.mtbf`) knows a run by a few figures: what a save stalls and when it is committed, what a
restart takes, how far failures lie apart. Here each of them is measured on runs that were really killed, and so is the
share of the time that went into steps that were kept. Both count a step as what the median one takes, from the first
process's beginning until the last step; evaluation and report are no part of the simulation.

Faults of the torture are not those of the simulation, which come at random and warn nobody: some come with a
checkpoint, SIGTERM loses nothing, a damaged checkpoint loses more. The two shares are near each other, not equal.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.checkpoint.reader import COMMIT_MARKER, CheckpointReader
from maxlm.plan.mtbf import Costs, simulate
from maxlm.train.metrics import read_metrics

FAILURES = 20_000  # simulated: the standard error of their mean time is 0.7%


class Life(NamedTuple):
    """A start that made steps. lasted: seconds from its program's being there to the fault, or to the last step.

    saves: steps that were saved by it; stalled: seconds beside the steps, for saves and data, until the last of these.
    warming: what the first step took longer than others, by what is set up with it; None: no save tells.
    """

    lasted: float
    saves: int = 0
    stalled: float = 0.0
    warming: float | None = None


class Costed(NamedTuple):
    """A run that came to its end. wall: seconds until its last step; writes: from a save's begin to its commit."""

    steps: int
    every: int
    step_seconds: float
    wall: float
    lives: list[Life]
    writes: list[float]


class Simulated(NamedTuple):
    """Seconds of the tortured runs as the simulator takes them, the share that it foretells and that which was seen."""

    mtbf: float
    every: float
    stall: float
    write: float
    restart: float
    share: float
    measured: float

    @property
    def apart(self) -> float:
        """How far the two shares lie apart, relative to the one that was seen."""
        return abs(self.share / self.measured - 1)


def costed(workdir: Path, records: Sequence[dict[str, Any]], faults: Sequence[float], *, every: int) -> Costed:
    """What a run that has come to its end has cost.

    Args:
      records: of its ledger.
      faults: when they were thrown, in seconds since 1970.
      every: steps between saves.
    """
    accounts = [list(group) for _, group in itertools.groupby(records, key=lambda record: record["process"])]
    seconds = [record["seconds"] for record in read_metrics(workdir, "step")]
    step = statistics.median(seconds)
    begun, ends, lives = accounts[0][0]["begun"], [0.0], []
    for number, account in enumerate(accounts):
        training = [record for record in account if not record["seconds"].get("evaluation")]
        last = training[-1]
        if last["start_step"] is None or last["step"] <= last["start_step"]:
            continue  # it was ended before a step was made, and is a part of the restart
        first = last["begun"] + sum(last["seconds"].get(name, 0.0) for name in ("start", "compile", "restore"))
        until = accounts[number + 1][0]["begun"] if number + 1 < len(accounts) else math.inf
        fell = min((at for at in faults if first <= at <= until), default=math.inf)
        # A killed process has not written down its last moments; one that came to the evaluation has trained no more.
        ends.append(last["time"] if len(training) < len(account) or fell == math.inf else fell)
        lives.append(_life(training, ends[-1] - first, step))
    reader = CheckpointReader(workdir / "checkpoints", log=lambda _: None)
    writes = []
    for saved in reader.steps():
        with contextlib.suppress(OSError, ValueError):  # one that was damaged
            writes.append((reader.path(saved) / COMMIT_MARKER).stat().st_mtime - reader.record(saved).saved_at)
    return Costed(len(seconds), every, step, max(ends) - begun, lives, writes)


def _life(training: Sequence[dict[str, Any]], lasted: float, step: float) -> Life:
    """Of the records of a start until its evaluation, where a step takes `step` seconds."""
    start = training[-1]["start_step"]
    saved = [record for record in training if record["mark"] and record["step"] > start]
    if not saved:
        return Life(lasted)
    first, last = saved[0], saved[-1]["seconds"]
    stalled = last.get("checkpoint_stall", 0.0) + last.get("data_wait", 0.0)
    warming = first["seconds"].get("step", 0.0) - (first["step"] - start) * step
    return Life(lasted, len({record["step"] for record in saved}), stalled, max(warming, 0.0))


def simulated(runs: Sequence[Costed]) -> Simulated | None:
    """The simulation with the costs of these runs; None: too little has happened to know them."""
    lives = [life for run in runs for life in run.lives]
    writes = [seconds for run in runs for seconds in run.writes]
    saves = sum(life.saves for life in lives)
    if not saves or not writes:
        return None
    # A restart lasts until the first step is made.
    warming = statistics.median(life.warming for life in lives if life.warming is not None)
    trained = sum(max(life.lasted - warming, 0.0) for life in lives)
    wall = sum(run.wall for run in runs)
    mtbf = trained / len(lives)
    every = statistics.median(run.every * run.step_seconds for run in runs)
    stall = sum(life.stalled for life in lives) / saves
    costs = Costs(stall, statistics.mean(writes), (wall - trained) / len(lives))
    found = simulate(1, costs, chip_mtbf=mtbf, failures=FAILURES, every=every)
    return Simulated(mtbf, every, *costs, found.goodput, sum(run.steps * run.step_seconds for run in runs) / wall)
