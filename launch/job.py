"""What is to run, said once for every launcher; `python -m launch.job --config=... --workdir=...` prints it.

A job is a config of one commit, a place for the run and the hardware's shape. Launchers turn it into argument lists;
where a shell is needed at the far end, every word is quoted. Values of secrets are read from the environment when a
command is sent and are printed as their names only.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from maxlm.heartbeat import SILENCE_SECONDS
from maxlm.plan.topology import TopologyError, parse_topology
from maxlm.rollcall import JOIN_SECONDS, tree_digest
from maxlm.train.signals import EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parent.parent
# What a tool may take beyond the time to save, and what installing, or making and giving back machines, may take.
TOOL_SECONDS, SLOW_SECONDS = 120.0, 1800.0
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OVERRIDE = re.compile(r"--config\.[A-Za-z0-9_.]+=(.*)", re.DOTALL)
_BUCKET = re.compile(r"(gs|s3)://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/.*)?", re.DOTALL)
# What must not be written into a file or a log by way of an ordinary variable.
_SECRETIVE = re.compile(r"(TOKEN|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|API_?KEYS?|ACCESS_?KEYS?)(_|$)", re.IGNORECASE)


class LaunchError(Exception):
    """Something that was asked for, or that a tool answered, in one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """The hardware: `groups` of `hosts`, each of which runs `processes` processes.

    groups: TPU slices, or replicas of a set of nodes; fast links are inside a group only.
    hosts: machines in a group.
    processes: processes on a host.
    accelerator: its name as the platform spells it, as in v5litepod-16 or nvidia-h100-80gb; empty: CPU.
    devices: accelerators of a process; 0: all that it sees.
    """

    groups: int = 1
    hosts: int = 1
    processes: int = 1
    accelerator: str = ""
    devices: int = 0

    @property
    def all_processes(self) -> int:
        return self.groups * self.hosts * self.processes


@dataclasses.dataclass(frozen=True)
class Job:
    """A run as it is handed to a platform. Made by `make_job`, which checks it.

    name: of the job and of what it creates, a DNS label of up to 40 characters.
    config: path of the config file; a relative one is below the root of the code. May be FILE:PLACE.
    workdir: folder that all hosts see, or gs:// or s3://.
    overrides: --config.section.key=value, as `maxlm train` takes them.
    commit: the full name of the commit that runs, copied to the hosts as `git archive` gives it; empty: whatever is
      there, for what looks at a job or ends it.
    environment: variables of every process.
    secrets: names of variables whose values are taken from the launcher's environment when they are needed.
    retries: how often a failed run is started again; leaving with EXIT_PREEMPTED never counts.
    grace_seconds: time to save that a process is given between SIGTERM and SIGKILL.
    join_seconds: how long processes that have come wait for the others.
    silence_seconds: after how long without a sign a process counts as lost.
    """

    name: str
    config: str
    workdir: str
    overrides: tuple[str, ...] = ()
    commit: str = ""
    topology: Topology = Topology()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    retries: int = 3
    grace_seconds: int = 300
    join_seconds: int = JOIN_SECONDS
    silence_seconds: int = SILENCE_SECONDS

    @property
    def config_file(self) -> str:
        """The config's path alone, without a recipe's :PLACE, as git and mounts name it."""
        return file_of(self.config)

    def arguments(self) -> list[str]:
        """The words after the interpreter: the same program on every host."""
        limits = [f"--join_seconds={self.join_seconds}", f"--silence_seconds={self.silence_seconds}"]
        place = f"--workdir={self.workdir}"
        return ["-m", "maxlm.cli", "train", f"--config={self.config}", place, *self.overrides, *limits]

    def digest(self) -> str:
        """A short digest of all that makes a running process this job's and not another's: what it sees of the job."""
        seen = [self.arguments(), self.commit, dataclasses.asdict(self.topology), dict(self.environment), self.secrets]
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self, hardware: str = "") -> str:
        """The job for people, a setting a line; of secrets there are only names here.

        Args:
          hardware: the topology in words, where it is not told by hosts and processes.
        """
        shape = self.topology
        rows = {
            "job": self.name,
            "config": self.config,
            "overrides": shlex.join(self.overrides) or "none",
            "workdir": self.workdir,
            "code": f"commit {self.commit}" if self.commit else "as it is",
            "topology": hardware
            or f"{shape.groups} x {shape.hosts} hosts x {shape.processes} processes"
            + (f", {shape.accelerator}" if shape.accelerator else ""),
            "environment": shlex.join(f"{name}={value}" for name, value in self.environment.items()) or "none",
            "secrets": " ".join(self.secrets) or "none",
            "retries": f"{self.retries}, and any number after exit code {EXIT_PREEMPTED}",
            "time to save": f"{self.grace_seconds} s",
            "time to come": f"{self.join_seconds} s, and {self.silence_seconds} s of silence are a loss",
        }
        return "\n".join(f"{name:13}{value}" for name, value in rows.items())


