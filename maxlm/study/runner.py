"""Running a study: what is finished is left alone, what was killed continues, what fails is reported and passed over.

Each run is a `maxlm train` of its own, one after another or several at a time with the machine's cores shared out. A
run's folder is locked by the process that trains in it, so that a run left over from a study that was killed is waited
for and never trained twice at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from maxlm import programs
from maxlm.files import NoLocks, try_lock
from maxlm.study.identity import commit, fingerprint_of, run_name
from maxlm.study.plan import PlannedRun, plan
from maxlm.study.results import (
    Result,
    check_unchanged,
    outcome,
    read_result,
    weights_wanted,
    write_plan,
    write_result,
)
from maxlm.study.spec import Machine, Study, StudyError
from maxlm.study.starting import Launch, Process, start_process
from maxlm.train.home import WEIGHTS, Home, first_start, weights_given
from maxlm.train.metrics import FILE_NAME, cut_metrics, read_metrics
from maxlm.train.progress import format_duration
from maxlm.train.signals import EXIT_PREEMPTED

POLL_SECONDS = 0.5
REPORT_SECONDS = 30.0  # between lines of progress
_STOPPING = "asked to stop: the runs under way save and leave; the same command continues"
_LEAVING = (
    "asked to stop: the launchers are ended, but jobs that they have handed to a scheduler or to other hosts go on; "
    "the same command watches them again, and a launcher's own words stop them (docs/launch.md)"
)
Log = Callable[[str], None]


class Outcome(NamedTuple):
    """What became of a study's runs, as labels. `failed` says why by label; `strangers` took other data or weights."""

    finished: list[str]
    diverged: list[str]
    reused: list[str]
    failed: dict[str, str]
    strangers: list[str]
    interrupted: bool

    @property
    def code(self) -> int:
        """The exit code of the process."""
        return EXIT_PREEMPTED if self.interrupted else 1 if self.failed or self.strangers else 0


@dataclasses.dataclass
class _Running:
    run: PlannedRun
    workdir: Path
    process: Process
    slot: int
    began: float
    begun_at: float  # part of its steps that was done before


def run_study(
    study: Study,
    folder: Path,
    *,
    jobs: int = 0,
    launch: Launch | None = None,
    code: str = "",
    log: Log,
    poll: float = POLL_SECONDS,
) -> Outcome:
    """Runs what is left of a study.

    Args:
      folder: of the study; see `results`.
      jobs: runs at a time; 0: as the study's machine says.
      launch: starts a run; by default as a process of its own.
      code: the commit that `launch` starts, for the results; by default that of this program.

    Raises:
      StudyError: another process runs this study, a run that was begun is not what it was, nothing is held out, or
        this machine's devices are not those that the study is planned for.
      UserError: the data cannot be prepared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _taken(folder, log=log) or contextlib.nullcontext() as lock:
        if lock is None:
            raise StudyError(f"another `maxlm study run` is at work in {folder}; wait for it, or give another --dir")
        runs, fingerprint = _prepared(study, folder)
        names = {run.label: run_name(run.config, fingerprint) for run in runs}
        if len(set(names.values())) < len(names):
            raise StudyError("two runs of the study are one and the same; vary something that their results depend on")
        write_plan(folder, study, fingerprint, runs, names)
        stamp = _Stamp(fingerprint, code or commit())
        queue = _Queue(runs, {label: folder / "runs" / name for label, name in names.items()}, stamp, log)
        width = max(jobs or study.machine.jobs, 1)
        if queue.waiting and launch is None:
            _check_devices(study.machine, width)
        return queue.work(width, launch or start_process, poll=poll)


def _taken(folder: Path, *, log: Log = lambda _: None) -> IO[Any] | None:
    """The folder's lock file, locked; None: another has it. Without locks it is open alone, which is told."""
    path = folder / ".lock"
    try:
        return try_lock(path)
    except NoLocks as error:
        log(f"{folder} is on a file system without locks ({error}): see that no other `maxlm study run` works there")
        return path.open("a", encoding="utf-8")


