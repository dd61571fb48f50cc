"""The sbatch file: what it says, and that no word from outside is more than a word. Runs it with stand-ins for srun."""

import json
import os
import shutil
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
names = ("A", "ARRAY", "PYTHONUNBUFFERED", "SRUN_CPUS_PER_TASK", "JAX_PLATFORMS")
print(json.dumps({{"words": words, "cwd": os.getcwd(), "env": {{n: os.environ.get(n) for n in names}}}}), flush=True)
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with stand-ins: srun prints what it was given, scontrol notes what it is to requeue."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN.format(python=sys.executable))
    shown = 'if [ "$1" = show ]; then echo "JobId=7 JobName=run JobState=${STATE:-RUNNING} Reason=None"; exit; fi'
    (programs / "scontrol").write_text(f'#!/bin/bash\n{shown}\necho "$@" >> {tmp_path}/requeued\n')
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


@pytest.mark.parametrize("trouble", ["full", "unwritable"])
def test_failures_that_cannot_be_counted_do_not_go_back_into_the_queue(folder, capsys, trouble):
    text, _ = written(capsys, *flags_of(folder), "--retries=3")
    failures = folder / HOSTILE / ".failures-7"
    failures.parent.mkdir()
    if trouble == "full":
        failures.symlink_to("/dev/full")
    else:
        failures.mkdir()
    done = run(folder, text, code=1)
    assert done.returncode == 1 and "given up, as its failures cannot be counted in" in done.stdout
    assert not (folder / "requeued").exists()
    assert run(folder, text, code=75).returncode == 75  # which is not counted
    assert (folder / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_what_was_cancelled_does_not_go_back_into_the_queue(folder, capsys, state):
    """A plain scancel ends the tasks, which save and leave with 75; SLURM would requeue the job all the same."""
    text, _ = written(capsys, *flags_of(folder))
    done = run(folder, text, code=75, STATE=state or "?")
    assert done.returncode == 75 and f"the job is {state or 'unknown'} and does not" in done.stdout
    assert not (folder / "requeued").exists()


def test_failures_after_a_long_run_begin_to_count_anew(folder, capsys, monkeypatch):
    monkeypatch.setattr(slurm, "HEALTHY_SECONDS", 0.0)  # each start was a long one
    text, _ = written(capsys, *flags_of(folder), "--retries=1")
    for queued in (1, 2, 3):
        assert run(folder, text, code=69).returncode == 69
        assert (folder / "requeued").read_text() == "requeue 7\n" * queued


def test_tasks_get_their_processors_and_must_find_their_gpus(folder, capsys):
    text, _ = written(capsys, *flags_of(folder), "--cpus_per_task=12", "--gpus_per_node=8")
    found = json.loads(run(folder, text, code=0).stdout)["env"]
    assert found["SRUN_CPUS_PER_TASK"] == "12" and found["JAX_PLATFORMS"] == "cuda,cpu"
    text, _ = written(capsys, *flags_of(folder), "--gpus_per_node=8", "--env=JAX_PLATFORMS=cuda")
    assert json.loads(run(folder, text, code=0).stdout)["env"]["JAX_PLATFORMS"] == "cuda"
    text, _ = written(capsys, *flags_of(folder))
    assert json.loads(run(folder, text, code=0).stdout)["env"]["JAX_PLATFORMS"] is None


def test_gpus_without_processors_are_told(folder, capsys):
    slurm.main([*COMMON, *flags_of(folder), "--gpus_per_node=8", "--dry-run"])
    assert "WITHOUT --cpus_per_task SLURM GIVES EACH PROCESS ONE PROCESSOR" in capsys.readouterr().err
    for more in (["--gpus_per_node=8", "--cpus_per_task=12"], []):
        slurm.main([*COMMON, *flags_of(folder), *more, "--dry-run"])
        assert capsys.readouterr().err == ""


def test_an_array_gives_each_task_its_own(folder, capsys):
    flags = flags_of(folder)[:1] + [f"--workdir={folder}/runs/{{array}}", "--array=0-3%2", "--python=python"]
    text, whole = written(capsys, *flags, "--config.seed={array}")
    assert "#SBATCH --array=0-3%2" in text and "%A_%a.log" in whole
    said = json.loads(run(folder, text, code=0, SLURM_ARRAY_TASK_ID="2").stdout)
    assert f"--workdir={folder}/runs/2" in said["words"] and "--config.seed=2" in said["words"]
    # A container sees the task's own folder, which is there; the path up to {array} may be none.
    flags = ["--folder=/shared", f"--workdir={folder}/run-{{array}}/x", "--array=0-3", "--container-image=c"]
    mounts, _ = written(capsys, *flags)
    line = next(line for line in mounts.splitlines() if line.startswith("srun "))
    asked = subprocess.run(["bash", "-c", f"SLURM_ARRAY_TASK_ID=2; printf '%s\n' {line[:-2]}"], capture_output=True)
    assert f",{folder}/run-2/x:{folder}/run-2/x\n" in asked.stdout.decode()
    # The first task's own number is that of the whole array: requeueing it would end the others.
    ids = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert run(folder, text, code=75, **ids).returncode == 75
    assert (folder / "requeued").read_text() == "requeue 7_2\n"


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
    text, _ = written(capsys, *flags, "--config=/home/me/mine.py")  # a file of its own, that no commit holds
    assert ",/home/me/mine.py:/home/me/mine.py,/data:/data" in text
    text, _ = written(capsys, *flags, "--config=/home/me/../me/mine.py:v5p-128")
    assert ",/home/me/mine.py:/home/me/mine.py,/data:/data" in text and "--config=/home/me/../me/mine.py:v5p" in text
    text, _ = written(capsys, *flags, "--config=configs/llama3_8b.py:h100x8", "--workdir=gs://bucket/run")
    mounts = next(word for word in text.split() if word.startswith("--container-mounts="))
    assert "--config=configs/llama3_8b.py:h100x8" in text and "bucket" not in mounts and "configs" not in mounts


def test_without_slurm_here_there_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sbatch is not installed here"):
        slurm.main([*COMMON, f"--folder={tmp_path}", f"--workdir={tmp_path}/run", "--no-check"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--partition=a b"], "plain word"),
        (["--time=1:00:00\n#SBATCH --uid=0"], "give minutes"),
        (["--array=0-3"], "would share"),
        (["--config.seed={array}"], "say --array"),
        (["--gpus_per_node=8", "--tasks_per_node=3"], "one task a GPU"),
        (["--gpus_per_node=8", "--tasks_per_node=4"], "one task a GPU"),
        (["--workdir=runs/mine"], "not all hosts see; give an absolute path"),
        (["--workdir=~/mine"], "not all hosts see"),
        (["--container-image=x", "--container-mount=/a:/b"], "cannot be mounted"),
        (["--container-image=x", "--config=/a,b/x.py"], "'/a,b/x.py' cannot be mounted"),
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
        'line=$(head -n 1 "$QUEUE/states")\nsed -i 1d "$QUEUE/states"\n'
        '[ -n "$line" ] || { echo "Unable to contact slurm controller" >&2; exit 1; }\necho "$line"\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(tmp_path))
    return tmp_path


def waited(queue, *states, more=()):
    line = "JobId=41 JobName=run JobState={} Reason=None Restarts=1 ExitCode={}"
    lines = [line.format(*state) if state else "" for state in states]
    (queue / "states").write_text("".join(f"{line}\n" for line in lines))
    flags = [f"--folder={queue}/shared", f"--workdir={queue}/run", "--no-check", "--wait", "--poll=0.01", *more]
    return slurm.main([*COMMON, *flags])


def test_waiting_lasts_through_new_starts_and_tells_the_exit_code(queue):
    begun = [("PENDING", "0:0"), ("RUNNING", "0:0"), ("COMPLETING", "75:0"), ("PENDING", "0:0"), ("RUNNING", "0:0")]
    assert waited(queue, *begun, ("COMPLETED", "0:0")) == 0
    assert waited(queue, ("FAILED", "3:0")) == 3
    assert waited(queue, ("CANCELLED", "0:15")) == 1
    assert waited(queue, ("TIMEOUT", "0:0")) == 1
    assert waited(queue, ("PREEMPTED", "0:15")) == 1
    assert len((queue / "handed_in").read_text().splitlines()) == 5


def test_a_controller_that_does_not_answer_for_a_while_does_not_end_the_wait(queue, capsys):
    assert waited(queue, ("RUNNING", "0:0"), None, None, ("COMPLETED", "0:0")) == 0
    assert capsys.readouterr().out.count("Unable to contact slurm controller; still waiting") == 2
    with pytest.raises(LaunchError, match="Unable to contact"):
        waited(queue, *[None] * 40, ("COMPLETED", "0:0"))


def test_begun_again_it_waits_for_the_job_that_is_there(queue):
    assert waited(queue, ("COMPLETED", "0:0")) == 0
    for there in ("41\n", "40\n41\n"):  # another one of the name is there too
        (queue / "there").write_text(there)
        assert waited(queue, ("RUNNING", "0:0"), ("COMPLETED", "0:0")) == 0
    # Ended while sbatch ran: the number was not known yet. Of two it is not known which.
    (queue / "shared/jobs/run.41.sbatch").rename(queue / "shared/jobs/run.sbatch")
    with pytest.raises(LaunchError, match="job 40 is named run too"):
        waited(queue, ("FAILED", "3:0"))
    (queue / "there").write_text("41\n")
    assert waited(queue, ("FAILED", "3:0")) == 3
    assert len((queue / "handed_in").read_text().splitlines()) == 1


@pytest.mark.parametrize("more", ["--workdir=/elsewhere", "--config.seed=7", "--folder=/elsewhere"])
def test_the_end_of_another_job_of_the_name_is_not_waited_for(queue, more):
    assert waited(queue, ("COMPLETED", "0:0")) == 0
    (queue / "there").write_text("41\n")
    with pytest.raises(LaunchError, match="job 41 is named run too.*say another --name, or scancel 41"):
        waited(queue, ("COMPLETED", "0:0"), more=[more])
    # Without --wait a second one of the name may be handed in; the first's text stays known.
    (queue / "shared/jobs/run.sbatch").write_text("another text")
    assert waited(queue, ("COMPLETED", "0:0")) == 0
    assert len((queue / "handed_in").read_text().splitlines()) == 1


def test_a_job_that_slurm_has_forgotten_is_no_success(queue):
    assert waited(queue, ("COMPLETED", "0:0")) == 0
    (queue / "there").write_text("40\n")
    (queue / "shared/jobs/run.41.sbatch").rename(queue / "shared/jobs/run.40.sbatch")
    with pytest.raises(LaunchError, match="Invalid job id"):
        waited(queue, ("COMPLETED", "0:0"))


def test_the_settings_of_an_arrays_first_task_are_resolved_before_it_is_handed_in(queue):
    flags = [f"--folder={queue}/shared", f"--workdir={queue}/run/{{array}}", "--array=3-5%2"]
    with pytest.raises(LaunchError, match="batch_size.*3"):
        slurm.main([*COMMON, *flags, "--config.data.batch_size={array}", "--config.parallel.data=2"])
    assert not (queue / "handed_in").exists()


def test_a_mesh_that_is_not_the_hardwares_is_not_handed_in(queue):
    flags = [f"--folder={queue}/shared", f"--workdir={queue}/run", "--nodes=2", "--gpus_per_node=2"]
    with pytest.raises(LaunchError, match="mesh data=3 has 3 devices, but there are 4"):
        slurm.main([*COMMON, *flags, "--config.parallel.data=3", "--config.data.batch_size=12"])
    assert not (queue / "handed_in").exists()


def test_waiting_is_for_one_job():
    flags = ["--folder=/s", "--workdir=/s/{array}", "--array=0-3", "--wait", "--no-check"]
    with pytest.raises(LaunchError, match="leave one of them out"):
        slurm.main([*COMMON, *flags])
