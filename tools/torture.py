"""A real training of several processes, with faults thrown at it at random, that must lose nothing.

python tools/torture.py --minutes=30 --seed=1 [--processes=4] [--faults=kill_one,stop_one,...] [--json=FILE]

In rounds: a tiny run is made to its end while processes are killed, stopped and asked to leave, the disk fills up, and
checkpoints and stores are damaged; it is started again each time, by turns on all processes, whose final state has to
be the undisturbed run's bit for bit, and on 1, 2 or all of them, where the tokens of each step have to be the same and
the losses to the last bits of another mesh. The ledger has to account for every second. Prints the faults thrown, what
each has cost, and the share of the time that was of use, beside what `maxlm plan --mtbf` would have foretold of it. The
exit code is 1 if anything was lost, if less was thrown than --least_faults and --least_restarts ask for, or if the two
shares lie further apart than --most_apart.

Needs root for a small tmpfs to fill up; without, a limit on the size of files stands for the full disk.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the other half of this program

from maxlm.checkpoint.reader import CheckpointReader
from maxlm.configfile import source
from maxlm.heartbeat import EXIT_FAILED, EXIT_LOST
from maxlm.train.goodput import FILE_NAME as LEDGER
from maxlm.train.goodput import Summary, summarise
from maxlm.train.metrics import read_metrics
from maxlm.train.signals import EXIT_PREEMPTED
from tools.torture_costs import Costed, costed, simulated
from tools.torture_run import EVERY, Company, Lost, digests, joined, last_step, newest, tiny

ABORTED = -signal.SIGABRT  # JAX ends a process so when its coordinator dies, if it is quicker than the heartbeat
DISK = "64m"
USEFUL = ("step", "evaluation")  # what the time was for; neither waits for data nor for checkpoints
FAULTS_A_ROUND = 6
LOSSES = 1e-4  # relative distance of losses that the last bits of other meshes may add up to over a run
SECONDS_APART = 2.0  # between the beginning of an account and the start of a process as it was seen from outside
SECONDS_LEAVING = 60.0  # that a process may take to leave after its account is closed


@dataclasses.dataclass
class Thrown:
    """A fault and what came of it."""

    kind: str
    step: int
    start: Company
    at: float = dataclasses.field(default_factory=time.time)
    seconds: float = 0.0  # until the rest had left
    lost: int | None = None  # steps that had to be done again, as the next start tells


@dataclasses.dataclass
class Torture:
    """What is tormented, and how."""

    folder: Path
    processes: int
    draw: random.Random
    log: Callable[[str], None]
    steps: int = 60
    silence: float = 15.0
    disk: Path | None = None  # a small file system that holds the run, if one could be mounted
    thrown: list[Thrown] = dataclasses.field(default_factory=list)
    started: list[float] = dataclasses.field(default_factory=list)
    restarts: int = 0  # of all processes, to go on after a fault
    accounts: list[Summary] = dataclasses.field(default_factory=list)
    costs: list[Costed] = dataclasses.field(default_factory=list)

    @property
    def config(self) -> Path:
        """The config file."""
        return self.folder / "config.py"

    def start(self, workdir: Path, processes: int) -> Company:
        """The run, started or started again."""
        self.started.append(time.time())
        devices = self.processes // processes
        return Company(self.config, workdir, processes=processes, devices=devices, silence=self.silence)

    def reference(self) -> Path:
        """The undisturbed run, on all processes; the one that is there already, in a folder that was kept."""
        if (self.folder / "whole" / "report.json").exists():
            return self.folder / "whole"
        self.config.write_text(source(tiny(self.folder, steps=self.steps, processes=self.processes)))
        workdir = self.folder / "whole"
        company = self.start(workdir, self.processes)
        if any(company.wait(within=1800)):
            raise Lost(f"the undisturbed run failed\n{company.said()[-3000:]}")
        return workdir

    # --- a round

    def round(self, number: int, kinds: Sequence[str], *, elastic: bool) -> Path:
        """A run to its end, with a fault of each of `kinds` in turn."""
        workdir = (self.disk or self.folder) / f"run{number}"
        left, size, before = list(kinds), self.processes, len(self.thrown)
        while True:
            company = self.start(workdir, size)
            if left:
                self.throw(left.pop(0), company)
            elif any(codes := company.wait()):
                raise Lost(f"the run did not finish: {codes}\n{company.said()[-3000:]}")
            self.count_lost(self.thrown[before:], company)
            if (workdir / "report.json").exists():
                break
            size = self.draw.choice([n for n in (1, 2, 4) if self.processes % n == 0]) if elastic else self.processes
            self.restarts += 1
        if left:
            self.log(f"the run was through before {', '.join(left)} could be thrown")
        faults = [fault.at for fault in self.thrown[before:]]
        self.costs.append(costed(workdir, self.account(workdir), faults, every=EVERY))
        return workdir

    def count_lost(self, thrown: list[Thrown], company: Company) -> None:
        """What the faults before this start have cost, now that it is known from where the run goes on."""
        if found := re.search(r"continuing from the checkpoint of step (\d+)", company.said()):
            for fault in thrown:
                if fault.lost is None and fault.start is not company:
                    fault.lost = max(fault.step - int(found[1]), 0)

    def throw(self, kind: str, company: Company) -> None:
        """Waits for a moment, throws a fault and sees how the processes end."""
        if kind in ("stop_one",) and len(company.processes) == 1:
            kind = "kill_all"  # nobody is left who could notice
        before = newest(company.workdir)
        later = self.draw.choice([0, 4, 8])  # steps, as checkpoints show them; 0: at any moment of the start
        moment = time.monotonic() + self.draw.uniform(0, 10 if later == 0 else 1)
        deadline = time.monotonic() + 900
        missed = kind in ("kill_one", "stop_one")  # by the others, once they have found each other

        def come() -> bool:
            if missed and not joined(company):
                return False
            return newest(company.workdir) >= before + later if later else time.monotonic() >= moment

        while company.running() and not come():
            if time.monotonic() > deadline:
                company.kill()
                raise Lost(f"no step was made within 900 s\n{company.said()[-3000:]}")
            time.sleep(0.02)
        if not company.running():
            codes = company.wait()
            if any(codes):
                raise Lost(f"the processes left by themselves: {codes}\n{company.said()[-3000:]}")
            return  # it was through before the fault came
        fault = Thrown(kind, last_step(company.workdir), company)
        self.log(f"{kind} at step {fault.step}, {len(company.processes)} processes")
        began = time.monotonic()
        if getattr(self, kind)(company) is False:
            fault.kind = "kill_all"
            self.log(f"there was nothing yet for {kind} to damage: all were killed, no more")
        fault.seconds = time.monotonic() - began
        self.thrown.append(fault)

    # --- the faults; those that damage files say whether there were any, and have killed all if not

    def kill_one(self, company: Company) -> None:
        """SIGKILL to one: the rest leaves by itself and names it."""
        victim = self.draw.randrange(len(company.processes))
        company.processes[victim].kill()
        codes = company.wait(within=self.silence + 60)
        self.expect(company, codes, victim, f"process {victim} on {socket.gethostname()} is gone")

    def stop_one(self, company: Company) -> None:
        """SIGSTOP to one: the rest sees that it is silent, leaves and names it."""
        victim = self.draw.randrange(len(company.processes))
        company.processes[victim].send_signal(signal.SIGSTOP)
        try:
            codes = company.wait(but=victim, within=self.silence + 60)
        finally:
            company.processes[victim].kill()
            company.processes[victim].wait()
        self.expect(company, codes, victim, f"process {victim} on {socket.gethostname()} has been silent")

    def expect(self, company: Company, codes: list[int | None], victim: int, message: str) -> None:
        """That those who are left have said so; while they were joining they may have met with it in other ways."""
        others = [code for number, code in enumerate(codes) if number != victim]
        if not joined(company) or not others:
            return
        if any(code not in (EXIT_LOST, ABORTED) for code in others):
            raise Lost(f"exit codes {codes}, expected {EXIT_LOST} after process {victim}\n{company.said()[-3000:]}")
        if EXIT_LOST in others and message not in company.said():
            raise Lost(f"nobody said {message!r}\n{company.said()[-3000:]}")

    def kill_all(self, company: Company) -> None:
        """SIGKILL to all at once."""
        company.kill()

    def terminate(self, company: Company) -> None:
        """SIGTERM to one: all save at one step and leave with the code that asks for a restart."""
        victim = self.draw.choice(company.processes)
        started = "compiled the step" in company.said()
        victim.send_signal(signal.SIGTERM)
        codes = company.wait()
        # While they find each other the rest may leave in several ways (docs/faults.md), and none of them as failed.
        if EXIT_FAILED in codes or (started and any(code not in (EXIT_PREEMPTED, 0) for code in codes)):
            raise Lost(f"exit codes {codes} after SIGTERM\n{company.said()[-3000:]}")

    def full_disk(self, company: Company) -> None:
        """No room for a while, then room again; whether they have left or not, they are killed and started again."""
        ballast = company.workdir.parent / "ballast"
        if self.disk:
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                while True:
                    file.write(b"\0" * 65536)
                    file.flush()
        else:
            for process in company.processes:
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        time.sleep(self.draw.uniform(2, 10))
        ballast.unlink(missing_ok=True)
        company.kill()

    def flip_checkpoint(self, company: Company) -> bool:
        """A flipped bit in a file of the newest checkpoint."""
        company.kill()
        return self.damage_checkpoint(company.workdir, flipped)

    def truncate_checkpoint(self, company: Company) -> bool:
        """Half of a file of the newest checkpoint is gone."""
        company.kill()
        return self.damage_checkpoint(company.workdir, lambda data, _: data[: len(data) // 2])

    def damage_checkpoint(self, workdir: Path, damage: Callable[[bytes, random.Random], bytes]) -> bool:
        """Where an older one is there to fall back to: nobody can do without any."""
        steps = CheckpointReader(workdir / "checkpoints", log=lambda _: None).steps()
        if len(steps) < 2:
            return False
        files = sorted(
            p for p in (workdir / "checkpoints" / str(steps[-1])).rglob("*") if p.is_file() and p.stat().st_size
        )
        path = self.draw.choice(files)
        path.write_bytes(damage(path.read_bytes(), self.draw))
        return True

    def flip_store(self, company: Company) -> bool:
        """A flipped bit in the tokens: the run has to refuse them, and goes on when the file is put right."""
        return self.damage_store(company, flipped)

    def truncate_store(self, company: Company) -> bool:
        """Half of the tokens is gone: the same."""
        return self.damage_store(company, lambda data, _: data[: len(data) // 2])

    def damage_store(self, company: Company, damage: Callable[[bytes, random.Random], bytes]) -> bool:
        company.kill()
        shards = sorted(company.workdir.glob("data/*/train-*.bin"))
        if not shards:
            return False  # it was killed before there were any
        whole = shards[0].read_bytes()
        shards[0].write_bytes(damage(whole, self.draw))
        try:
            refused = self.start(company.workdir, len(company.processes))
            codes = refused.wait()
            # Process 0 is the one that reads all; another may see that it is gone before it hears why.
            failed = codes[0] == EXIT_FAILED and all(code in (EXIT_FAILED, EXIT_LOST) for code in codes)
            if not failed or shards[0].name not in refused.said():
                raise Lost(f"the damaged store was not refused: {codes}\n{refused.said()[-3000:]}")
        finally:
            shards[0].write_bytes(whole)
        return True

    # --- what has to hold at the end

    def compare(self, workdir: Path, whole: Path, *, elastic: bool) -> None:
        """The run against the undisturbed one."""
        run, reference = list(read_metrics(workdir, "step")), list(read_metrics(whole, "step"))
        if [(r["step"], r["batch"]) for r in run] != [(r["step"], r["batch"]) for r in reference]:
            raise Lost(f"{workdir.name} has other steps or tokens than the undisturbed run")
        losses, expected = ([r["loss"] for r in records] for records in (run, reference))
        if elastic:
            if not np.allclose(losses, expected, rtol=LOSSES, atol=0):
                raise Lost(f"{workdir.name} has other losses, by {np.max(np.abs(np.subtract(losses, expected)))}")
            return
        if losses != expected:
            raise Lost(
                f"{workdir.name} has other losses at {sum(a != b for a, b in zip(losses, expected, strict=True))} steps"
            )
        if digests(workdir, self.steps) != digests(whole, self.steps):
            raise Lost(f"the final state of {workdir.name} has other bits")

    def account(self, workdir: Path) -> list[dict[str, Any]]:
        """The ledger, held against the clock outside: every second is in a bucket or between two processes.

        A start that was killed before it came to its ledger has no account.
        """
        records = [json.loads(line) for line in (workdir / LEDGER).read_text().splitlines() if line.strip()]
        account = summarise(records)
        last: dict[int, dict[str, Any]] = {record["process"]: record for record in records}
        first = min(record["begun"] for record in last.values())
        end = max(record["time"] for record in last.values())
        if abs(account.wall + account.down - (end - first)) > 0.5:
            raise Lost(f"the ledger of {workdir.name} has {account.wall + account.down:.1f} s of {end - first:.1f} s")
        unseen = [r for r in last.values() if min(abs(r["begun"] - at) for at in self.started) > SECONDS_APART]
        if unseen or time.time() - end > SECONDS_LEAVING:
            raise Lost(f"an account of {workdir.name} does not begin where a process was started, or ends too early")
        self.accounts.append(account)
        return records


def flipped(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one bit another."""
    found = bytearray(data)
    found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own for the run, if this user may mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


