"""Several processes as one run: the same losses, one step to stop at, checkpoints for any number of them."""

import os
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from maxlm import cluster
from maxlm.errors import UserError
from maxlm.rollcall import Absent
from maxlm.train.signals import EXIT_PREEMPTED
from tests.runs import ROOT, Runs

STEPS = 40
MESH = ("--config.parallel.data=1", "--config.parallel.fsdp=2", "--config.parallel.tensor=2")


def wait(processes, runs, name, code, timeout=200):
    codes = [process.wait(timeout=timeout) for process in processes]
    assert codes == [code] * len(processes), runs.log(name)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_any_number_go_on(tmp_path):
    runs = Runs(tmp_path, steps=STEPS)
    runs.finish("whole")
    together = runs.start_together("run", processes=2, devices=2, overrides=MESH)
    deadline = time.monotonic() + 200
    while runs.newest("run") < 8:
        assert all(process.poll() is None for process in together), runs.log("run")
        assert time.monotonic() < deadline, runs.log("run")
        time.sleep(0.01)
    together[1].send_signal(signal.SIGTERM)  # not the one that writes the log
    wait(together, runs, "run", EXIT_PREEMPTED)
    saved = runs.newest("run")
    assert 8 <= saved < STEPS and len(runs.steps("run")) == saved
    assert "a signal to another process: saved at step" in runs.log("run")
    runs.finish("run")  # one process of one device
    whole, run = runs.steps("whole"), runs.steps("run")
    assert [record["batch"] for record in run] == [record["batch"] for record in whole]
    np.testing.assert_allclose(
        [record["loss"] for record in run], [record["loss"] for record in whole], rtol=1e-4
    )  # over the steps the last bits of different meshes add up


@pytest.mark.slow
@pytest.mark.parametrize(
    ("four", "two"),
    [
        (MESH, ("--config.parallel.fsdp=2",)),
        (("--config.parallel.data=2", "--config.parallel.tensor=2"), ("--config.parallel.tensor=2",)),
        (
            ("--config.parallel.fsdp=2", "--config.parallel.pipeline=2", "--config.train.accumulation=2"),
            ("--config.parallel.pipeline=2", "--config.train.accumulation=4"),
        ),
    ],
    ids=["fsdp", "tensor", "pipeline"],
)
def test_four_processes_save_and_two_and_one_go_on(tmp_path, four, two):
    runs = Runs(tmp_path, steps=STEPS)
    runs.finish("whole")
    for processes, overrides in ((4, four), (2, two)):
        before = runs.newest("run")
        together = runs.start_together("run", processes=processes, devices=4 // processes, overrides=overrides)
        while runs.newest("run") < before + 8:
            assert all(process.poll() is None for process in together), runs.log("run")
            time.sleep(0.01)
        together[0].send_signal(signal.SIGTERM)
        wait(together, runs, "run", EXIT_PREEMPTED)
    runs.finish("run")
    whole, run = runs.steps("whole"), runs.steps("run")
    assert [record["batch"] for record in run] == [record["batch"] for record in whole]
    np.testing.assert_allclose([record["loss"] for record in run], [record["loss"] for record in whole], rtol=1e-4)


JOBSET = {
    "JOBSET_COORDINATOR": "run-workers-0-0.run:1234",
    "JOBSET_PROCESSES": "8",
    "JOBSET_HOSTS_PER_JOB": "2",
    "JOBSET_JOB_INDEX": "2",
    "JOB_COMPLETION_INDEX": "1",
}
# As SLURM sets them in the script that sbatch is given; srun adds the step's own.
SBATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "n[1-4]",
}
SRUN = SBATCH | {"SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n[1-4]"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SRUN, "process 3 of 4, as SLURM says"),
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4"}, None),
        (SBATCH, None),  # the script itself, which is to call srun, or launch.hosts
        (SBATCH | OPEN_MPI, "process 1 of 2, as Open MPI says"),  # mpirun in such a script
        (OPEN_MPI, "process 1 of 2, as Open MPI says"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "one of 2 TPU hosts (TPU_WORKER_HOSTNAMES)"),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "TPU_PROCESS_ADDRESSES": "a:1,a:2,b:1,b:2"},
            "one of 4 TPU hosts (TPU_PROCESS_ADDRESSES)",
        ),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "one of 1 TPU hosts in each of 2 slices"),
        (JOBSET, "process 5 of 8, pod 1 of job 2, as the JobSet says"),
        (JOBSET | {"JOBSET_PROCESSES": "1"}, None),
        (JOBSET | {"TPU_WORKER_HOSTNAMES": "a,b"}, "one of 2 TPU hosts"),
    ],
)
def test_what_started_the_process_is_seen(environment, expected):
    found = cluster.detect(environment, coordinator=None, processes=None, process=None)
    assert found is None if expected is None else found.why.startswith(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1", "processes": 2, "process": None}, "--process is missing"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "give host:port"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "number them from 0 to 1"),
    ],
)
def test_an_address_that_cannot_be_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        cluster.detect({}, **given)


