"""Hosts: two real processes on this machine, and ssh's stand-in, for which hosts are folders."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from launch import hosts
from launch import job as jobs
from launch.job import LaunchError
from launch.supervise import Hopeless
from maxlm.train.metrics import read_metrics
from tests.launch.common import COMMIT, ROOT, SECRET, end_processes, lines, make_home
from tests.runs import Runs

COMMON = [f"--commit={COMMIT}", "--config=configs/quickstart.py", "--name=run", "--no-check", "--poll=0"]
SSH = """#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
host=$1; shift
[ ! -e "$FAKE/$host/dead" ] || {{ echo "connect to host $host: no route" >&2; exit 255; }}
cd "$FAKE/$host" && HOME="$FAKE/$host" PATH="$FAKE/$host/bin:/usr/bin:/bin" exec env -u TOKEN bash -c "$*"
"""
SYSTEM_PYTHON = """#!/bin/bash
case "$*" in
  *"pip install"*--target=*)
    [ ! -e "$HOME/no network" ] || { echo "no network" >&2; exit 1; }
    for word in "$@"; do
      case "$word" in --target=*) mkdir -p "${word#--target=}" && touch "${word#--target=}/uv.py" ;; esac
    done ;;
  *"pip install"*) echo "error: externally-managed-environment" >&2; exit 1 ;;
  "-m uv venv"*)
    [ -e "$PYTHONPATH/uv.py" ] || { echo "No module named uv" >&2; exit 1; }
    mkdir -p "${@: -1}/bin" && cp "$HOME/python" "${@: -1}/bin/python" ;;
  *) exit 4 ;;