def make_job(**settings: object) -> Job:
    """A checked job. Raises LaunchError with everything that is wrong with it, a sentence a line."""
    # The settings are flags, parsed to the fields' types; a name that is none raises here.
    job = Job(**settings)  # type: ignore[arg-type]
    problems = []
    if not _NAME.fullmatch(job.name):
        problems.append(f"--name is {job.name!r}; give lower-case letters, digits and -, at most 40, a letter first")
    strings = [job.config, job.workdir, *job.overrides, *job.environment.values()]
    problems += [f"{text!r} has a control character" for text in strings if re.search(r"[\x00-\x1f\x7f]", text)]
    problems += [
        f"{text!r} is no override; type --config.section.key=value"
        for text in job.overrides
        if not _OVERRIDE.fullmatch(text)
    ]
    if "://" in job.workdir and not _BUCKET.fullmatch(job.workdir):
        problems.append(f"--workdir is {job.workdir!r}; give a folder, gs://bucket/folder or s3://bucket/folder")
    names = [*job.environment, *job.secrets]
    problems += [
        f"{name!r} cannot name a variable; use letters, digits and _" for name in names if not _VARIABLE.fullmatch(name)
    ]
    problems += [
        f"{name} looks like a secret, and its value would be written down; type --secret={name} instead"
        for name in job.environment
        if _SECRETIVE.search(name)
    ]
    sizes = {"groups": job.topology.groups, "hosts": job.topology.hosts, "processes": job.topology.processes}
    problems += [f"{what} are {size}; give at least 1" for what, size in sizes.items() if size < 1]
    if job.retries < 0:
        problems.append(f"--retries is {job.retries}; give at least 0")
    limits = {name: getattr(job, name) for name in ("grace_seconds", "join_seconds", "silence_seconds")}
    problems += [f"--{name} is {seconds}; give at least 1" for name, seconds in limits.items() if seconds < 1]
    if job.commit and not re.fullmatch("[0-9a-f]{40}", job.commit):
        problems.append(f"the commit is {job.commit!r}; give its full name of 40 digits")
    if problems:
        raise LaunchError("\n".join(problems))
    return job


def check_shared(job: Job, mounts: Sequence[str] = ("/",)) -> None:
    """Raises LaunchError for a workdir that the hosts would each have for themselves, and lose.

    Args:
      mounts: absolute paths of the folders that they see in common.
    """
    place = os.path.normpath(job.workdir)
    if "://" in job.workdir or any(PurePosixPath(place).is_relative_to(mount) for mount in mounts):
        return
    below = f"an absolute path below {' or '.join(mounts)}, or " if mounts else ""
    raise LaunchError(f"--workdir is {job.workdir!r}, which not all hosts see; give {below}gs://bucket/folder")


def spot_note(job: Job, limit: str) -> str:
    """What --grace_seconds is worth on spot machines, which are gone `limit` after the notice."""
    return (
        f"# --spot: of the {job.grace_seconds} s of --grace_seconds a preempted process gets {limit}, no more. A save "
        "that takes longer is lost: the time between checkpoints (every_steps, mtbf_hours, local_dir) has to cover that"
    )


