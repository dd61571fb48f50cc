"""Scripts that run on a host: unpack the code, install, start a process that outlives the connection, ask, stop.

Each is bash, may be run any number of times, and has every word from outside quoted. A host keeps, below one folder:

    code/COMMIT/        the code as `git archive` gave it
    venv/LOCK/          packages of that lock file
    jobs/NAME/          lock, pid, job, exit, log of the process; stopped: it is not to be started until `run` is typed

A process is running exactly while jobs/NAME/lock is held: the kernel gives the lock back however the process ends, and
a number used again by another process does not deceive. Whoever only asks takes the lock as one of many (flock -s), so
that two who ask at once do not take each other for the process.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.job import Job

_FLAGS = "set -euo pipefail"
UV = "0.13.9"  # brings Python 3.11, which the locks are for, to hosts without it
_STATUS = re.compile(r"maxlm-status (\S+) (absent|running|other|exited|stopped)(?: (\d+))?")


class Status(NamedTuple):
    """What a host says of the job: absent (never started, or killed), running, other (another job), exited, stopped.

    Stopped: somebody has asked for that, it does not run, and it was not complete; with its exit code if it had one.
    """

    host: str
    state: str
    code: int | None = None


class Layout(NamedTuple):
    """Where things are on a host, in words that its shell expands nowhere but in a leading $HOME."""

    folder: str  # absolute, or relative to the home there

    @property
    def root(self) -> str:
        return shlex.quote(self.folder) if self.folder.startswith("/") else f'"$HOME"/{shlex.quote(self.folder)}'

    def code(self, job: Job) -> str:
        return f"{self.root}/code/{job.commit}"

    def venv(self, lock: Path) -> str:
        return f"{self.root}/venv/{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"

    def job(self, job: Job) -> str:
        return f"{self.root}/jobs/{job.name}"


def unpack(layout: Layout, job: Job, archive: str) -> str:
    """Unpacks the archive, a file there (or - for standard input), unless the commit is there already."""
    place = layout.code(job)
    source = "-" if archive == "-" else shlex.quote(archive)
    return f"""{_FLAGS}
place={place}
if [ -e "$place" ]; then exit 0; fi
mkdir -p "$place.partial.$$"
trap 'rm -rf "$place.partial.$$"' EXIT
tar -xz -C "$place.partial.$$" -f {source}
mv -T "$place.partial.$$" "$place" || [ -e "$place" ]
"""


def install(layout: Layout, job: Job, lock: Path) -> str:
    """Makes the environment of the lock file, with the Python it is for; a half-made one is made anew."""
    name = shlex.quote(str(lock.relative_to(lock.parent.parent)))
    return f"""{_FLAGS}
venv={layout.venv(lock)}
if [ -e "$venv/complete" ]; then exit 0; fi
mkdir -p "$(dirname "$venv")"
exec 9> "$venv.lock"
flock 9
if [ -e "$venv/complete" ]; then exit 0; fi
rm -rf "$venv"
if python3.11 -c 'import ensurepip' 2> /dev/null; then python3.11 -m venv "$venv"
else
rm -rf "$venv.uv"
python3 -m pip install --quiet --target="$venv.uv" uv=={UV}
PYTHONPATH="$venv.uv" python3 -m uv venv --quiet --seed --python 3.11 "$venv"
fi
"$venv"/bin/python -m pip install --quiet --no-deps -r {layout.code(job)}/{name}
touch "$venv/complete"
"""


def start(
    layout: Layout,
    job: Job,
    lock: Path,
    *,
    words: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    secrets_file: str = "",
) -> str:
    """Starts the process, unless this very job is running or was stopped; ends with the status line.

    Args:
      words: added to the job's arguments.
      environment: added to the job's variables; may be secret where the script goes over standard input.
      secrets_file: a file that has to be there, with further assignments; read and removed.
    """
    variables = {"PYTHONUNBUFFERED": "1", **job.environment, **(environment or {})}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
    command = shlex.join([*job.arguments(), *words])
    secrets = shlex.quote(secrets_file)
    missing = f"echo {shlex.quote(f'the secrets did not come to {secrets_file}')} >&2; exit 1"
    read = f"[ -e {secrets} ] || {{ {missing}; }}\n. {secrets}\nrm -f {secrets}\n" if secrets_file else ""
    return f"""{_FLAGS}