class _Stamp(NamedTuple):
    fingerprint: str
    commit: str


class _Queue:
    """The runs that are left, and those under way."""

    def __init__(self, runs: Sequence[PlannedRun], workdirs: dict[str, Path], stamp: _Stamp, log: Log):
        self.runs, self.workdirs, self.stamp, self.log = list(runs), workdirs, stamp, log
        self.outcome = Outcome([], [], [], {}, [], False)
        self.waiting: list[PlannedRun] = []
        self.running: list[_Running] = []
        self.done: dict[str, Result] = {}
        self.seconds_predicted = self.seconds_taken = 0.0
        for run in self.runs:
            check_unchanged(workdirs[run.label], run)  # one that was killed would go on, and say what is so now
            result = read_result(workdirs[run.label])
            if result is None:
                self.waiting.append(run)
            else:
                self.done[run.label] = result
        self.outcome.reused.extend(run.label for run in self._ended() if not self._is_stranger(run))

    def work(self, width: int, launch: Launch, *, poll: float) -> Outcome:
        if not self.waiting:
            self.log(f"all {len(self.runs)} runs have ended already; nothing to do")
            if self.outcome.strangers:
                self._summary()
            return self.outcome
        if self.done:
            self.log(f"{len(self.done)} of {len(self.runs)} runs have ended already, {len(self.waiting)} are left")
        stopped, last = False, time.monotonic()
        with _told_to_stop() as asked:
            while self.waiting or self.running:
                if asked() and not stopped:
                    stopped = True
                    self.log(_STOPPING if launch is start_process else _LEAVING)
                    for item in self.running:
                        item.process.terminate()
                self._collect(stopping=stopped)
                if stopped and not self.running:
                    return self.outcome._replace(interrupted=True)
                while not stopped and len(self.running) < width and self._start(width, launch):
                    pass
                if self.waiting and not self.running and not self._can_go_on():
                    self._give_up_on_branches()
                if time.monotonic() - last > REPORT_SECONDS:
                    last = time.monotonic()
                    self.log(self.line(width))
                time.sleep(poll)
        self._summary()
        return self.outcome

    def line(self, width: int) -> str:
        """Where the study stands."""
        parts = []
        left = sum(run.seconds for run in self.waiting)
        predicted, taken = self.seconds_predicted, self.seconds_taken
        for item in self.running:
            part = _part_done(item.run, item.workdir)
            parts.append(f"{item.run.label} {part:.0%}")
            left += (1 - part) * item.run.seconds
            predicted += max(part - item.begun_at, 0.0) * item.run.seconds
            taken += time.monotonic() - item.began
        pace = taken / predicted if predicted > 30 else 1.0  # against the prediction, so far
        ended = len(self.done)
        failed = f", {len(self.outcome.failed)} failed" if self.outcome.failed else ""
        eta = format_duration(left * pace / width)
        return f"study: {ended}/{len(self.runs)} runs ended{failed}; now {', '.join(parts) or 'none'}; {eta} left"

    def _start(self, width: int, launch: Launch) -> bool:
        """Starts the next run that can be started; False if there is none."""
        for run in self.waiting:
            if run.branch and run.branch.trunk not in self.done:
                continue
            workdir = self.workdirs[run.label]
            workdir.mkdir(parents=True, exist_ok=True)
            with _taken(workdir) or contextlib.nullcontext() as lock:
                if lock is None:
                    continue  # left over from a study that was killed, and still training: later
                self.waiting.remove(run)
                slot = min(set(range(width)) - {item.slot for item in self.running})
                try:
                    if run.branch:
                        self._branch_off(run)
                    done = _part_done(run, workdir)
                    process = launch(run, workdir, _cores(slot, width), lock)
                except (OSError, StudyError) as error:
                    self._failed(run, str(error))
                    return True
                self.running.append(_Running(run, workdir, process, slot, time.monotonic(), done))
                how = f", from {done:.0%}" if done else ""
                self.log(f"{run.label} ({workdir.name}) begins{how}; about {format_duration(run.seconds)}")
                return True
        return False

    def _collect(self, *, stopping: bool) -> None:
        for item in list(self.running):
            code = item.process.poll()
            if code is None:
                continue
            self.running.remove(item)
            taken = time.monotonic() - item.began
            self.seconds_taken += taken
            self.seconds_predicted += (1 - item.begun_at) * item.run.seconds
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            result = None
            try:
                if code != EXIT_PREEMPTED:
                    result = outcome(item.workdir, item.run, commit=self.stamp.commit, now=now)
            except StudyError as error:
                self._failed(item.run, str(error))
                continue
            if result is not None and (code == 0 or result.status == "diverged"):
                write_result(item.workdir, result)
                self.done[item.run.label] = result
                if self._is_stranger(item.run):
                    continue
                known = self.outcome.finished if result.status == "finished" else self.outcome.diverged
                known.append(item.run.label)
                reached = f"loss {result.loss:.4f}" if result.loss is not None else "no loss"
                why = f": {result.why}" if result.why else ""
                self.log(f"{item.run.label} {result.status} in {format_duration(taken)}, {reached}{why}")
            elif not stopping:
                self._failed(item.run, _last_words(item.workdir, code))

    def _ended(self) -> list[PlannedRun]:
        return [run for run in self.runs if run.label in self.done]

    def _is_stranger(self, run: PlannedRun) -> bool:
        """Whether a run that has ended read other data or began with other weights than the study's, which is told."""
        result, data = self.done[run.label], self.stamp.fingerprint
        ended = [(each.facts, self.done[each.label]) for each in self._ended()]
        if result.fingerprint != data:
            did = f"read other data (fingerprint {result.fingerprint[:12]}, the study's is {data[:12]})"
            what = "the sources"
        elif wanted := weights_wanted(run.facts, result, ended):
            did = f"began with other weights (digest {result.weights}, that of the first to end is {wanted})"
            what = "the weights in train.init_from"
        else:
            return False
        self.outcome.strangers.append(run.label)
        self.log(
            f"{run.label} {did} and takes no part in fits: {what} changed while the study ran. Bring them back to what "
            f"they were, remove {self.workdirs[run.label]}, and type the same command"
        )
        return True

    def _failed(self, run: PlannedRun, why: str) -> None:
        self.outcome.failed[run.label] = why
        self.log(f"{run.label} failed: {why}; see {self.workdirs[run.label] / 'log.txt'}")

    def _branch_off(self, run: PlannedRun) -> None:
        """Gives a branch its trunk's checkpoint and the records up to it, unless it has gone on from them before."""
        from maxlm.train import rollback

        assert run.branch is not None
        trunk, workdir, step = self.workdirs[run.branch.trunk], self.workdirs[run.label], run.branch.step
        if (workdir / "checkpoints").exists():
            return
        if self.done[run.branch.trunk].status != "finished":
            raise StudyError(f"its trunk {run.branch.trunk} diverged")
        if run.branch.trunk in self.outcome.strangers:
            raise StudyError(f"its trunk {run.branch.trunk} was run on other data or weights")
        origin = trunk / "checkpoints" / str(step)
        if not origin.is_dir():
            raise StudyError(f"its trunk {run.branch.trunk} has no checkpoint of step {step}")
        shutil.copy(trunk / FILE_NAME, workdir / FILE_NAME)
        cut_metrics(workdir / FILE_NAME, step)  # the trunk went further, and the branch has not
        try:
            rollback.hand_on(trunk, origin.parent, step, workdir)
        except ValueError as error:
            raise StudyError(f"the checkpoint of step {step} of its trunk is damaged: {error}") from error
        if weights := weights_given(trunk):  # with which the branch's first steps began, too
            first_start(workdir)
            Home(workdir, log=self.log).note(WEIGHTS, weights)
        staged = workdir / "checkpoints.partial"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(origin, staged / str(step))
        staged.rename(workdir / "checkpoints")

    def _give_up_on_branches(self) -> None:
        """Only runs whose trunk did not come to its end are left."""
        for run in self.waiting:
            assert run.branch is not None
            self._failed(run, f"its trunk {run.branch.trunk} has not finished")
        self.waiting.clear()

    def _can_go_on(self) -> bool:
        """Whether a run is left that needs no trunk to end first: one still trained by a process left over."""
        return any(not run.branch or run.branch.trunk in self.done for run in self.waiting)

    def _summary(self) -> None:
        done, diverged, _, failed, strangers, _ = self.outcome
        words = [f"{len(done)} finished"]
        words += [f"{len(diverged)} diverged ({', '.join(diverged)})"] if diverged else []
        words += [f"{len(failed)} failed ({', '.join(failed)}): the same command tries them again"] if failed else []
        words += [f"{len(strangers)} on other data or weights ({', '.join(strangers)})"] if strangers else []
        self.log(f"study: {'; '.join(words)}")