def file_of(config: str) -> str:
    """The path in FILE or FILE:PLACE; `maxlm train` parts them at the first colon, too."""
    return os.path.normpath(config.partition(":")[0])


# --- code -------------------------------------------------------------------------------------------------------------


def find_commit(revision: str, *, config: str, root: Path = ROOT) -> str:
    """The full name of a commit that holds the config file.

    Args:
      config: FILE or FILE:PLACE; an absolute file is the hosts' own, and looked for in no commit.

    Raises:
      LaunchError: no such commit, the config is not in it, or (for HEAD) the tree has changes that it lacks.
    """
    found = _git(root, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    if revision == "HEAD" and (changed := _git(root, "status", "--porcelain", "--untracked-files=no").decode()):
        raise LaunchError(
            f"the tree has changes that no commit holds ({len(changed.splitlines())} files); commit them, or say "
            "--commit=REVISION to run one that you have"
        )
    file = file_of(config)
    if not Path(file).is_absolute():
        held = _git(root, "ls-tree", "-r", "-z", "--name-only", found, "--", f":(literal){file}").decode()
        if held.rstrip("\0") != file:
            raise LaunchError(
                f"--config={config}: {file} is not in commit {found[:12]}; commit it, or give the absolute path of a "
                "file that every host has"
            )
    return found


def code_archive(commit: str, *, root: Path = ROOT) -> bytes:
    """The code of a commit, as a compressed tar file: equal bytes for an equal commit."""
    return _git(root, "archive", "--format=tar.gz", commit)


def unpack_code(commit: str, folder: Path, *, root: Path = ROOT) -> Path:
    """The code of a commit unpacked below `folder`, whole or absent; what is there already is used."""
    place = folder / "code" / commit
    if not place.exists():
        staged = place.with_name(f".{commit}.{os.getpid()}.partial")
        staged.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(code_archive(commit, root=root))) as archive:
            _extract(archive, staged)
        staged.replace(place)
    return place


def commit_digest(commit: str, *, root: Path = ROOT) -> str:
    """`rollcall.tree_digest` of a commit."""
    content = io.BytesIO(_git(root, "archive", "--format=tar", commit, "maxlm", "configs"))
    with tarfile.open(fileobj=content) as archive, tempfile.TemporaryDirectory() as folder:
        _extract(archive, Path(folder))
        return tree_digest(Path(folder))


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):  # Python 3.11 has it from 3.11.4 on
        archive.extractall(folder, filter="data")
    else:
        archive.extractall(folder)


