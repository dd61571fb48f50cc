"""A job under SLURM: writes an sbatch file and hands it in.

python -m launch.slurm --nodes=4 --gpus_per_node=8 --time=24:00:00 --folder=/shared --config=... --workdir=/shared/run

The scheduler sends SIGTERM before the time is over (--signal) or when it preempts the job; the run saves and leaves
with exit code 75, and the job puts itself back into the queue. After a failure it does so too, --retries times
in a row. A job that was cancelled stays out of it.

With --wait this program lasts as long as the job, through all its starts, and leaves with its exit code. Begun again,
it waits for the job that is there rather than hand in a second one; one of other settings under that name it refuses.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.job import (
    EXIT_PREEMPTED,
    TOOL_SECONDS,
    Job,
    LaunchError,
    Topology,
    ask_tool,
    check_config,
    check_shared,
    job_of,
    job_parser,
    printed,
    run_main,
    secret_values,
    split_overrides,
    there,
    unpack_code,
)
from launch.supervise import HEALTHY_SECONDS

ARRAY = "{array}"  # in --workdir and overrides: the number of the array's task
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@,/+-]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
# States in which a job has come to its end; from all others it may yet run (again).
_ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    "PREEMPTED",
}
_LOOKS = 30  # in a row that may fail before the wait for a job ends: the controller may be restarted meanwhile
_ARRAY = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?")


def sbatch_file(job: Job, values: argparse.Namespace, code: Path) -> str:
    """The text of the sbatch file; everything from outside is checked to be a plain word, or quoted."""
    shape = job.topology
    directives = {
        "job-name": job.name,
        "nodes": shape.hosts,
        "ntasks-per-node": shape.processes,
        # Every task sees all GPUs of its node: JAX takes the one of the task's own number, and none that was hidden.
        "gpus-per-node": values.gpus_per_node or None,
        "cpus-per-task": values.cpus_per_task,
        "mem": values.mem,
        "time": values.time,
        "partition": values.partition,
        "account": values.account,
        "qos": values.qos,
        "constraint": values.constraint,
        "array": values.array,
        # To the steps alone, not to this script, which lives on to ask for a new start.
        "signal": f"TERM@{job.grace_seconds}",
        "open-mode": "append",
        "export": ",".join(["PATH", "HOME", "LANG", *job.secrets]),
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    exports = [f"export {name}={_quote(value)}" for name, value in job.environment.items()]
    if values.cpus_per_task:  # srun does not take it from the job's own directives
        exports.append(f"export SRUN_CPUS_PER_TASK={values.cpus_per_task}")
    text = "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", "", *exports])
    return f"""{text}
export PYTHONUNBUFFERED=1 PYTHONPATH={shlex.quote(str(code))}
export SLURM_EXPORT_ENV=ALL  # the steps get all of the above
run={_quote(job.workdir if "://" not in job.workdir else f"{values.folder}/jobs/{job.name}")}
mkdir -p "$run"
failures="$run/.failures-$SLURM_JOB_ID"
# The number alone, of the first task of an array, stands for the whole array.
job="${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}"
job="${{job:-$SLURM_JOB_ID}}"
trap : TERM
cd {shlex.quote(str(code))}

srun --kill-on-bad-exit=0 --wait=600 {_srun_words(job, values, code)} &
step=$! began=$SECONDS
wait "$step"
code=$?
while kill -0 "$step" 2> /dev/null; do wait "$step"; code=$?; done  # a signal ends `wait`, not the step

if [ "$code" -eq 0 ]; then rm -f "$failures"; exit 0; fi
# Only while the scheduler calls it running: it would also requeue a job that somebody has just cancelled.
for turn in {{1..20}}; do
  if state=$(scontrol show job --oneliner "$job"); then break; fi
  sleep 15
done
state=$(sed -n 's/.*JobState=\\([A-Z_]*\\).*/\\1/p' <<< "$state")
if [ "$state" != RUNNING ]; then
  echo "the run ended with exit code $code; the job is ${{state:-unknown}} and does not go back into the queue"
  exit "$code"
fi
if [ $((SECONDS - began)) -ge {HEALTHY_SECONDS:.0f} ]; then rm -f "$failures"; fi
if [ "$code" -ne {EXIT_PREEMPTED} ]; then
  if ! echo >> "$failures" || ! count=$(wc -l < "$failures"); then  # it would go back for ever
    echo "the run ended with exit code $code; given up, as its failures cannot be counted in $failures"
    exit "$code"
  fi
  if [ "$count" -gt {job.retries} ]; then
    echo "the run ended with exit code $code; given up after $count failures"
    exit "$code"
  fi
