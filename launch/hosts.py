"""A job on this machine, or on hosts that ssh reaches, without any scheduler.

python -m launch.hosts run --processes=2 --config=... --workdir=...          this tree, on this machine
python -m launch.hosts run --hosts=a,b,user@c --config=... --workdir=...     a commit, one process a host
python -m launch.hosts status | logs | stop --hosts=...                      (the same flags)

Over ssh the run goes on by itself when this program ends; the same command watches it again, `stop` ends it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from launch import remote
from launch.job import (
    EXIT_PREEMPTED,
    ROOT,
    SLOW_SECONDS,
    TOOL_SECONDS,
    Job,
    LaunchError,
    Topology,
    ask_tool,
    check_config,
    check_shared,
    code_archive,
    job_of,
    job_parser,
    printed,
    run_main,
    secret_values,
    split_overrides,
    there,
)
from launch.remote import Layout, Status
from launch.supervise import HEALTHY_SECONDS, PATIENCE_SECONDS, print_log, supervise, until_interrupted

LOCKS = {"cpu": "cpu.lock", "gpu": "cuda.lock", "tpu": "tpu.lock"}
PLATFORMS = {"cpu": "", "gpu": "cuda", "tpu": "tpu"}  # as JAX names them
PAUSE_SECONDS = 5.0  # on this machine, after a first failure
_HOST = re.compile(r"([A-Za-z0-9_.-]+@)?[A-Za-z0-9][A-Za-z0-9.-]*")


class SshFleet:
    """Hosts with one process each, as `supervise.Fleet`. Scripts, and secrets with them, go over standard input."""

    def __init__(self, job: Job, hosts: Sequence[str], *, coordinator: str, folder: str, lock: Path):
        self.job, self.hosts, self.coordinator = job, list(hosts), coordinator
        self.layout, self.lock = Layout(folder), lock
        self.workers = len(self.hosts)

    @staticmethod
    def command(host: str, script: str = "") -> list[str]:
        """ssh as an argument list: runs `script`, or else what comes over standard input."""
        far = f"bash -c {shlex.quote(script)}" if script else "bash -s"
        return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", host, far]

    def start_script(self, number: int, secrets: dict[str, str]) -> str:
        words = [f"--coordinator={self.coordinator}", f"--processes={self.workers}", f"--process={number}"]
        return remote.start(
            self.layout, self.job, self.lock, words=words if self.workers > 1 else (), environment=secrets
        )

    def ensure(self) -> bool:
        return False  # nothing here makes machines

    def prepare(self) -> None:
        archive = code_archive(self.job.commit)
        unpack = remote.unpack(self.layout, self.job, "-")
        self.everywhere(lambda number: (self.command(self.hosts[number], unpack), archive), seconds=SLOW_SECONDS)
        install = remote.install(self.layout, self.job, self.lock).encode()
        self.everywhere(lambda number: (self.command(self.hosts[number]), install), seconds=SLOW_SECONDS)

    def start(self) -> list[Status]:
        secrets = secret_values(self.job)
        return self.ask(lambda number: self.start_script(number, secrets))

    def status(self) -> list[Status]:
        return self.ask(lambda number: remote.status(self.layout, self.job))

    def stop(self) -> None:
        self.ask(lambda number: remote.stop(self.layout, self.job, seconds=self.job.grace_seconds))

    def stop_for_good(self) -> None:
        """`stop`, for whoever watches the job too."""
        self.ask(lambda number: remote.stop_for_good(self.layout, self.job, seconds=self.job.grace_seconds))

    def allow(self) -> None:
        self.ask(lambda number: remote.allow(self.layout, self.job))

    def restart(self) -> None:
        """Nobody but their owner restarts plain hosts: the process alone is started again."""

    def replace(self) -> None:
        """Plain hosts cannot be replaced."""

    def follow(self) -> subprocess.Popen:
        return subprocess.Popen(self.follow_command(), stdin=subprocess.DEVNULL, start_new_session=True)

    def follow_command(self) -> list[str]:
        return self.command(self.hosts[0], remote.follow(self.layout, self.job))

    def ask(self, script_of: Callable[[int], str]) -> list[Status]:
        limit = self.job.grace_seconds + TOOL_SECONDS
        return remote.read_status(
            self.everywhere(lambda n: (self.command(self.hosts[n]), script_of(n).encode()), seconds=limit)
        )

    def everywhere(self, what: Callable[[int], tuple[list[str], bytes]], *, seconds: float) -> str:
        """Runs a command with its standard input for each host, all at once; what they printed."""

        def one(number: int) -> str:
            command, given = what(number)
            try:
                done = ask_tool(command, given, seconds=seconds)
            except LaunchError as error:
                raise LaunchError(f"{self.hosts[number]}: {error}") from error
            if done.code:
                last = done.errors.strip().splitlines() or ["no message"]
                raise LaunchError(f"ssh {self.hosts[number]} failed ({done.code}): {last[-1]}")
            return done.output

        with ThreadPoolExecutor(min(32, self.workers)) as pool:
            return "\n".join(pool.map(one, range(self.workers)))

    def plan(self) -> list[str]:
        """What `run` does on hosts that have nothing yet; secrets are named only."""
        lines, unpack = [], remote.unpack(self.layout, self.job, "-")
        named = {name: f"<{name} of this environment>" for name in self.job.secrets}
        for number, host in enumerate(self.hosts):
            lines += [
                printed(self.command(host), remote.status(self.layout, self.job)),
                printed(self.command(host), remote.allow(self.layout, self.job)),
                f"$ git archive --format=tar.gz {self.job.commit} | {shlex.join(self.command(host, unpack))}",
                printed(self.command(host), remote.install(self.layout, self.job, self.lock)),
                printed(self.command(host), self.start_script(number, named)),
            ]
        return [*lines, printed(self.follow_command())]


# --- this machine -----------------------------------------------------------------------------------------------------


def local_commands(job: Job, *, port: int) -> list[list[str]]:
    """The command of each process on this machine."""
    number = job.topology.processes
    place = [f"--coordinator=localhost:{port}", f"--processes={number}"] if number > 1 else []
    return [
        [sys.executable, *job.arguments(), *place, *([f"--process={process}"] if place else [])]
        for process in range(number)
    ]


def local_environment(job: Job, process: int) -> dict[str, str]:
    """The variables of a process here; with --devices, each sees its own GPUs."""
    added = {"PYTHONUNBUFFERED": "1", **job.environment, **secret_values(job)}
    if each := job.topology.devices:
        added["CUDA_VISIBLE_DEVICES"] = ",".join(str(process * each + device) for device in range(each))
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **added}


def run_local(
    job: Job, *, logs: Path, log: Callable[[str], None], poll: float = 0.2, pause: float = PAUSE_SECONDS
) -> int:
    """Runs the processes here to their end, again after failures, and returns the exit code.

    After a failure there is a pause, each time twice as long; a run that went well for a while begins to count anew.

    Process 0 prints; the others write into `logs`. SIGTERM and SIGINT to this program are passed on to all of them,
    and end it with EXIT_PREEMPTED once they have saved; in the pause after a failure with that failure's code.
    """
    logs.mkdir(parents=True, exist_ok=True)
    asked: list[int] = []
    together: list[subprocess.Popen] = []
    told: dict[int, int] = {}  # by process id: how often

    def tell() -> None:
        for process in together:
            if told.get(process.pid, 0) < len(asked):
                told[process.pid] = len(asked)
                process.send_signal(signal.SIGTERM)

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        tell()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    failures, code = 0, EXIT_PREEMPTED
    try:
        while not asked:
            began = time.monotonic()
            _start_local(job, logs, together)
            tell()  # those that were being started when the signal came
            code = _wait_local(together, job.grace_seconds, log=log, poll=poll)
            if asked and code == 128 + signal.SIGTERM:
                return EXIT_PREEMPTED  # it had not come to where it listens for signals
            if code == 0 or asked:
                return code
            if code == EXIT_PREEMPTED:
                log(f"the run ended with exit code {code}; starting it again")
                continue
            failures = 1 if time.monotonic() - began > HEALTHY_SECONDS else failures + 1
            if failures > job.retries:
                log(f"given up after {failures} failures; the others' logs are in {logs}")
                return code
            wait = min(pause * 2 ** (failures - 1), 600.0)
            log(f"the run ended with exit code {code}; failure {failures}, {job.retries} are allowed")
            log(f"starting it again in {wait:g} s")
            until = time.monotonic() + wait
            while not asked and time.monotonic() < until:
                time.sleep(poll)
        return code  # of the last start, if there was one
    finally:
        for process in together:
            process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start_local(job: Job, logs: Path, together: list[subprocess.Popen]) -> None:
    """Puts the job's processes into `together`, in place of those there, each as soon as it is started."""
    together.clear()
    for process, command in enumerate(local_commands(job, port=_free_port())):
        with open(logs / f"process-{process}.log", "ab") as file:
            output = None if process == 0 else file
            # A session of its own: Ctrl-C reaches this program alone, which passes it on once.
            environment = local_environment(job, process)
            together.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            )


