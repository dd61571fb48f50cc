"""The sbatch file: what it says, and that no word from outside is more than a word. Runs it with stand-ins for srun."""

import json
import os
import subprocess
import sys

import pytest

from launch import slurm
from launch.job import LaunchError
from tests.launch.common import COMMIT

HOSTILE = "a b'c\"d$(touch pwned)`touch pwned`;$HOME &|*"
COMMON = [f"--commit={COMMIT}", "--config=configs/quickstart.py", "--time=1:00:00", "--name=run"]
SRUN = """#!{python}
import json, os, sys
words = sys.argv[sys.argv.index("--") + 1 :]
names = ("A", "ARRAY", "PYTHONUNBUFFERED")
print(json.dumps({{"words": words, "cwd": os.getcwd(), "env": {{n: os.environ.get(n) for n in names}}}}), flush=True)
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with stand-ins: srun prints what it was given, scontrol notes that it was called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN.format(python=sys.executable))
    (programs / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')
    (programs / "sleep").write_text("#!/bin/bash\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    return tmp_path


def written(capsys, *flags):
    slurm.main([*COMMON, *flags, "--dry-run"])
    text = capsys.readouterr().out
    return text[text.index("#!/bin/bash") : text.index("\n$ sbatch")], text


def run(folder, text, *, code, **environment):
    commit = next(line for line in text.splitlines() if line.startswith("cd ")).rsplit("/", 1)[-1].rstrip("'")
    (folder / "shared $x" / "code" / commit).mkdir(parents=True, exist_ok=True)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "CODE": str(code), **environment}
    return subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, cwd=folder)


def flags_of(folder, *more):
    return [f"--folder={folder}/shared $x", f"--workdir={folder}/{HOSTILE.replace('/', '')}", "--python=python", *more]


def test_hostile_words_stay_words(folder, capsys):
    text, _ = written(capsys, *flags_of(folder), f"--config.name={HOSTILE}", f"--env=A={HOSTILE}")
    done = run(folder, text, code=0)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert f"--config.name={HOSTILE}" in said["words"] and f"--workdir={folder}/{HOSTILE}" in said["words"]
    assert said["env"]["A"] == HOSTILE and said["cwd"].startswith(f"{folder}/shared $x/code/")
    assert not list(folder.rglob("pwned"))
    assert (folder / HOSTILE).is_dir()


def test_leaving_goes_back_into_the_queue_and_failing_only_so_often(folder, capsys):
    text, _ = written(capsys, *flags_of(folder), "--retries=1")
    for code, queued, ended in ((75, 1, 75), (75, 2, 75), (1, 3, 1), (75, 4, 75), (1, 4, 1), (0, 4, 0)):
        done = run(folder, text, code=code)
        assert done.returncode == ended, done.stderr
        assert (folder / "requeued").read_text() == "requeue 7\n" * queued
    assert run(folder, text, code=1).returncode == 1  # success has cleared the count
    assert (folder / "requeued").read_text() == "requeue 7\n" * 5


def test_an_array_gives_each_task_its_own(folder, capsys):
    flags = flags_of(folder)[:1] + [f"--workdir={folder}/runs/{{array}}", "--array=0-3%2", "--python=python"]
    text, whole = written(capsys, *flags, "--config.seed={array}")
    assert "#SBATCH --array=0-3%2" in text and "%A_%a.log" in whole
    said = json.loads(run(folder, text, code=0, SLURM_ARRAY_TASK_ID="2").stdout)
    assert f"--workdir={folder}/runs/2" in said["words"] and "--config.seed=2" in said["words"]


def test_what_the_scheduler_is_told(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    flags = ["--nodes=4", "--gpus_per_node=8", "--grace_seconds=90", "--secret=HF_TOKEN", "--partition=p"]
    flags += ["--container-image=reg#maxlm:1", "--container-mount=/data"]
    flags += ["--folder=/shared", "--workdir=/shared/run"]
    text, whole = written(capsys, *flags)
    for line in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "signal=TERM@90", "requeue", "open-mode=append"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --export=PATH,HOME,LANG,HF_TOKEN\n" in text and "hush" not in whole
    assert "--container-image=reg#maxlm:1" in text and ",/shared/run:/shared/run,/data:/data" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--partition=a b"], "plain word"),
        (["--time=1:00:00\n#SBATCH --uid=0"], "give minutes"),
        (["--array=0-3"], "would share"),
        (["--config.seed={array}"], "say --array"),
        (["--gpus_per_node=8", "--tasks_per_node=3"], "do not go into"),
        (["--gpus_per_node=8", "--tasks_per_node=1"], "one task a GPU"),
        (["--container-image=x", "--container-mount=/a:/b"], "cannot be mounted"),
        (["--config.name=a\nb"], "control character"),
        (["--config=configs/none.py"], "not in commit"),
    ],
)
def test_what_cannot_be_is_refused(flags, message):
    with pytest.raises(LaunchError, match=message):
        slurm.main([*COMMON, "--folder=/s", "--workdir=/s/run", *flags, "--dry-run"])


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A queue whose only job goes through the states of `states`; `handed_in` counts calls of sbatch."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "squeue").write_text('#!/bin/bash\ncat "$QUEUE/there" 2> /dev/null || true\n')
    (programs / "sbatch").write_text('#!/bin/bash\necho "$@" >> "$QUEUE/handed_in"\necho "41;cluster"\n')
    (programs / "scontrol").write_text(
        '#!/bin/bash\n[ "$4" = 41 ] || { echo "Invalid job id specified" >&2; exit 1; }\n'
        'head -n 1 "$QUEUE/states"\nsed -i 1d "$QUEUE/states"\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(tmp_path))
    return tmp_path


def waited(queue, *states):
    lines = [f"JobId=41 JobName=run JobState={state} Reason=None Restarts=1 ExitCode={code}" for state, code in states]
    (queue / "states").write_text("".join(f"{line}\n" for line in lines))
    flags = [f"--folder={queue}/shared", f"--workdir={queue}/run", "--no-check", "--wait", "--poll=0.01"]
    return slurm.main([*COMMON, *flags])


def test_waiting_lasts_through_new_starts_and_tells_the_exit_code(queue):
    begun = [("PENDING", "0:0"), ("RUNNING", "0:0"), ("COMPLETING", "75:0"), ("PENDING", "0:0"), ("RUNNING", "0:0")]
    assert waited(queue, *begun, ("COMPLETED", "0:0")) == 0
    assert waited(queue, ("FAILED", "3:0")) == 3
    assert waited(queue, ("CANCELLED", "0:15")) == 1
    assert waited(queue, ("TIMEOUT", "0:0")) == 1
    assert len((queue / "handed_in").read_text().splitlines()) == 4


def test_begun_again_it_waits_for_the_job_that_is_there(queue):
    (queue / "there").write_text("41\n")
    assert waited(queue, ("RUNNING", "0:0"), ("COMPLETED", "0:0")) == 0
    assert not (queue / "handed_in").exists()


def test_a_job_that_slurm_has_forgotten_is_no_success(queue):
    (queue / "there").write_text("40\n")
    with pytest.raises(LaunchError, match="Invalid job id"):
        waited(queue, ("COMPLETED", "0:0"))


def test_waiting_is_for_one_job():
    flags = ["--folder=/s", "--workdir=/s/{array}", "--array=0-3", "--wait", "--no-check"]
    with pytest.raises(LaunchError, match="leave one of them out"):
        slurm.main([*COMMON, *flags])
