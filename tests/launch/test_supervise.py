"""What counts as a failure of the run, and what is only waited for, on machines that answer as a test tells them to."""

import os
import signal
import subprocess
import threading

import pytest

from launch import hosts
from launch import supervise as module
from launch.job import LaunchError, make_job
from launch.remote import Status
from launch.supervise import Hopeless, print_log, supervise, until_interrupted

JOB = make_job(name="run", config="configs/quickstart.py", workdir="gs://bucket/run", retries=3)


class Machines:
    """One worker; `looks` are what it says in turn, an error being a look that fails. A look takes a second."""

    workers = 1

    def __init__(self, looks, *, ready=0.0):
        self.looks, self.ready, self.did, self.now = list(looks), ready, [], 0.0

    def ensure(self):
        self.now += self.ready
        return False

    def status(self):
        self.now += 1.0
        said = self.looks.pop(0) if self.looks else "no answer"
        if said == "no answer":
            raise LaunchError("gcloud tpu-vm ssh failed (255): no answer")
        state, _, code = said.partition(" ")
        return [Status("h", state, int(code) if code else None)]

    def follow(self):
        return subprocess.Popen(["sleep", "60"], start_new_session=True)

    def sleep(self, seconds):
        self.now += seconds

    def __getattr__(self, name):  # prepare, start, stop, allow, restart, replace
        return lambda: self.did.append(name) or []

    def run(self, **more):
        said = []
        return said, lambda: supervise(self, JOB, log=said.append, sleep=self.sleep, clock=lambda: self.now, **more)


def test_machines_that_do_not_answer_are_left_as_they_are():
    machines = Machines(["absent", *["running"] * 3, *["no answer"] * 6, *["running"] * 2, "exited 0"])
    said, go = machines.run()
    assert go() == 0
    assert machines.did == ["allow", "prepare", "start"]
    assert sum("no answer; the run may go on there" in line for line in said) == 6


def test_the_wait_for_them_ends_and_says_that_they_may_cost():
    machines = Machines(["absent", "running"])
    _, go = machines.run(patience=3000.0)
    with pytest.raises(LaunchError, match="no answer; given up after 3[0-9]{3} s. The machines, the run and the costs"):
        go()
    assert not {"restart", "replace", "stop"} & set(machines.did)


def test_looks_that_fail_now_and_then_do_not_add_up():
    machines = Machines(["absent", *["running", "no answer", "running"] * 200, "exited 0"])
    _, go = machines.run(patience=500.0)
    assert go() == 0 and machines.now > 5000


def test_the_wait_for_machines_is_no_healthy_run():
    """Each round waits an hour for machines, and the run fails at once: it has to come to an end."""
    machines = Machines(["absent", "exited 1"] * 20, ready=2 * module.HEALTHY_SECONDS)
    _, go = machines.run()
    with pytest.raises(LaunchError, match="exit code 1; given up after 4 failures"):
        go()
    assert machines.did.count("start") == 4 and machines.did.count("restart") == machines.did.count("replace") == 1


def test_a_long_run_with_looks_that_fail_now_and_then_is_a_healthy_one():
    """Weeks at a stretch, four times over: each ends badly, and none is the fourth failure in a row."""
    weeks = ["absent", "running", *["running"] * 20, *["no answer", "running", *["running"] * 20] * 10, "exited 1"]
    machines = Machines([*weeks * 5, "absent", "running", "exited 0"])
    said, go = machines.run(poll=60.0)
    assert go() == 0 and machines.did.count("start") == 6
    assert sum("failure 1, 3 are allowed" in line for line in said) == 5


def test_a_run_that_was_there_is_judged_by_how_long_it_was_watched():
    machines = Machines(["running", "no answer", "running", "exited 1"] * 6)
    _, go = machines.run()
    with pytest.raises(LaunchError, match="given up after 4 failures"):
        go()