KINDS = (
    "kill_one",
    "kill_one",
    "kill_all",
    "stop_one",
    "terminate",
    "full_disk",
    "flip_checkpoint",
    "truncate_checkpoint",
    "flip_store",
    "truncate_store",
)


def figures(torture: Torture, seconds: float) -> dict[str, Any]:
    """What the report says, as it goes into --json."""
    kinds: dict[str, list[Thrown]] = collections.defaultdict(list)
    for fault in torture.thrown:
        kinds[fault.kind].append(fault)
    total = {name: sum(account.seconds[name] for account in torture.accounts) for name in torture.accounts[0].seconds}
    wall, down = sum(total.values()), sum(account.down for account in torture.accounts)
    foretold = simulated(torture.costs)
    return {
        "faults": len(torture.thrown),
        "restarts": torture.restarts,
        "starts": len(torture.started),
        "rounds": len(torture.accounts),
        "by_kind": {
            kind: {
                "thrown": len(faults),
                "steps_lost": [fault.lost for fault in faults],
                "seconds_until_left": [round(fault.seconds, 2) for fault in faults],
            }
            for kind, faults in sorted(kinds.items())
        },
        "seconds": {name: round(value, 1) for name, value in total.items()},
        "down_seconds": round(down, 1),
        "effective_share": round(sum(total[name] for name in USEFUL) / (wall + down), 4),
        "simulated": foretold and {**foretold._asdict(), "apart": foretold.apart},
        "all_seconds": round(seconds, 1),
    }