esac
"""


@pytest.fixture
def far(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH.format())
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("TOKEN", SECRET)
    yield tmp_path
    end_processes(tmp_path)


def make(far, monkeypatch, codes):
    monkeypatch.setenv("PLAN", "\n".join(map(str, codes)))
    for host in ("a", "b"):
        make_home(far / host)


def run(action, *more):
    return hosts.main([action, "--hosts=a,b", *COMMON, "--workdir=/shared/it's $(id)", *more])


def test_hosts_get_the_code_and_one_process_each_with_its_number(far, monkeypatch, capfd):
    make(far, monkeypatch, [75, 0])
    assert run("run", "--secret=TOKEN", "--config.name=$HOME `id` 'x'") == 0
    for number, host in enumerate("ab"):
        assert lines(far / host / "made") == ["venv", "pip"]
        commands = lines(far / host / "trained")
        place = f"--join_seconds=300 --silence_seconds=60 --coordinator=a:8476 --processes=2 --process={number}"
        words = f"--workdir=/shared/it's $(id) --config.name=$HOME `id` 'x' {place}"
        assert commands == [f"-m maxlm.cli train --config=configs/quickstart.py {words}", "token of 12"] * 2
        assert all(SECRET.encode() not in path.read_bytes() for path in (far / host).rglob("*") if path.is_file())
    assert SECRET not in "".join(capfd.readouterr())


def test_a_host_that_cannot_be_reached_is_named(far, monkeypatch):
    make(far, monkeypatch, [0])
    (far / "b" / "dead").touch()
    with pytest.raises(LaunchError, match="ssh b failed .255.: connect to host b: no route"):
        run("run", "--retries=0", "--patience=0")


def test_a_part_that_runs_alone_is_ended_and_all_begin_together(far, monkeypatch, capfd):
    make(far, monkeypatch, [])
    job = [*COMMON, "--workdir=/w", "--retries=0", "--grace_seconds=5"]
    outcomes: list[object] = []

    def watch():
        try:
            outcomes.append(hosts.main(["run", "--hosts=a,b", *job]))
        except LaunchError as error:
            outcomes.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    deadline = time.monotonic() + 30
    while not all(lines(far / host / "trained") for host in "ab"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(
        int((far / "b/maxlm/jobs/run/pid").read_text()), signal.SIGKILL
    )  # as if the machine had been started anew
    watcher.join(timeout=30)
    (outcome,) = outcomes
    assert isinstance(outcome, LaunchError) and "given up after 1 failures" in str(outcome)
    assert (far / "a/maxlm/jobs/run/exit").read_text() == "75\n"  # it was asked to leave, and could save
    for host in "ab":
        (far / host / "plan").write_text("0\n")
    assert hosts.main(["run", "--hosts=a,b", *job]) == 0
    assert hosts.main(["status", "--hosts=a,b", *job]) == 0
    assert "a (" in capfd.readouterr().out


def test_stop_lets_it_save_and_whoever_watches_does_not_start_it_again(far, monkeypatch, capfd):
    make(far, monkeypatch, [])
    fleet_flags = ["--hosts=a,b", *COMMON, "--workdir=/w", "--grace_seconds=5", "--retries=0"]

    def started():
        return [len([line for line in lines(far / host / "trained") if "maxlm.cli" in line]) for host in "ab"]

    codes: list[int] = []
    watcher = threading.Thread(target=lambda: codes.append(hosts.main(["run", *fleet_flags])), daemon=True)
    watcher.start()
    deadline = time.monotonic() + 60
    while not all((far / host / "maxlm/jobs/run/pid").exists() for host in "ab") or started() != [1, 1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert hosts.main(["stop", *fleet_flags]) == 0
    watcher.join(timeout=30)
    assert codes == [75] and started() == [1, 1]
    assert hosts.main(["status", *fleet_flags]) == 0
    out = capfd.readouterr().out
    assert out.count("stopped 75") == 2 and "`run` starts it again" in out
    for host in "ab":
        (far / host / "plan").write_text("0\n")
    assert hosts.main(["run", *fleet_flags]) == 0 and started() == [2, 2]
    assert hosts.main(["stop", *fleet_flags]) == hosts.main(["status", *fleet_flags]) == 0
    assert capfd.readouterr().out.count("exited 0") == 2  # what is complete stays so


def test_what_runs_under_the_name_with_another_workdir_or_commit_goes_on(far, monkeypatch, capfd):
    make(far, monkeypatch, [])
    flags = ["--hosts=a,b", *COMMON, "--grace_seconds=5", "--retries=0"]
    watcher = threading.Thread(target=lambda: hosts.main(["run", *flags, "--workdir=/w"]), daemon=True)
    watcher.start()
    deadline = time.monotonic() + 60
    while not all(lines(far / host / "trained") for host in "ab"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(Hopeless, match="^run runs already on .*type `stop` to end it"):
        hosts.main(["run", *flags, "--workdir=/v"])
    with monkeypatch.context() as later:  # a commit of this moment
        later.setattr(jobs, "find_commit", lambda revision, *, config: "0" * 40)
        with pytest.raises(Hopeless, match="of another commit than 000000000000; type"):
            hosts.main(["run", *flags, "--workdir=/w"])
    assert watcher.is_alive() and not (far / "a/maxlm/jobs/run/exit").exists()
    assert hosts.main(["stop", *flags, "--workdir=/v"]) == 0  # which ends whatever has the name
    watcher.join(timeout=30)
    for host in "ab":
        assert lines(far / host / "maxlm/jobs/run/exit") == ["75"]
        (far / host / "plan").write_text("0\n")
    assert hosts.main(["run", *flags, "--workdir=/v"]) == 0  # what has ended is nobody's any more
    assert [sum("maxlm.cli" in line for line in lines(far / host / "trained")) for host in "ab"] == [2, 2]


def test_two_who_ask_at_once_do_not_take_each_other_for_the_run(far, monkeypatch, capfd):
    make(far, monkeypatch, [3])
    with pytest.raises(LaunchError, match="exit code 3"):
        run("run", "--retries=0")
    place = far / "a/maxlm/jobs/run"
    (place / "exit").unlink()  # as if the process had been killed
    asks = subprocess.Popen(["flock", "-s", str(place / "lock"), "sleep", "60"], start_new_session=True)
    try:
        while subprocess.run(["flock", "-n", str(place / "lock"), "true"]).returncode == 0:
            time.sleep(0.05)
        assert run("status") == 0 and "): absent" in capfd.readouterr().out
    finally:
        os.killpg(asks.pid, signal.SIGKILL)
        asks.wait()


def test_what_is_stopped_before_it_starts_does_not_start(far, monkeypatch):
    make(far, monkeypatch, [])
    fleet_flags = ["--hosts=a,b", *COMMON, "--workdir=/w"]
    prepare = hosts.SshFleet.prepare

    def slow(fleet):  # meanwhile somebody types `stop`
        prepare(fleet)
        fleet.stop_for_good()

    monkeypatch.setattr(hosts.SshFleet, "prepare", slow)
    assert hosts.main(["run", *fleet_flags]) == 75
    assert not lines(far / "a" / "trained") and not lines(far / "b" / "trained")


def test_what_looks_at_a_job_or_ends_it_needs_no_clean_tree(far, monkeypatch, capfd):
    make(far, monkeypatch, [0])
    assert run("run") == 0
    git = jobs._git

    def dirty(root, *words):
        return b" M maxlm/cli.py\n" if words[0] == "status" else git(root, *words)

    monkeypatch.setattr(jobs, "_git", dirty)
    flags = ["--hosts=a,b", *COMMON[1:], "--workdir=/shared/it's $(id)"]
    with pytest.raises(LaunchError, match="the tree has changes"):
        hosts.main(["run", *flags])
    assert hosts.main(["status", *flags, "--retries=7"]) == hosts.main(["stop", *flags]) == 0
    assert capfd.readouterr().out.count(": exited 0") == 2


def test_a_host_without_the_python_gets_one_though_its_own_is_not_to_be_changed(far, monkeypatch, capfd):
    """As on Ubuntu 24.04: pip refuses to install outside of virtual environments, unless it is told a folder."""
    make(far, monkeypatch, [0])
    for host in "ab":
        home = far / host
        (home / "python").write_text((home / "bin/python3").read_text())
        (home / "bin/python3.11").write_text("#!/bin/bash\nexit 127\n")
        (home / "bin/python3").write_text(SYSTEM_PYTHON)
        (home / "python").chmod(0o755)
    assert run("run") == 0
    assert all(len(lines(far / host / "trained")) == 1 for host in "ab")
    (far / "a" / "no network").touch()
    shutil.rmtree(far / "a" / "maxlm")
    with pytest.raises(LaunchError, match="ssh a failed .1.: no network"):
        run("run", "--retries=0", "--patience=0")


def test_every_call_of_ssh_has_an_end(far, monkeypatch):
    make(far, monkeypatch, [0])
    really, limits = subprocess.run, []

    def noted(command, **kwargs):
        if command[0] == "ssh":
            limits.append(kwargs["timeout"])
        return really(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", noted)
    assert run("run", "--grace_seconds=7") == 0
    assert sorted(set(limits)) == [127.0, 1800.0] and limits.count(1800.0) == 4  # unpack and install on two hosts


def test_a_host_that_never_answers_is_named(far, monkeypatch):
    make(far, monkeypatch, [0])
    monkeypatch.setattr(hosts, "TOOL_SECONDS", 0.3)
    monkeypatch.setattr(hosts.SshFleet, "command", staticmethod(lambda host, script="": ["sleep", "30"]))
    began = time.monotonic()
    with pytest.raises(LaunchError, match="^a: sleep 30 has not ended within 1 s; given up"):
        run("run", "--grace_seconds=1", "--patience=0")
    assert time.monotonic() - began < 10


def test_without_ssh_here_there_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for action in ("run", "logs"):
        with pytest.raises(LaunchError, match="ssh is not installed here"):
            run(action)


@pytest.mark.parametrize(
    ("given", "message"), [("a,-oProxyCommand=id", "is no host"), ("a,a", "twice"), ("a b", "is no host")]
)
def test_what_is_no_host_is_refused(given, message):
    with pytest.raises(LaunchError, match=message):
        hosts.main(["run", f"--hosts={given}", *COMMON, "--workdir=/w"])


def test_a_dry_run_can_be_typed(capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)
    hosts.main(["run", "--processes=2", *COMMON, "--workdir=/w/$(id)", "--secret=TOKEN", "--dry-run"])
    text = capsys.readouterr().out
    (first, second) = (shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ "))
    assert first[-1] == "--process=0" and second[-1] == "--process=1" and "--workdir=/w/$(id)" in first
    assert SECRET not in text


@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_a_signal_while_processes_are_being_started_reaches_all_of_them(tmp_path, monkeypatch, moment):
    """At the first or second process of the first start, and of the second, after a failure."""
    child = f"trap 'exit 75' TERM; [ -e {tmp_path}/1 ] || {{ touch {tmp_path}/1; exit 1; }}; "
    child += "for turn in {1..100}; do sleep 0.1; done; exit 9"
    monkeypatch.setattr(hosts, "local_commands", lambda job, port: [["bash", "-c", child]] * 2)
    started: list[int] = []

    def environment(job, process):
        if len(started) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        started.append(process)
        return dict(os.environ)

    monkeypatch.setattr(hosts, "local_environment", environment)
    job = types.SimpleNamespace(grace_seconds=0.5, retries=1)
    if moment < 2:
        (tmp_path / "1").touch()
    began = time.monotonic()
    assert hosts.run_local(job, logs=tmp_path / "logs", log=print, poll=0.05, pause=0.05) == 75
    assert len(started) == (2 if moment < 2 else 4) and time.monotonic() - began < 8


def test_failures_here_count_anew_after_a_run_that_went_well_and_are_not_hurried(tmp_path, monkeypatch):
    child = f"echo >> {tmp_path}/n; n=$(wc -l < {tmp_path}/n); [ $n -lt 4 ] && exit 1; exit 0"
    monkeypatch.setattr(hosts, "local_commands", lambda job, port: [["bash", "-c", child]])
    monkeypatch.setattr(hosts, "local_environment", lambda job, process: dict(os.environ))
    job, said = types.SimpleNamespace(grace_seconds=0.5, retries=2), []

    def run(pause):
        (tmp_path / "n").unlink(missing_ok=True)
        said.clear()
        began = time.monotonic()
        code = hosts.run_local(job, logs=tmp_path / "logs", log=said.append, poll=0.01, pause=pause)
        return code, time.monotonic() - began

    code, took = run(0.3)
    assert code == 1 and took > 0.3 + 0.6
    assert said == [
        "the run ended with exit code 1; failure 1, 2 are allowed",
        "starting it again in 0.3 s",
        "the run ended with exit code 1; failure 2, 2 are allowed",
        "starting it again in 0.6 s",
        f"given up after 3 failures; the others' logs are in {tmp_path / 'logs'}",
    ]
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, took = run(60.0)  # a signal in the pause ends it, and nothing was saved
    assert code == 1 and took < 10 and len((tmp_path / "n").read_text()) == 1
    monkeypatch.setattr(hosts, "HEALTHY_SECONDS", 0.0)
    assert run(0.0)[0] == 0 and sum("failure 1, 2 are allowed" in line for line in said) == 3


@pytest.mark.slow
def test_two_processes_train_here_and_a_signal_to_the_launcher_saves(tmp_path):
    runs = Runs(tmp_path, steps=40)
    command = [sys.executable, "-m", "launch.hosts", "run", "--processes=2", f"--config={runs.config}", "--no-check"]
    command += [f"--workdir={tmp_path / 'run'}", "--config.parallel.fsdp=2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    while runs.newest("run") < 4:
        assert launcher.poll() is None, launcher.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    out = launcher.communicate(timeout=200)[0].decode()
    assert launcher.returncode == 75, out
    assert "process 0 of 2, as the flags say" in out and "saved at step" in out
    saved = runs.newest("run")
    assert saved >= 4 and len(list(read_metrics(tmp_path / "run", "step"))) == saved
