"""A job on TPU VMs, through queued resources of Google Cloud.

python -m launch.tpu_vm run    --zone=Z --accelerator=v5litepod-16 [--slices=N] [--spot] --config=... --workdir=gs://...
python -m launch.tpu_vm status | logs | stop | delete   (the same flags)

`run` may be interrupted, or fail, at any point: the same command carries on from what exists. The run goes on by itself
on the TPU VMs; `stop` lets it save and ends it, and only `delete` ends the costs.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch import remote
from launch.job import (
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
    spot_note,
    there,
    tpu_devices,
)
from launch.remote import Layout, Status
from launch.supervise import PATIENCE_SECONDS, Hopeless, print_log, supervise, until_interrupted

LOCK = ROOT / "launch" / "tpu.lock"
# The images of the TPU VM documentation, by generation.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
    "tpu7x": "v2-alpha-tpu7-ubuntu2404",
}
_LOST = ("FAILED", "SUSPENDING", "SUSPENDED")
_GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "HIDDEN")
# What gcloud says where nobody is logged in, and of requests that it will never grant.
_FINAL = re.compile(
    "active account|auth login|[Rr]eauthentication|UNAUTHENTICATED|PERMISSION_DENIED|INVALID_ARGUMENT|NOT_FOUND|"
    "Quota limit|[Ii]nvalid value"
)
_MISUSED = 2  # its exit code for words that it does not know
SPOT_SECONDS = 30  # between the notice and the end of a spot VM


class TpuFleet:
    """The TPU VMs of one queued resource, as `supervise.Fleet`."""

    def __init__(
        self,
        job: Job,
        values: argparse.Namespace,
        *,
        log: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.job, self.values, self.log, self.sleep = job, values, log, sleep
        self.layout = Layout(values.folder)
        slices = job.topology.groups
        self.nodes = [job.name] if slices == 1 else [f"{job.name}-{number}" for number in range(slices)]
        self.workers = 0  # known once the machines are
        self.seen = False  # there was something once: what refuses now may grant again

    # --- commands, as argument lists

    def command(self, *words: str) -> list[str]:
        project = [f"--project={self.values.project}"] if self.values.project else []
        return ["gcloud", "compute", "tpus", *words, f"--zone={self.values.zone}", *project, "--quiet"]

    def create_command(self) -> list[str]:
        values, accelerator = self.values, self.job.topology.accelerator
        several = [f"--node-count={len(self.nodes)}", f"--node-prefix={self.job.name}"]
        optional = {
            "--network": values.network,
            "--subnetwork": values.subnetwork,
            "--service-account": values.service_account,
        }
        return self.command(
            *("queued-resources", "create", self.job.name),
            *(several if len(self.nodes) > 1 else [f"--node-id={self.job.name}"]),
            f"--accelerator-type={accelerator}",
            f"--runtime-version={values.runtime or runtime_of(accelerator)}",
            *(["--spot"] if values.spot else []),
            *(["--reserved"] if values.reserved else []),
            *(f"{flag}={value}" for flag, value in optional.items() if value),
            "--labels=made-by=maxlm",
        )

    def delete_command(self) -> list[str]:
        return self.command("queued-resources", "delete", self.job.name, "--force")

    def ssh_command(self, node: str, script: str, worker: str = "all") -> list[str]:
        return self.command("tpu-vm", "ssh", node, f"--worker={worker}", f"--command=bash -c {shlex.quote(script)}")

    def copy_command(self, node: str, source: str, target: str) -> list[str]:
        return self.command("tpu-vm", "scp", source, f"{node}:{target}", "--worker=all")

    # --- what the supervisor asks for

    def ensure(self) -> bool:
        replaced, asked, said = False, False, ""
        while True:
            found = self.resource()
            state = _state(found)
            nodes = self.node_states() if state == "ACTIVE" else {}
            if state == "ACTIVE" and all(nodes.get(node) == "READY" for node in self.nodes):
                return replaced
            gone = [
                f"{node} is {nodes.get(node, 'gone')}" for node in self.nodes if nodes.get(node, "PREEMPTED") in _GONE
            ]
            if state in _LOST or (state == "ACTIVE" and gone):
                why = ", ".join(gone) if state == "ACTIVE" else f"{state}{_reason(found)}"
                if state == "FAILED" and asked:
                    raise Hopeless(f"what was asked for has failed: {why}; change it, or the same command asks again")
                self.log(f"the machines are lost ({why}); giving them back")
                self.gcloud(self.delete_command(), seconds=SLOW_SECONDS)
                replaced = True
            elif state is None:
                self.log(f"asking for {len(self.nodes)} x {self.job.topology.accelerator} in {self.values.zone}")
                self.gcloud(self.create_command(), seconds=SLOW_SECONDS)
                asked = True
            elif said != state:
                self.log(f"waiting for the machines: {state.lower()}")
                said = state
            self.sleep(self.values.poll)

    def prepare(self) -> None:
        archive = f"/tmp/maxlm-{self.job.commit}.tar.gz"
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "code.tar.gz"
            local.write_bytes(code_archive(self.job.commit))
            self.everywhere(lambda node: self.copy_command(node, str(local), archive))
        self.run_script(remote.unpack(self.layout, self.job, archive))
        self.run_script(remote.install(self.layout, self.job, LOCK), seconds=SLOW_SECONDS)

    def start(self) -> list[Status]:
        if self.job.secrets:
            with tempfile.NamedTemporaryFile("w", prefix="maxlm") as file:  # mode 0600, which scp keeps
                lines = (f"export {name}={shlex.quote(value)}\n" for name, value in secret_values(self.job).items())
                file.writelines(lines)
                file.flush()
                self.everywhere(lambda node: self.copy_command(node, file.name, self.secrets_file()))
        script = remote.start(self.layout, self.job, LOCK, secrets_file=self.secrets_file())
        return remote.read_status(self.run_script(script))

    def status(self) -> list[Status]:
        script = remote.status(self.layout, self.job)
        return remote.read_status(self.run_script(script))

    def stop(self) -> None:
        script = remote.stop(self.layout, self.job, seconds=self.job.grace_seconds)
        self.run_script(script)

    def stop_for_good(self) -> None:
        """`stop`, for whoever watches the job too."""
        self.run_script(remote.stop_for_good(self.layout, self.job, seconds=self.job.grace_seconds))

    def allow(self) -> None:
        self.run_script(remote.allow(self.layout, self.job))

    def restart(self) -> None:
        self.log("restarting the machines")
        # TPU VMs of several hosts cannot be stopped and started as such. The connection ends with the machine.
        self.run_script("sudo systemd-run --on-active=2 systemctl reboot")
        self.sleep(self.values.poll)

    def replace(self) -> None:
        if self.resource() is not None:
            self.log("giving the machines back")
            self.gcloud(self.delete_command(), seconds=SLOW_SECONDS)

    def follow(self) -> subprocess.Popen:
        return subprocess.Popen(self.follow_command(), stdin=subprocess.DEVNULL, start_new_session=True)

    # --- how it is asked

    def follow_command(self) -> list[str]:
        return self.ssh_command(self.nodes[0], remote.follow(self.layout, self.job), worker="0")

    def secrets_file(self) -> str:
        return f"/dev/shm/maxlm-{self.job.name}.env" if self.job.secrets else ""

    def resource(self) -> dict[str, Any] | None:
        """The queued resource as gcloud describes it; None: there is none.

        Raises Hopeless if it is there for other hardware than the job's.
        """
        found = self.find("queued-resources", self.job.name)
        if found is None:
            return None
        self.seen = True
        specs = found.get("tpu", {}).get("nodeSpec", [])
        here, slices = self.job.topology.accelerator, len(self.nodes)
        kinds = {spec.get("node", {}).get("acceleratorType", here) for spec in specs}
        if other := sorted(kinds - {here}):
            raise Hopeless(
                f"{self.job.name} is there as {other[0]}, not {here}; say --accelerator={other[0]} to watch or delete "
                "it, or another --name"
            )
        # Nodes that were never asked for would otherwise look like lost ones, and those that train would be given back.
        count = sum(int(spec.get("multisliceParams", {}).get("nodeCount", 1)) for spec in specs)
        if specs and count != slices:
            raise Hopeless(
                f"{self.job.name} is there with --slices={count}, not {slices}; say --slices={count} to watch or "
                "delete it, or another --name"
            )
        return found

    def node_states(self) -> dict[str, str]:
        """State by name of the job's nodes; counts their workers."""
        rows = json.loads(self.gcloud(self.command("tpu-vm", "list", "--format=json")) or "[]")
        ours = {name: row for row in rows if (name := row["name"].rsplit("/", 1)[-1]) in self.nodes}
        self.workers = sum(len(row.get("networkEndpoints", [])) for row in ours.values())
        return {name: row.get("state", "UNKNOWN") for name, row in ours.items()}

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """A resource as gcloud describes it; listing tells one that is not there from a call that failed."""
        rows = json.loads(self.gcloud(self.command(kind, "list", "--format=json")) or "[]")
        return next((row for row in rows if row["name"].rsplit("/", 1)[-1] == name), None)

    def everywhere(self, command_of: Callable[[str], list[str]], *, seconds: float | None = None) -> str:
        """Runs a command for each slice, all at once; what they printed."""
        with ThreadPoolExecutor(min(32, len(self.nodes))) as pool:
            return "\n".join(pool.map(lambda node: self.gcloud(command_of(node), seconds=seconds), self.nodes))

    def run_script(self, script: str, *, seconds: float | None = None) -> str:
        """Runs a script on all workers; what they printed."""
        return self.everywhere(lambda node: self.ssh_command(node, script), seconds=seconds)

    def gcloud(self, command: Sequence[str], *, seconds: float | None = None) -> str:
        """What gcloud prints. Raises LaunchError: it has failed, or not ended in time; Hopeless: it always will."""
        done = ask_tool(command, seconds=seconds or self.job.grace_seconds + TOOL_SECONDS)
        if done.code:
            what = " ".join(word for word in command[1:5] if not word.startswith("-"))
            last = done.errors.strip().splitlines() or ["no message"]  # a worker's words come before gcloud's own
            final = not self.seen and (done.code == _MISUSED or _FINAL.search(done.errors))
            raise (Hopeless if final else LaunchError)(f"gcloud {what} failed ({done.code}): {'; '.join(last[-3:])}")
        return done.output

    def plan(self) -> list[str]:
        """What `run` does on hardware that is not there yet, command by command."""
        archive = f"/tmp/maxlm-{self.job.commit}.tar.gz"
        lines = [printed(self.command("queued-resources", "list", "--format=json")), printed(self.create_command())]
        lines += [printed(self.command("tpu-vm", "list", "--format=json"))]
        scripts = [remote.unpack(self.layout, self.job, archive), remote.install(self.layout, self.job, LOCK)]
        scripts += [remote.start(self.layout, self.job, LOCK, secrets_file=self.secrets_file())]
        scripts += [remote.status(self.layout, self.job)]
        for node in self.nodes:
            lines += [
                printed(self.ssh_command(node, remote.status(self.layout, self.job))),
                printed(self.ssh_command(node, remote.allow(self.layout, self.job))),
                printed(["git", "archive", "--format=tar.gz", "--output=code.tar.gz", self.job.commit]),
                printed(self.copy_command(node, "code.tar.gz", archive)),
            ]
            if self.job.secrets:
                lines += [f"# secrets.env: {', '.join(self.job.secrets)} of this environment, readable by you alone"]
                lines += [printed(self.copy_command(node, "secrets.env", self.secrets_file()))]
            lines += [printed(self.ssh_command(node, script)) for script in scripts]
        return [*lines, printed(self.follow_command())]