def report(found: dict[str, Any], log: Callable[[str], None]) -> None:
    """The figures for a person."""
    log(
        f"{found['faults']} faults, {found['restarts']} restarts, {found['starts']} starts, {found['rounds']} rounds, "
        f"{found['all_seconds']:.0f} s"
    )
    for kind, of in found["by_kind"].items():
        lost = [steps for steps in of["steps_lost"] if steps is not None]
        mean = f"{sum(lost) / len(lost):.1f}" if lost else "no"
        slowest = max(of["seconds_until_left"])
        log(
            f"  {kind:20} {of['thrown']:3} thrown, {mean} steps lost on average, all gone after {slowest:.1f} s at most"
        )
    log("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in found["seconds"].items()))
    log(f"between processes {found['down_seconds']:.0f} s; of use {found['effective_share']:.1%} of the time")
    if of := found["simulated"]:
        log(
            f"of the time until the last step {of['measured']:.1%} went into steps that were kept; simulated with a "
            f"failure after {of['mtbf']:.1f} s, a save every {of['every']:.2f} s that stalls {of['stall']:.2f} s and "
            f"is committed after {of['write']:.2f} s, and restarts of {of['restart']:.1f} s: {of['share']:.1%}, "
            f"{of['apart']:.0%} from it"
        )


def shortcomings(found: dict[str, Any], asked: argparse.Namespace) -> list[str]:
    """What was asked for of the torture and has not come of it, a sentence each."""
    problems = [
        f"{found[what]} {what}, and at least {least} were asked for"
        for what, least in (("faults", asked.least_faults), ("restarts", asked.least_restarts))
        if found[what] < least
    ]
    if asked.most_apart and not found["simulated"]:
        problems.append("too little has happened to simulate it")
    elif asked.most_apart and found["simulated"]["apart"] > asked.most_apart:
        problems.append(
            f"simulated and measured goodput are {found['simulated']['apart']:.0%} apart, and at most "
            f"{asked.most_apart:.0%} were asked for"
        )
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Rounds until the minutes are over, or the faults that were asked for once each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to go on beginning rounds")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments")
    parser.add_argument("--processes", type=int, default=4, choices=(2, 4), help="of the undisturbed run")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--silence", type=float, default=15.0, help="seconds of silence after which a process is lost")
    parser.add_argument("--faults", default="", help=f"one round with these alone, of {', '.join(sorted(set(KINDS)))}")
    parser.add_argument("--least_faults", type=int, default=0, help="fewer of them are a failure")
    parser.add_argument("--least_restarts", type=int, default=0, help="fewer restarts of all processes are a failure")
    parser.add_argument("--most_apart", type=float, default=0.0, help="of goodput, simulated from measured; 0: any")
    parser.add_argument("--keep", default="", help="folder to work in, which stays; else a temporary one")
    parser.add_argument("--json", default="", help="also write the figures to this file")
    asked = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    began, folder = time.monotonic(), Path(asked.keep or tempfile.mkdtemp(prefix="torture-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True)

    draw = random.Random(asked.seed)
    code = 0
    with small_disk(folder / "disk") as disk:
        torture = Torture(folder, asked.processes, draw, log, steps=asked.steps, silence=asked.silence, disk=disk)
        log(f"in {folder}, {'a tmpfs of ' + DISK if disk else 'no disk of its own'}")
        try:
            whole = torture.reference()
            log("the undisturbed run is made")
            number = 0
            while not number or (not asked.faults and time.monotonic() - began < asked.minutes * 60):
                kinds = asked.faults.split(",") if asked.faults else draw.choices(KINDS, k=FAULTS_A_ROUND)
                elastic = number % 2 == 1
                workdir = torture.round(number, kinds, elastic=elastic)
                torture.compare(workdir, whole, elastic=elastic)
                log(f"round {number}: nothing is lost{', on changing numbers of processes' if elastic else ''}")
                shutil.rmtree(workdir)
                number += 1
        except Lost as error:
            log(f"LOST: {error}")
            code = 1
        if torture.accounts:
            found = figures(torture, time.monotonic() - began)
            report(found, log)
            for problem in shortcomings(found, asked):
                log(f"NOT ENOUGH: {problem}")
                code = 1
            if asked.json:
                Path(asked.json).write_text(json.dumps(found, indent=1) + "\n")
    if not asked.keep and code == 0:
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