def test_flags_come_before_the_environment():
    found = cluster.detect(SRUN, coordinator="a:1", processes=2, process=1)
    assert found == cluster.Cluster("process 1 of 2, as the flags say", "a:1", 2, 1)


@pytest.mark.parametrize(("environment", "hint"), [(SRUN, False), (OPEN_MPI, True)])
def test_only_of_open_mpi_there_is_a_hint_to_its_versions(monkeypatch, environment, hint):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)  # without it JAX does not see SLURM either
    with pytest.raises(UserError, match="JAX does not find its place in it.*; give --coordinator") as error:
        cluster.join({}, timeout=1, log=print)
    assert ("Open MPI it knows" in str(error.value)) == hint


def test_a_coordinator_whose_name_is_not_known_is_absent_and_named(monkeypatch):
    """As in a pod of GKE whose first pod has no node yet: JAX asks for its name all the time it is given."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    quick = types.SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(0.1))
    monkeypatch.setattr(cloud_tpu_cluster, "time", quick)
    place = {"TPU_WORKER_HOSTNAMES": "run-0.invalid,run-1.invalid", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}
    place |= {"MEGASCALE_COORDINATOR_ADDRESS": "run-0.invalid", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    began, said = time.monotonic(), []
    with pytest.raises(Absent, match="one of 2 TPU hosts.*did not find process 0.*run-0.invalid") as error:
        cluster.join({}, timeout=4, log=said.append)
    assert said == ["one of 2 TPU hosts (TPU_WORKER_HOSTNAMES); looking up where process 0 is, for up to 2 s"]
    assert error.value.exit_code == 68 and time.monotonic() - began < 4  # a part of the time is the roll call's


def test_what_was_detected_is_said_before_the_wait_for_the_others():
    said, place = [], Runs.place(2)[0].partition("=")[2]
    with pytest.raises(Absent, match="1 of 2 processes did not come"):
        cluster.join({}, coordinator=place, processes=2, process=0, timeout=1, log=said.append)
    assert said == [f"process 0 of 2, as the flags say; waiting up to 1 s for the others at {place}"]


def test_a_tpu_vm_is_seen_by_its_metadata():
    found = cluster.detect({}, coordinator=None, processes=None, process=None, tpu_vm_hosts=4)
    assert found is not None and found.why == "one of 4 TPU VM hosts (metadata of this machine)"


def test_a_jobset_that_says_too_little_is_refused():
    with pytest.raises(UserError, match="launch/gke.py"):
        cluster.detect({**JOBSET, "JOBSET_JOB_INDEX": ""}, coordinator=None, processes=None, process=None)


def test_a_process_of_another_config_is_named_before_anything_is_compiled(tmp_path):
    runs = Runs(tmp_path, steps=STEPS)
    place = runs.place(2)
    together = [
        runs.start(
            f"run{number}",
            overrides=(*place, f"--process={number}", f"--config.optim.warmup_steps={2 + number}", "--join_seconds=60"),
        )
        for number in range(2)
    ]
    for number, process in enumerate(together):
        assert process.wait(timeout=100) == 1
        assert "has config optim.warmup_steps 3, the others 2" in runs.log(f"run{number}")
        assert not (tmp_path / f"run{number}").exists()


AGREE = """
import functools, pathlib, sys, time
import jax
from jax.experimental import multihost_utils
from maxlm.cluster import agree_on, done_first, join
from maxlm.errors import UserError
from maxlm.resolve import resolve
from maxlm.train.budget import recorded_steps
from tests.tiny import tiny_config
gather, gathered = multihost_utils.process_allgather, []
def process_allgather(line):
    gathered.append(time.monotonic())
    return gather(line)