fi
echo "the run ended with exit code $code; back into the queue"
scontrol requeue "$job" || exit "$code"
# The scheduler now ends this script; its own exit code must not be taken for the job's.
sleep 300
exit "$code"
"""


def _srun_words(job: Job, values: argparse.Namespace, code: Path) -> str:
    words = []
    if values.container_image:
        # The run's own folder, which the script has made before; of an array that of the task.
        folders = dict.fromkeys([str(code), *([] if "://" in job.workdir else [job.workdir])])
        folders |= dict.fromkeys(_own_config(job))
        mounts = ",".join(f"{folder}:{folder}" for folder in [*folders, *values.container_mount])
        words = [f"--container-image={values.container_image}", f"--container-mounts={mounts}"]
        words += [f"--container-workdir={code}"]
    command = [*words, "--", values.python, *job.arguments()]
    return " ".join(_quote(word) for word in command)


def _own_config(job: Job) -> list[str]:
    """The config file where it is one that no commit holds, to be mounted by itself."""
    return [job.config_file] if Path(job.config_file).is_absolute() else []


def _quote(text: str) -> str:
    """A word for bash that stands for `text`, with {array} replaced by the number of the array's task."""
    parts = [shlex.quote(part) if part else "" for part in text.split(ARRAY)]
    return '"$SLURM_ARRAY_TASK_ID"'.join(parts) or "''"