def _git(root: Path, *words: str) -> bytes:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True)
    if done.returncode:
        raise LaunchError(f"git {words[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


# --- the command line -------------------------------------------------------------------------------------------------


def job_parser(description: str | None, *, join_seconds: int = JOIN_SECONDS) -> argparse.ArgumentParser:
    """The flags that every launcher takes; each adds its own.

    Args:
      join_seconds: how long processes wait for each other on this platform, unless told otherwise.
    """
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", help="of the job: a DNS label of up to 40 characters; that of the config file")
    add(
        "--config",
        required=True,
        help="config file, relative to the repository's root, or absolute on every host; may be FILE:PLACE",
    )
    add("--workdir", required=True, help="folder of the run that every host sees, or gs:// or s3://")
    add("--commit", default="HEAD", help="the code that runs")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of every process")
    add("--secret", action="append", default=[], metavar="NAME", help="a variable that is never printed or saved")
    add("--retries", type=int, default=3, help="starts after a failure; one after exit code 75 does not count")
    add("--grace_seconds", type=int, default=300, help="time to save between SIGTERM and SIGKILL")
    wait = f"how long processes that have come wait for the others; {join_seconds}"
    add("--join_seconds", type=int, default=join_seconds, help=wait)
    lost = f"after how long without a sign a process counts as lost; {SILENCE_SECONDS}"
    add("--silence_seconds", type=int, default=SILENCE_SECONDS, help=lost)
    add("--dry-run", "--dry_run", action="store_true", help="print what would run, and run nothing")
    add("--no-check", action="store_true", help="do not resolve the config here first")
    parser.epilog = "Settings are overridden as for `maxlm train`: --config.section.key=value."
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The launcher's own arguments, and the overrides of the config among them."""
    own = [word for word in arguments if not word.startswith("--config.")]
    return own, tuple(word for word in arguments if word.startswith("--config."))


def job_of(
    values: argparse.Namespace,
    overrides: tuple[str, ...],
    topology: Topology,
    *,
    copied: bool = True,
    platform: str = "",
) -> Job:
    """The job that the flags of `job_parser` describe.

    Args:
      copied: whether a commit is to run, which the tree has to hold then; otherwise code is as it is.
      platform: "cuda" or "tpu", which has to be there then; "": whatever the process finds, the CPU at last.
    """
    environment = {"JAX_PLATFORMS": f"{platform},cpu"} if platform else {}
    for pair in values.env:
        name, separator, value = pair.partition("=")
        if not separator:
            raise LaunchError(f"--env={pair} has no value; type --env=NAME=VALUE")
        environment[name] = value
    return make_job(
        name=values.name or re.sub("[^a-z0-9]+", "-", Path(file_of(values.config)).stem.lower()).strip("-"),
        config=values.config,
        workdir=values.workdir,
        overrides=overrides,
        commit=find_commit(values.commit, config=values.config) if copied else "",
        topology=topology,
        environment=environment,
        secrets=tuple(values.secret),
        retries=values.retries,
        grace_seconds=values.grace_seconds,
        join_seconds=values.join_seconds,
        silence_seconds=values.silence_seconds,
    )


def check_config(job: Job, *, devices: int | None = None) -> None:
    """Resolves the config here, before anything is rented for it. Raises LaunchError if it does not resolve.

    Args:
      devices: that the run will find, which its mesh has to fit; None: not known here.
    """
    command = [sys.executable, "-m", "maxlm.cli", "check", f"--config={job.config}", *job.overrides]
    command += [f"--devices={devices}"] if devices else []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"{done.stderr.strip()}\n(say --no-check to start it all the same)")


def tpu_devices(name: str) -> int | None:
    """JAX devices of TPU slices, named as in 2*v5p-64 or v6e:4x4; None: no such slice is known to `maxlm plan`."""
    try:
        return parse_topology(name).devices
    except TopologyError:
        return None


def secret_values(job: Job, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The secrets by name. Raises LaunchError, which names those that the environment lacks."""
    if missing := [name for name in job.secrets if name not in environment]:
        raise LaunchError(f"the environment has no {' and no '.join(missing)}; set what --secret names")
    return {name: environment[name] for name in job.secrets}


class Answer(NamedTuple):
    """What a tool has printed, and its exit code."""

    code: int
    output: str
    errors: str


def there(program: str) -> None:
    """Raises LaunchError: the program is not installed here."""
    if shutil.which(program) is None:
        raise LaunchError(f"{program} is not installed here, or not on the PATH; see docs/launch.md")


def ask_tool(command: Sequence[str], given: bytes = b"", *, seconds: float) -> Answer:
    """Runs a tool to its end, with its standard input.

    Raises:
      LaunchError: it is not installed, or has not ended within `seconds`.
    """
    there(command[0])
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        what = " ".join(word for word in command[:5] if not re.search("^-|=", word))
        raise LaunchError(f"{what} has not ended within {seconds:.0f} s") from error
    return Answer(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def printed(command: Sequence[str], given: str | None = None) -> str:
    """A command as it can be typed, with its standard input below."""
    line = f"$ {shlex.join(command)}"
    return line if given is None else f"{line} <<'END'\n{given.rstrip()}\nEND"


def run_main(main: Callable[[], int]) -> None:
    """Runs a launcher's main; a LaunchError ends it as a sentence, exit code 2."""
    try:
        code = main()
    except LaunchError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _main() -> int:
    own, overrides = split_overrides(sys.argv[1:])
    values = job_parser(__doc__).parse_args(own)
    print(job_of(values, overrides, Topology()).describe())
    return 0


if __name__ == "__main__":
    run_main(_main)