@pytest.mark.parametrize("ready", [10.0, 10 * 3600.0])
def test_the_time_in_the_queue_does_not_count_as_silence(ready):
    """The machines come after ten hours in which Google was asked all the time; then their ssh is not up yet."""
    machines = Machines(["no answer", "no answer", "absent", "running", "exited 0"], ready=ready)
    _, go = machines.run(patience=3000.0)
    assert go() == 0 and machines.did.count("start") == 1
    machines = Machines([], ready=ready)
    _, go = machines.run(patience=3000.0)
    with pytest.raises(LaunchError, match="no answer; given up after 3[0-9]{3} s"):
        go()


def test_machines_that_cannot_be_made_ready_are_tried_for_a_while_only():
    machines = Machines(["absent"] * 1000)

    def broken():
        raise LaunchError("pip failed")

    machines.prepare = broken
    _, go = machines.run(patience=4000.0)
    with pytest.raises(LaunchError, match="pip failed; given up after"):
        go()
    assert machines.did == ["allow"] and machines.now < 6000


def test_a_log_that_breaks_off_is_followed_again_but_not_all_the_time():
    machines, followers = Machines(["absent", *["running"] * 30, "exited 0"]), []

    def follow():  # the first two break off at once, as when the network is away for a moment
        followers.append(
            subprocess.Popen(["true" if len(followers) < 2 else "cat"], stdin=subprocess.PIPE, start_new_session=True)
        )
        followers[-1].wait() if len(followers) <= 2 else None
        return followers[-1]

    machines.follow = follow
    said, go = machines.run(poll=10.0)
    assert go() == 0 and machines.now > 300
    assert len(followers) == 3 and sum("following it again" in line for line in said) == 2
    assert followers[-1].returncode == -signal.SIGKILL


def test_what_runs_under_the_name_and_is_not_this_job_is_left_alone():
    machines = Machines(["other"])
    _, go = machines.run()
    with pytest.raises(Hopeless, match="run runs already on h, with other settings.*`stop`.*--commit.*--name"):
        go()
    assert machines.did == [] and machines.now < 5  # nor is it allowed to start again where it was stopped


def test_another_job_that_has_taken_the_machines_over_is_no_failure_of_this_one():
    machines = Machines(["absent", "running", "other"])
    said, go = machines.run()
    with pytest.raises(Hopeless, match="runs already"):
        go()
    assert machines.did == ["allow", "prepare", "start"] and not any("failure" in line for line in said)


def test_what_was_stopped_is_looked_at_again_once_it_is_allowed():
    machines = Machines(["stopped 75", "exited 75", "running", "exited 0"])
    _, go = machines.run()
    assert go() == 0 and machines.did == ["allow", "prepare", "start"]


@pytest.fixture
def interruptible():
    """A shell's background jobs, such as a test run in one, begin with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_follows_the_log_too(number, code, interruptible):
    machines, followers, said = Machines(["absent", *["running"] * 9]), [], []

    def follow():
        followers.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        return followers[-1]

    def sleep(seconds):
        if followers:
            os.kill(os.getpid(), number)

    machines.follow, machines.sleep = follow, sleep
    before = signal.getsignal(signal.SIGTERM)
    _, go = machines.run()
    assert until_interrupted(go, left="it goes on", log=said.append) == code and said == ["it goes on"]
    assert followers[0].returncode == -signal.SIGKILL and not {"stop", "restart"} & set(machines.did)
    assert signal.getsignal(signal.SIGTERM) is before
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    assert until_interrupted(lambda: print_log(machines), left="it goes on", log=said.append) == code
    assert followers[1].returncode == -signal.SIGKILL


def test_of_hosts_that_stay_as_they_are_nothing_else_is_said():
    fleet = hosts.SshFleet(JOB, ["a"], coordinator="a:1", folder="maxlm", lock=hosts.ROOT / "launch" / "cpu.lock")
    machines = Machines(["absent", "exited 1"] * 4)
    machines.restart, machines.replace = fleet.restart, fleet.replace
    said, go = machines.run()
    with pytest.raises(LaunchError, match="given up after 4 failures"):
        go()
    assert "failure 3, 3 are allowed" in said[-2] and not any("machines" in line for line in said)