def _state(found: dict[str, Any] | None) -> str | None:
    """State of a queued resource; None: there is none."""
    return None if found is None else str(found.get("state", {}).get("state", "UNKNOWN"))


def _reason(found: dict[str, Any] | None) -> str:
    """Why a queued resource has failed, as far as it says."""
    message = (found or {}).get("state", {}).get("failedData", {}).get("error", {}).get("message", "")
    return f": {message}" if message else ""


def runtime_of(accelerator: str) -> str:
    """The image for an accelerator. Raises LaunchError for a generation that is not known."""
    generation = accelerator.rsplit("-", 1)[0]
    if generation not in RUNTIMES:
        raise LaunchError(f"no image is known for {accelerator!r}; give --runtime (known: {', '.join(RUNTIMES)})")
    return RUNTIMES[generation]


def _parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__)
    add = parser.add_argument
    add("action", choices=["run", "status", "logs", "stop", "delete"])
    add("--zone", required=True, help="as in us-east5-a")
    add("--project", default="", help="that of gcloud's configuration")
    add("--accelerator", required=True, help="as in v5litepod-16, v5p-64, v6e-256")
    add("--slices", type=int, default=1, help="how many of these")
    add("--runtime", default="", help="image of the TPU VMs; by the accelerator")
    price = parser.add_mutually_exclusive_group()
    price.add_argument("--spot", action="store_true", help="cheaper, may be taken back at any time")
    price.add_argument("--reserved", action="store_true", help="from your reservation")
    add("--network", default="")
    add("--subnetwork", default="")
    add("--service-account", default="", help="identity of the TPU VMs, for their access to the bucket")
    add("--folder", default="maxlm", help="on the TPU VMs, relative to the home there or absolute")
    add("--poll", type=float, default=20.0, help="seconds between looks")
    add("--patience", type=float, default=PATIENCE_SECONDS, help="seconds to wait for machines that do not answer")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    values = _parser().parse_args(own)
    if not re.fullmatch("[a-z0-9-]+", values.accelerator):
        raise LaunchError(f"--accelerator is {values.accelerator!r}; give a name as in v5litepod-16")
    topology = Topology(groups=values.slices, accelerator=values.accelerator)
    job = job_of(values, overrides, topology, copied=values.action == "run", platform="tpu")
    check_shared(job, ())
    fleet = TpuFleet(job, values, log=_log)
    actions: dict[str, tuple[list[str], Callable[[], int]]] = {
        "run": (fleet.plan(), lambda: supervise(fleet, job, log=_log, poll=values.poll, patience=values.patience)),
        "status": (
            [printed(fleet.ssh_command(node, remote.status(fleet.layout, job))) for node in fleet.nodes],
            lambda: _status(fleet),
        ),
        "logs": ([printed(fleet.follow_command())], lambda: print_log(fleet)),
        "stop": (
            [
                printed(fleet.ssh_command(node, remote.stop_for_good(fleet.layout, job, seconds=job.grace_seconds)))
                for node in fleet.nodes
            ],
            lambda: _done(fleet.stop_for_good),
        ),
        "delete": ([printed(fleet.delete_command())], lambda: _done(fleet.replace)),
    }
    plan, act = actions[values.action]
    # How many hosts a slice has, its name alone does not say.
    described = job.describe(f"{values.slices} slice{'s' * (values.slices > 1)} of {values.accelerator}")
    if values.spot and job.grace_seconds > SPOT_SECONDS and values.action == "run":
        _log(spot_note(job, f"{SPOT_SECONDS} s"))
    if values.dry_run:
        print(described, *plan, sep="\n\n")
        return 0
    there("gcloud")
    if values.action == "run":
        secret_values(job)
        if not values.no_check:
            check_config(job, devices=tpu_devices(f"{values.slices}*{values.accelerator}"))
        _log(described)
    left = "the machines are still there, and so are their costs: `run` watches again, `delete` ends them"
    return until_interrupted(act, left=left, log=_log)


def _status(fleet: TpuFleet) -> int:
    found = fleet.resource()
    state = _state(found)
    _log(f"{fleet.job.name}: {(state or 'there is none').lower()}{_reason(found)}")
    if state == "ACTIVE":
        for node, node_state in fleet.node_states().items():
            _log(f"{node}: {node_state.lower()}")
        for status in fleet.status():
            _log(f"{status.host}: {status.state}{'' if status.code is None else f' {status.code}'}")
    return 0


def _done(act: Callable[[], None]) -> int:
    act()
    return 0


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