def check_words(job: Job, values: argparse.Namespace) -> None:
    """Raises LaunchError for anything that cannot stand in a directive, where SLURM quotes in its own way."""
    problems = []
    for name in ("partition", "account", "qos", "constraint", "mem"):
        value = getattr(values, name)
        if value is not None and not _WORD.fullmatch(value):
            problems.append(f"--{name} is {value!r}; give a plain word")
    if not _TIME.fullmatch(values.time):
        problems.append(f"--time is {values.time!r}; give minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    if values.array is not None and not _ARRAY.fullmatch(values.array):
        problems.append(f"--array is {values.array!r}; give numbers as in 0-7 or 0-7%2")
    if values.array is not None and ARRAY not in job.workdir:
        problems.append(f"the tasks of an array would share --workdir={job.workdir}; put {ARRAY} into it")
    if values.array is None and any(ARRAY in word for word in (job.workdir, *job.overrides)):
        problems.append(f"{ARRAY} stands for the number of an array's task; say --array=0-7, or leave it out")
    if not values.folder.startswith("/") or re.search(r"[\\%]", values.folder):
        problems.append(f"--folder is {values.folder!r}; give an absolute path without % and \\, seen by all nodes")
    folders = [] if "://" in job.workdir else [job.workdir]
    mounted = [*values.container_mount, *folders, *_own_config(job), values.folder] if values.container_image else []
    problems += [f"{path!r} cannot be mounted: it has a , or :" for path in mounted if re.search("[,:]", path)]
    if problems:
        raise LaunchError("\n".join(problems))


def notes(values: argparse.Namespace) -> list[str]:
    """What the scheduler does otherwise than one may think."""
    if values.gpus_per_node and not values.cpus_per_task:
        return [
            "# WITHOUT --cpus_per_task SLURM GIVES EACH PROCESS ONE PROCESSOR, unless the cluster says otherwise: too "
            "little to feed a GPU. Say --cpus_per_task=N, a node's processors divided by its GPUs"
        ]
    return []


def submit_command(job: Job, values: argparse.Namespace, file: Path) -> list[str]:
    """sbatch as an argument list; paths stand here rather than in directives."""
    number = "%A_%a" if values.array is not None else "%j"
    return ["sbatch", "--parsable", f"--output={values.folder}/logs/{job.name}-{number}.log", str(file)]


def queued(job: Job, text: str, file: Path) -> str | None:
    """The number of the job of this user and name that has not ended, or None.

    Args:
      text: of its sbatch file; `file` is where that stands until the number is known, then it is `numbered`.

    Raises:
      LaunchError: there are jobs of the name, and none was handed in with this text.
    """
    numbers = _answer("squeue", "--me", "--noheader", f"--name={job.name}", "--format=%i").split()
    stored = {number: place.read_text() for number in numbers if (place := numbered(file, number)).exists()}
    if ours := [number for number in stored if stored[number] == text]:
        return ours[0]
    strange = [number for number in numbers if number not in stored]
    if len(strange) == 1 and file.exists() and file.read_text() == text:
        return strange[0]  # this program was ended while sbatch ran
    if numbers:
        raise LaunchError(
            f"job {numbers[0]} is named {job.name} too, and was handed in with other settings, commit or --folder than "
            f"{file} would have now, so that its end is not this one's; say another --name, or scancel {numbers[0]}"
        )
    return None


def numbered(file: Path, number: str) -> Path:
    """Where the text of a job's sbatch file is kept, once SLURM has given it a number. No job's name has a dot."""
    return file.with_name(f"{file.stem}.{number}.sbatch")


def wait_for(number: str, *, poll: float) -> int:
    """Waits until SLURM has done with a job, and returns its exit code; 1 for one that was ended from outside."""
    failed = 0
    while True:
        try:
            fields = dict(re.findall(r"(\w+)=(\S*)", _answer("scontrol", "show", "job", "--oneliner", number)))
            failed = 0
        except LaunchError as error:
            failed += 1
            if failed == _LOOKS or "Invalid job id" in str(error):
                raise
            print(f"{error}; still waiting for job {number}", flush=True)
            fields = {}
        if fields.get("JobState") in _ENDED:
            code, _, killed_by = fields.get("ExitCode", "").partition(":")
            own = int(code) if code.isdigit() and killed_by in ("", "0") else 1
            print(f"job {number}: {fields['JobState'].lower()}, exit code {fields.get('ExitCode')}")
            return 0 if fields["JobState"] == "COMPLETED" else own or 1
        time.sleep(poll)


def _answer(*command: str) -> str:
    """What a command of SLURM prints. Raises LaunchError if it fails."""
    done = ask_tool(command, seconds=TOOL_SECONDS)
    if done.code:
        raise LaunchError(f"{command[0]}: {done.errors.strip() or f'exit code {done.code}'}")
    return done.output.strip()


def _first_task(job: Job, values: argparse.Namespace) -> Job:
    """The job with the number of an array's first task in its settings, which stands for the others'."""
    first = re.split("[-,%]", values.array or "")[0]
    return dataclasses.replace(job, overrides=tuple(word.replace(ARRAY, first) for word in job.overrides))


def _parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, join_seconds=600)  # all nodes read the code from one folder
    add = parser.add_argument
    add("--nodes", type=int, default=1)
    add("--tasks_per_node", type=int, help="processes on a node; one a GPU, or one")
    add("--gpus_per_node", type=int, default=0, help="0: CPU only")
    add("--cpus_per_task", type=int, help="processors of a process; what the cluster says, mostly 1")
    add("--mem", help="memory of a node, as in 500G")
    add("--time", required=True, help="as in 24:00:00")
    add("--partition")
    add("--account")
    add("--qos")
    add("--constraint")
    add("--array", help=f"several runs, as in 0-7 or 0-7%%2; {ARRAY} in --workdir and settings is the number of each")
    add("--folder", required=True, help="absolute path that all nodes see: code and logs are kept there")
    add("--python", default=sys.executable, help="the interpreter with the packages, on the nodes or in the container")
    add("--container-image", default="", help="enroot image, through pyxis; without it the job runs bare")
    add("--container-mount", action="append", default=[], help="a further folder of the nodes inside the container")
    add("--wait", action="store_true", help="last as long as the job, and leave with its exit code")
    add("--poll", type=float, default=20.0, help="seconds between looks at the job, with --wait; under a few minutes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    values = _parser().parse_args(own)
    tasks = values.tasks_per_node or max(1, values.gpus_per_node)
    if values.gpus_per_node and values.gpus_per_node != tasks:
        raise LaunchError(f"give one task a GPU: --tasks_per_node={values.gpus_per_node}, or leave it out")
    shape = Topology(hosts=values.nodes, processes=tasks, accelerator="gpu" if values.gpus_per_node else "")
    job = job_of(values, overrides, shape, platform="cuda" if values.gpus_per_node else "")
    if values.wait and values.array is not None:
        raise LaunchError("--wait is for one job, --array makes several; leave one of them out")
    check_shared(job)
    check_words(job, values)
    code = Path(values.folder) / "code" / job.commit
    text = sbatch_file(job, values, code)
    file = Path(values.folder) / "jobs" / f"{job.name}.sbatch"
    command = submit_command(job, values, file)
    for note in notes(values):
        print(note, file=sys.stderr)
    if values.dry_run:
        print(job.describe(), f"# {file}\n{text}", printed(command), sep="\n\n")
        return 0
    there("sbatch")
    secret_values(job)
    if values.wait and (number := queued(job, text, file)):
        print(f"job {number} of this name and text is there already: waiting for it")
        return wait_for(number, poll=values.poll)
    if not values.no_check:
        check_config(_first_task(job, values), devices=values.nodes * values.gpus_per_node or None)
    for name in ("jobs", "logs"):
        (Path(values.folder) / name).mkdir(parents=True, exist_ok=True)
    unpack_code(job.commit, Path(values.folder))
    file.write_text(text)
    number = _answer(*command).split(";")[0]
    file.replace(numbered(file, number))
    print(f"job {number}; squeue --job={number} looks at it, scancel --signal=TERM {number} saves and starts it again,")
    print(f"scancel {number} ends it for good. The log is in {values.folder}/logs", flush=True)
    return wait_for(number, poll=values.poll) if values.wait else 0


if __name__ == "__main__":
    run_main(main)