def _prepared(study: Study, folder: Path) -> tuple[list[PlannedRun], str]:
    """The planned runs with their data made once for all, and its fingerprint."""
    from maxlm.data.prepare import prepare_data

    runs = []
    for run in plan(study):
        cache = run.config.data.cache_dir or str(folder / "data")
        data = dataclasses.replace(run.config.data, cache_dir=cache)
        runs.append(dataclasses.replace(run, config=dataclasses.replace(run.config, data=data)))
    config = runs[0].config  # all read the same, as `plan` sees to
    prepared = prepare_data(config, folder)
    held = [name for name, store in prepared.stores.items() if store.split("heldout").num_documents]
    if not held or set(config.eval.stores) - set(held):
        raise StudyError(
            f"the study is fitted to held-out losses, but {', '.join(config.eval.stores or prepared.stores)} holds no "
            "document out; set data.stores.NAME.heldout_permille in its base to 10 or more"
        )
    stores = {name: store.fingerprint for name, store in prepared.stores.items()}
    return runs, fingerprint_of(stores, prepared.tokenizer.fingerprint)


class Devices(NamedTuple):
    """What a run would find on this machine: the platform, and how many devices."""

    platform: str
    number: int


def devices_here() -> Devices:
    """Asks another process: the one that asks JAX holds the devices for as long as it lives.

    Raises:
      StudyError: JAX finds none.
    """
    asked = "import jax; print(jax.default_backend(), jax.device_count())"
    environment = programs.environment() | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, "-P", "-c", asked], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise StudyError(f"JAX finds no devices here: {done.stderr.strip().splitlines()[-1]}")
    platform, number = done.stdout.split()[-2:]
    return Devices(platform, int(number))