mkdir -p {layout.job(job)}
cd {layout.job(job)}
{read}if [ ! -e stopped ] && flock -sn lock true; then
rm -f exit
printf %s {job.digest()} > job
{exports}
export PYTHONPATH={layout.code(job)}
code={layout.code(job)} python={layout.venv(lock)}/bin/python run=$PWD \\
  setsid bash -c {shlex.quote(_wrapper(command))} \\
  >> log 2>&1 < /dev/null &
echo $! > pid
for turn in {{1..100}}; do
if [ -e exit ] || ! flock -sn lock true; then break; fi
sleep 0.05
done
fi
{_status_lines(job)}"""


def _wrapper(command: str) -> str:
    # The wrapper outlives the SIGTERM that its whole group is sent, to write down how the process ended. The lock is
    # inherited: it is held as long as anything of the job lives.
    return (
        'exec 9> "$run/lock"; flock -w 30 9 || exit 0; [ ! -e "$run/exit" ] || exit 0; trap : TERM; cd "$code"; '
        f'"$python" {command}; code=$?; echo "$code" > "$run/exit.partial"; mv "$run/exit.partial" "$run/exit"'
    )


def _status_lines(job: Job) -> str:
    # Right after a start the lock may be free for a moment on either side of the process's life: `exit` is read first.
    return f"""if [ -e exit ]; then s="exited $(cat exit)"
elif flock -sn lock true; then if [ -e exit ]; then s="exited $(cat exit)"; else s=absent; fi
else s=running; fi
{_other(job)}\
if [ -e stopped ]; then case "$s" in absent) s=stopped ;; "exited 0") ;; exited*) s="stopped ${{s#exited }}" ;; esac; fi
echo "maxlm-status $(hostname) $s"
"""


def _other(job: Job) -> str:
    """Tells another job of the name from this one; not where whatever runs under the name is asked for."""
    if not job.commit:
        return ""
    return f"""if [ "$s" != absent ] && [ "$(cat job)" != {job.digest()} ]; then
if [ "$s" = running ]; then s=other; else s=absent; fi
fi
"""


def status(layout: Layout, job: Job) -> str:
    """Prints the status line; for a job without a commit, that of whatever job of the name there is."""
    return f"""{_FLAGS}
mkdir -p {layout.job(job)}
cd {layout.job(job)}
{_status_lines(job)}"""


def stop(layout: Layout, job: Job, *, seconds: int) -> str:
    """Sends SIGTERM to whatever runs under the job's name, waits up to `seconds` for it to save, then kills."""
    return f"""{_FLAGS}
cd {layout.job(job)} 2> /dev/null || exit 0
if ! flock -sn lock true; then
kill -TERM -- "-$(cat pid)" || true
flock -w {seconds} lock true || kill -KILL -- "-$(cat pid)"
flock -w 30 lock true
fi
"""


def stop_for_good(layout: Layout, job: Job, *, seconds: int) -> str:
    """`stop`, and nobody who watches the job starts it again: only after `allow`."""
    return f"""{_FLAGS}
mkdir -p {layout.job(job)}
touch {layout.job(job)}/stopped
{stop(layout, job, seconds=seconds)}"""


def allow(layout: Layout, job: Job) -> str:
    """Takes an earlier `stop_for_good` back."""
    return f"{_FLAGS}\nrm -f {layout.job(job)}/stopped\n"


def follow(layout: Layout, job: Job) -> str:
    """Prints the log from its last lines on, for ever."""
    return f"mkdir -p {layout.job(job)} && touch {layout.job(job)}/log && exec tail -n 5 -F {layout.job(job)}/log"


def read_status(output: str) -> list[Status]:
    """The status lines in what the hosts printed, in any order."""
    return [Status(host, state, int(code) if code else None) for host, state, code in _STATUS.findall(output)]