multihost_utils.process_allgather = process_allgather
where, number = sys.argv[1], int(sys.argv[2])
joined = join({}, coordinator=where, processes=2, process=number, timeout=90, log=print)
joined = joined._replace(connect=functools.partial(joined.connect, shutdown_timeout_seconds=5))  # of JAX's own 300
def work():
    jax.devices()  # for which they wait for each other
    time.sleep(2 * number)  # gloo would not wait for half a minute
    came = time.monotonic()
    for mine in ("same", f"data {number}", UserError("no such file") if number else "mine"):
        try:
            agree_on("data", mine)
            print("go")
        except UserError as error:
            print(error)
    print(came, gathered[0])
    config = resolve(tiny_config(pathlib.Path("corpus"), train__budget_seconds=60.0, train__steps=100))
    print(recorded_steps(config, pathlib.Path(sys.argv[3 + number])).train.steps)
    done_first("a file", lambda: (time.sleep(1), pathlib.Path(sys.argv[3], "a").touch()))
    print(pathlib.Path(sys.argv[3], "a").exists())
    try:
        done_first("another", lambda: pathlib.Path(sys.argv[3], "no", "such").touch())
    except OSError as error:
        print(error)
    time.sleep(9 - 9 * number)  # process 0 has more to do
    return 0
sys.exit(joined.run(work))
"""


def test_data_that_differs_or_is_missing_on_a_host_is_told_to_all(tmp_path):
    where = Runs.place(2)[0].partition("=")[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-c", AGREE, where]
    (tmp_path / "config.json").write_text('{"train": {"steps": 17}}')
    folders = [str(tmp_path), str(tmp_path / "empty")]  # process 0 has it from before a kill, the other does not
    both = [
        subprocess.Popen(
            [*command, str(number), *folders], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for number in range(2)
    ]
    told = [
        [line for line in process.communicate(timeout=100)[0].splitlines() if not line.startswith("[Gloo]")]
        for process in both
    ]
    host = socket.gethostname()
    assert [process.returncode for process in both] == [0, 0]
    for number, lines in enumerate(told):
        found = f"process {number} of 2, as the flags say"
        assert lines.pop(0) == f"{found}; waiting up to 90 s for the others at {where}"
        assert lines[0] == f"{found}; this is process {number} of 2, process 0 is at {where}"
        assert lines[1] == "go"
        assert f"the processes do not have the same data: process 1 on {host} has data 1, the others data 0" == lines[2]
    assert f"process 1 on {host} has none: no such file" in told[0][3]
    assert told[1][3] == "no such file"
    (_, entered), (came, _) = ([float(time) for time in lines[4].split()] for lines in told)
    assert entered > came  # process 0 was not in the collective before process 1 was there
    assert [lines[5] for lines in told] == ["17", "17"]
    assert [lines[6] for lines in told] == ["True", "True"]
    assert "No such file" in told[0][7] and told[1][7] == f"process 0: {told[0][7]}"