def _check_devices(machine: Machine, width: int) -> None:
    """Raises StudyError where runs here would fail one after another, on devices that nothing was planned for."""
    platform, count = devices_here()
    if count != machine.devices:
        raise StudyError(
            f"a run takes all devices of this machine, {count} of platform {platform}, but the study is planned for "
            f"runs of {machine.devices}; set Machine(devices={count}) in its file, or let runs see no more than "
            f"{machine.devices} (CUDA_VISIBLE_DEVICES)"
        )
    if platform != "cpu" and width > 1:
        raise StudyError(
            f"{width} runs at a time would each take all {count} devices of this machine and most of their memory; "
            "type --jobs=1, or give each run a machine of its own with --launcher"
        )


def _cores(slot: int, width: int) -> list[int]:
    """The cores of one of `width` runs at a time."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))
    share = max(len(cores) // width, 1)
    return [cores[(slot * share + n) % len(cores)] for n in range(share)]


def _part_done(run: PlannedRun, workdir: Path) -> float:
    """Part of the steps done, those of a branch's trunk left out."""
    first = run.branch.step if run.branch else 0
    last = max((record["step"] for record in read_metrics(workdir, "step")), default=first)
    return min(max((last - first) / (run.config.train.steps - first), 0.0), 1.0)


def _last_words(workdir: Path, code: int) -> str:
    """The exit code and the last line of the log."""
    path = workdir / "log.txt"
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"exit code {code} ({said[:200]})"


@contextlib.contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """Catches SIGINT and SIGTERM while inside; the value tells whether one came."""
    came: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
