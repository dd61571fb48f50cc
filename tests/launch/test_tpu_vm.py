"""TPU VMs by a gcloud that fails at each call in turn, twice: the same command ends in the same right state."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from launch import job as jobs
from launch import tpu_vm
from launch.job import LaunchError
from launch.supervise import Hopeless
from tests.launch import fake_gcloud
from tests.launch.common import COMMIT, ROOT, SECRET, end_processes, lines

FLAGS = [
    *("run", "--zone=here-a", "--accelerator=v5litepod-8", "--slices=2", "--name=run", f"--commit={COMMIT}"),
    *("--config=configs/quickstart.py", "--workdir=gs://bucket/run", "--poll=0", "--no-check", "--grace_seconds=5"),
]
WORKERS = [(f"run-{node}", str(worker)) for node in range(2) for worker in range(2)]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder with gcloud's stand-in on the path."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gcloud"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -S -m tests.launch.fake_gcloud "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("TOKEN", SECRET)
    yield tmp_path
    write(tmp_path)  # ends what still runs
    end_processes(tmp_path)


def write(cloud, **fail):
    empty = {"calls": 0, "resources": {}, "nodes": {}, "created": 0}
    (cloud / "state.json").write_text(json.dumps({**empty, "fail": {k[1:]: v for k, v in fail.items()}}))


def state(cloud):
    return json.loads((cloud / "state.json").read_text())


def change(cloud, **changes):
    (cloud / "state.json").write_text(json.dumps({**state(cloud), **changes}))


def run(*more):
    return tpu_vm.main([*FLAGS, *more])


def make_machines(cloud, monkeypatch, codes):
    """Every TPU VM that is made gets this plan, by way of the fake's environment."""
    monkeypatch.setenv("PLAN", "\n".join(map(str, codes)))


def test_nothing_fails(cloud, monkeypatch, capfd):
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    assert run("--secret=TOKEN") == 0
    for node, worker in WORKERS:
        home = cloud / node / worker
        assert lines(home / "made") == ["venv", "pip"]
        (command, token) = lines(home / "trained")
        place = "--workdir=gs://bucket/run --join_seconds=300 --silence_seconds=60"
        assert command == f"-m maxlm.cli train --config=configs/quickstart.py {place}"
        assert token == "token of 12"
        assert not list(home.rglob("*.env"))
        assert all(SECRET.encode() not in path.read_bytes() for path in home.rglob("*") if path.is_file())
    out, err = capfd.readouterr()
    assert SECRET not in out + err and "the run is complete" in out
    assert run("--secret=TOKEN") == 0 and state(cloud)["created"] == 1  # nothing to do: nothing is done
    assert len(lines(cloud / "run-0" / "0" / "trained")) == 2


def quickly(monkeypatch):
    """The same stand-in without a process for each call, and little code to unpack: a sweep makes hundreds of both."""
    really = subprocess.run
    little = jobs._git(ROOT, "archive", "--format=tar.gz", COMMIT, "maxlm/cli.py", "launch/tpu.lock")
    monkeypatch.setattr(tpu_vm, "code_archive", lambda commit: little)

    def called(command, **kwargs):
        if command[0] != "gcloud":
            return really(command, **kwargs)
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                code = fake_gcloud.main(command[1:])
            except SystemExit as end:
                code = 1
                print(end.code, file=errors)
        return subprocess.CompletedProcess(command, code, output.getvalue().encode(), errors.getvalue().encode())

    monkeypatch.setattr(subprocess, "run", called)
    monkeypatch.setattr(tpu_vm.TpuFleet, "follow", lambda fleet: subprocess.Popen(["true"], start_new_session=True))


def calls_of_a_run(cloud, monkeypatch):
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    assert run("--retries=0", "--slices=1") == 0
    return state(cloud)["calls"]