def _wait_local(together: list[subprocess.Popen], grace: float, *, log: Callable[[str], None], poll: float) -> int:
    """Waits for all; once one has ended, the others have `grace` seconds. The worst of their exit codes."""
    deadline = None
    while any(process.poll() is None for process in together):
        if any(process.returncode is not None for process in together):
            deadline = deadline or time.monotonic() + grace
            if time.monotonic() > deadline:
                left = [number for number, process in enumerate(together) if process.poll() is None]
                log(f"processes {left} did not follow the others within {grace:g} s; ending them")
                for process in together:
                    process.kill()
        time.sleep(poll)
    codes = [process.returncode for process in together]
    failed = [code if code > 0 else 128 - code for code in codes if code not in (0, EXIT_PREEMPTED)]
    return failed[0] if failed else max(codes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


# --- the command line -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__)
    add = parser.add_argument
    add("action", choices=["run", "status", "logs", "stop"])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--hosts", help="names, separated by commas, or @FILE with one a line; the first coordinates")
    where.add_argument("--processes", type=int, help="on this machine")
    add("--devices", type=int, default=0, help="GPUs of each process on this machine; 0: all that it sees")
    add("--coordinator", default="", help="host:port of the first host, as the others reach it; that host, port 8476")
    add("--folder", default="maxlm", help="on the hosts, relative to the home there or absolute")
    add("--platform", choices=sorted(LOCKS), default="gpu", help="which packages the hosts get")
    add("--poll", type=float, default=20.0, help="seconds between looks at the hosts")
    add("--patience", type=float, default=PATIENCE_SECONDS, help="seconds to wait for hosts that do not answer")
    return parser


def read_hosts(given: str) -> list[str]:
    """The hosts of --hosts. Raises LaunchError for a name that is none, such as an option of ssh."""
    lines = Path(given[1:]).read_text().splitlines() if given.startswith("@") else given.split(",")
    hosts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if bad := [host for host in hosts if not _HOST.fullmatch(host)]:
        raise LaunchError(f"{bad[0]!r} is no host; type names as in a,b or user@c")
    if len(set(hosts)) != len(hosts) or not hosts:
        raise LaunchError(f"--hosts names {len(hosts)} hosts, some of them twice; name each once")
    return hosts


def main(arguments: Sequence[str] | None = None) -> int:
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    values = _parser().parse_args(own)
    if values.processes is not None:
        if values.action != "run":
            raise LaunchError(f"{values.action} is for --hosts; processes on this machine end with their launcher")
        topology = Topology(processes=values.processes, devices=values.devices)
        platform = "cuda" if values.devices else ""
        return _run_here(job_of(values, overrides, topology, copied=False, platform=platform), values)
    hosts = read_hosts(values.hosts)
    runs = values.action == "run"
    job = job_of(values, overrides, Topology(hosts=len(hosts)), copied=runs, platform=PLATFORMS[values.platform])
    check_shared(job)
    coordinator = values.coordinator or f"{hosts[0].rpartition('@')[2]}:8476"
    fleet = SshFleet(
        job, hosts, coordinator=coordinator, folder=values.folder, lock=ROOT / "launch" / LOCKS[values.platform]
    )
    scripts = {
        "status": remote.status(fleet.layout, job),
        "stop": remote.stop_for_good(fleet.layout, job, seconds=job.grace_seconds),
    }
    if values.dry_run:
        lines = fleet.plan() if values.action == "run" else [printed(fleet.follow_command())]
        if values.action in scripts:
            lines = [printed(fleet.command(host), scripts[values.action]) for host in hosts]
        print(job.describe(), *lines, sep="\n\n")
        return 0
    there("ssh")
    if values.action == "status":
        for host, status in zip(hosts, fleet.status(), strict=True):
            _log(f"{host} ({status.host}): {status.state}{'' if status.code is None else f' {status.code}'}")
    elif values.action == "stop":
        fleet.stop_for_good()
    elif values.action == "logs":
        return until_interrupted(lambda: print_log(fleet), left="the run, if there is one, goes on", log=_log)
    else:
        secret_values(job)
        if not values.no_check:
            check_config(job)
        _log(job.describe())
        return until_interrupted(
            lambda: supervise(fleet, job, log=_log, poll=values.poll, patience=values.patience),
            left="the run goes on: the same command watches it again, `stop` ends it",
            log=_log,
        )
    return 0


def _run_here(job: Job, values: argparse.Namespace) -> int:
    if values.dry_run:
        lines = [printed(command) for command in local_commands(job, port=8476)]
        print(job.describe(), *lines, "# with a port that is free then, in place of 8476", sep="\n\n")
        return 0
    if not values.no_check:
        check_config(job, devices=job.topology.all_processes * job.topology.devices or None)
    logs = Path(job.workdir) / "logs" if "://" not in job.workdir else Path("logs") / job.name
    return run_local(job, logs=logs.absolute(), log=_log)


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