@pytest.mark.parametrize(
    ("when", "first", "step"),
    [
        ("before", 1, 2),
        ("after", 2, 2),
        pytest.param("before", 1, 1, marks=pytest.mark.slow),
        pytest.param("after", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_each_call_fails_in_turn_twice(cloud, monkeypatch, capfd, when, first, step):
    """The program is ended by each failure and started again by hand, as its message says."""
    quickly(monkeypatch)
    total = calls_of_a_run(cloud, monkeypatch)
    assert total >= 9
    for number in range(first, total + 1, step):
        clean(cloud)
        # The same call is the first of those that follow a new start, or comes somewhat later: fail at both places.
        write(cloud, **{f"n{number}": when, f"n{number + 2}": when})
        starts = 0
        while True:
            starts += 1
            assert starts <= 4
            try:
                assert run("--retries=0", "--slices=1", "--patience=0") == 0
                break
            except LaunchError:
                continue
        check_right(cloud, number)
        assert starts >= 2 or state(cloud)["calls"] < number  # a run that needed fewer looks


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_mends_itself_where_it_is_allowed_to(cloud, monkeypatch, capfd, when):
    quickly(monkeypatch)
    total = calls_of_a_run(cloud, monkeypatch)
    for number in range(1, total + 1, 5):
        clean(cloud)
        write(cloud, **{f"n{number}": when, f"n{number + 1}": when})
        assert run("--retries=4", "--slices=1") == 0
        check_right(cloud, number, ladder=True)


def clean(cloud):
    for node in ("run", "run-0", "run-1"):
        end_processes(cloud / node)
        shutil.rmtree(cloud / node, ignore_errors=True)


def check_right(cloud, number, ladder=False):
    now = state(cloud)
    assert list(now["resources"]) == ["run"] and now["nodes"].keys() == set(now["resources"]["run"]["nodes"]), number
    assert ladder or now["created"] == 1, number  # machines are paid for: none is made twice
    for home in (cloud / node / str(worker) for node in now["nodes"] for worker in range(2)):
        assert lines(home / "maxlm/jobs/run/exit") == ["0"], number
        assert lines(home / "made") == ["venv", "pip"], number
        assert len(lines(home / "trained")) == 1, number


def test_leaving_does_not_count_and_failures_climb_the_ladder(cloud, monkeypatch, capfd):
    write(cloud)
    quickly(monkeypatch)
    make_machines(cloud, monkeypatch, [75, 75, 1, 75, 0])
    assert run("--retries=1", "--slices=1") == 0
    assert len(lines(cloud / "run" / "1" / "trained")) == 5
    out = capfd.readouterr().out
    assert out.count("was asked to leave") == 3 and "failure 1, 1 are allowed" in out


def test_three_failures_replace_the_machines(cloud, monkeypatch, capfd):
    write(cloud)
    quickly(monkeypatch)
    make_machines(cloud, monkeypatch, [1, 1, 1])
    with pytest.raises(LaunchError, match="exit code 1; given up after 5 failures"):
        run("--retries=4", "--slices=1")
    out = capfd.readouterr().out
    assert out.index("restarting the machines") < out.index("giving the machines back")
    assert state(cloud)["created"] == 3


def test_preempted_machines_are_given_back_and_asked_for_anew(cloud, monkeypatch, capfd):
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    assert run() == 0
    nodes = state(cloud)["nodes"]
    nodes["run-1"]["state"] = "PREEMPTED"
    change(cloud, nodes=nodes)
    assert run("--retries=0") == 0
    assert state(cloud)["created"] == 2 and "run-1 is PREEMPTED" in capfd.readouterr().out
    check_right(cloud, 0, ladder=True)


def test_other_hardware_of_that_name_is_not_touched(cloud, monkeypatch):
    quickly(monkeypatch)
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    assert run("--slices=1") == 0
    with pytest.raises(LaunchError, match="is there as v5litepod-8, not v5litepod-16"):  # at once
        tpu_vm.main([word.replace("v5litepod-8", "v5litepod-16") for word in FLAGS] + ["--slices=1"])
    assert state(cloud)["created"] == 1


@pytest.mark.parametrize(("there", "asked"), [(2, 1), (1, 2), (2, 3)])
def test_machines_that_are_there_with_other_slices_are_not_given_back(cloud, monkeypatch, there, asked):
    """None of the nodes asked for is there, or not all: that is no loss of those that are."""
    quickly(monkeypatch)
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    assert run(f"--slices={there}") == 0
    nodes = state(cloud)["nodes"]
    with pytest.raises(Hopeless, match=f"is there with --slices={there}, not {asked}; say --slices={there} to"):
        run(f"--slices={asked}")
    assert state(cloud)["created"] == 1 and state(cloud)["nodes"] == nodes
    with pytest.raises(Hopeless, match=f"say --slices={there} to watch or delete it"):
        tpu_vm.main(["delete", *FLAGS[1:], f"--slices={asked}"])
    assert state(cloud)["nodes"] == nodes


def test_a_request_that_fails_is_told_why_and_not_made_again_and_again(cloud, monkeypatch, capfd):
    quickly(monkeypatch)
    write(cloud)
    change(cloud, fails=2)
    make_machines(cloud, monkeypatch, [0])
    with pytest.raises(LaunchError, match=f"has failed: FAILED: {fake_gcloud.REASON}; change it"):
        run("--slices=1")
    assert state(cloud)["created"] == 1
    assert tpu_vm.main(["status", *FLAGS[1:], "--slices=1"]) == 0
    with pytest.raises(LaunchError, match="has failed"):  # the one that is there is given back, another asked for
        run("--slices=1")
    assert state(cloud)["created"] == 2
    assert run("--slices=1") == 0 and state(cloud)["created"] == 3
    said = capfd.readouterr().out
    assert said.count(f"lost (FAILED: {fake_gcloud.REASON}); giving") == 2 and f"failed: {fake_gcloud.REASON}" in said


@pytest.mark.parametrize(
    "words",
    [
        "ERROR: (gcloud.compute.tpus) You do not currently have an active account selected.",
        "ERROR: (gcloud.compute.tpus) PERMISSION_DENIED: Permission on 'locations/here-a' denied (or it may not exist)",
        "ERROR: (gcloud.compute.tpus) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPerProjectPerZone' has been exceeded.",
        "ERROR: (gcloud.compute.tpus) INVALID_ARGUMENT: Accelerator v5litepod-8 is not available",
    ],
)
def test_what_gcloud_will_never_grant_is_asked_for_once(cloud, monkeypatch, words):
    quickly(monkeypatch)
    write(cloud)
    change(cloud, refuses=words)
    with pytest.raises(Hopeless, match=re.escape(words)):
        run("--slices=1")
    assert state(cloud)["calls"] == 1
    write(cloud)  # of machines that were there the same words may be a trouble that passes: they are waited for
    make_machines(cloud, monkeypatch, [])
    follow = tpu_vm.TpuFleet.follow

    def refused(fleet):
        change(cloud, refuses=words)
        return follow(fleet)

    monkeypatch.setattr(tpu_vm.TpuFleet, "follow", refused)
    with pytest.raises(LaunchError, match="given up after .*may still be there"):
        run("--slices=1", "--patience=0")


def test_without_gcloud_here_there_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for action in ("run", "logs", "delete"):
        with pytest.raises(LaunchError, match="gcloud is not installed here"):
            tpu_vm.main([action, *FLAGS[1:]])


def test_every_call_of_gcloud_has_an_end(cloud, monkeypatch):
    quickly(monkeypatch)
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    called, limits = subprocess.run, {}

    def noted(command, **kwargs):
        if command[0] == "gcloud":
            installs = any("pip install" in word for word in command)
            what = "install" if installs else " ".join(command[3:5])
            limits.setdefault(what, set()).add(kwargs["timeout"])
        return called(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", noted)
    assert run("--slices=1") == tpu_vm.main(["delete", *FLAGS[1:], "--slices=1"]) == 0
    slow = {"install", "queued-resources create", "queued-resources delete"}
    assert {what for what, given in limits.items() if given == {1800.0}} == slow
    assert all(given == {125.0} for what, given in limits.items() if what not in slow)  # 5 s are for the save


def test_spot_machines_are_gone_before_the_grace_is_over(cloud, capsys):
    write(cloud)
    assert run("--dry-run", "--spot", "--grace_seconds=300") == 0
    assert "of the 300 s of --grace_seconds a preempted process gets 30 s, no more" in capsys.readouterr().out
    assert run("--dry-run", "--grace_seconds=300") == run("--dry-run", "--spot") == 0
    assert "no more" not in capsys.readouterr().out


def test_what_is_stopped_is_not_started_again_until_run_is_typed(cloud, monkeypatch, capfd):
    quickly(monkeypatch)
    write(cloud)
    make_machines(cloud, monkeypatch, [])
    follow = tpu_vm.TpuFleet.follow
    trained = cloud / "run" / "0" / "trained"

    def stopped(fleet):  # in another terminal, once it runs
        deadline = time.monotonic() + 30
        while not lines(trained):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert tpu_vm.main(["stop", *FLAGS[1:], "--slices=1"]) == 0
        return follow(fleet)

    monkeypatch.setattr(tpu_vm.TpuFleet, "follow", stopped)
    assert run("--slices=1") == 75 and len(lines(trained)) == 1
    monkeypatch.setattr(tpu_vm.TpuFleet, "follow", follow)
    assert tpu_vm.main(["status", *FLAGS[1:], "--slices=1"]) == 0
    assert capfd.readouterr().out.count(": stopped 75") == 2
    for worker in "01":
        (cloud / "run" / worker / "plan").write_text("0\n")
    assert run("--slices=1") == 0 and len(lines(trained)) == 2


def test_what_looks_or_ends_needs_no_clean_tree(cloud, monkeypatch, capfd):
    quickly(monkeypatch)
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    assert run("--slices=1") == 0
    git = jobs._git
    monkeypatch.setattr(jobs, "_git", lambda root, *words: b" M a" if words[0] == "status" else git(root, *words))
    flags = [word for word in FLAGS[1:] if not word.startswith("--commit")] + ["--slices=1"]
    with pytest.raises(LaunchError, match="the tree has changes"):
        tpu_vm.main(["run", *flags])
    assert tpu_vm.main(["status", *flags]) == 0 and capfd.readouterr().out.count(": exited 0") == 2
    assert tpu_vm.main(["delete", *flags]) == 0 and state(cloud)["resources"] == {}


def test_named_secrets_that_did_not_come_are_no_start(cloud, monkeypatch):
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    monkeypatch.setattr(tpu_vm.TpuFleet, "copy_command", lambda fleet, node, source, target: ["true"])
    monkeypatch.setattr(tpu_vm.TpuFleet, "prepare", lambda fleet: None)
    with pytest.raises(LaunchError, match="the secrets did not come to .*run.env.*worker failed"):
        run("--secret=TOKEN", "--patience=0")
    assert not lines(cloud / "run-0" / "0" / "trained")


def test_delete_ends_the_costs_and_may_be_said_twice(cloud, monkeypatch):
    quickly(monkeypatch)
    write(cloud)
    make_machines(cloud, monkeypatch, [0])
    assert run("--slices=1") == 0
    for _ in range(2):
        assert tpu_vm.main(["delete", *FLAGS[1:], "--slices=1"]) == 0
        assert state(cloud)["resources"] == {} == state(cloud)["nodes"]


def test_a_dry_run_prints_what_would_run_and_runs_nothing(cloud, capsys):
    write(cloud)
    assert run("--dry-run", "--secret=TOKEN", "--spot", "--config.name=$(id) 'x'") == 0
    text = capsys.readouterr().out
    assert state(cloud)["calls"] == 0
    for part in (
        "queued-resources create run",
        "--node-count=2 --node-prefix=run",
        "--spot",
        "tpu-vm scp",
        "tail -n 5",
    ):
        assert part in text
    assert SECRET not in text and "TOKEN" in text
    assert "topology     2 slices of v5litepod-8\n" in text  # how many hosts these have, the name does not say


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=/home/me/run"], "gs://bucket/folder"),
        (["--accelerator=v5litepod-8;id"], "give a name as in"),
        (["--accelerator=v9-8"], "give --runtime"),
        (["--name=Run_1"], "lower-case"),
        (["--secret=NOT_THERE"], "no NOT_THERE"),
    ],
)
def test_what_cannot_be_is_refused(cloud, flags, message):
    write(cloud)
    with pytest.raises(LaunchError, match=message):
        run(*flags)
    assert state(cloud)["created"] == 0
