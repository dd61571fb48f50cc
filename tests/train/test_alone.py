"""Two trainings in one folder: the second waits, is refused by name, and has touched nothing."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from maxlm.errors import UserError
from maxlm.files import locked
from maxlm.train import alone as module
from maxlm.train.alone import LOCK, alone
from maxlm.train.run import train
from tests.tiny import tiny_config

HOLDS = """
import pathlib, sys, time
from maxlm.files import try_lock
file = try_lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_training_is_refused_by_the_name_of_the_first_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.6)
    left = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-1"
    left.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 9}\n')
    said = []
    with alone(tmp_path, log=said.append):
        assert not said
        who = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(UserError, match=f"{who} trains in {tmp_path}, and two would destroy each other"):
            train(tiny_config(tmp_path), tmp_path, log=said.append)
    assert said == [f"{who} trains in {tmp_path}: waiting up to 0.6 s for it to leave"]
    assert left.is_dir() and (tmp_path / "metrics.jsonl").read_text()
    assert not (tmp_path / "goodput.jsonl").exists() and not (tmp_path / "config.json").exists()
    for _ in range(2):  # it is free again, and its last holder's name is not in the way
        with alone(tmp_path, log=said.append):
            assert (tmp_path / LOCK).read_text() == who
    assert len(said) == 1


def test_one_that_is_killed_is_waited_for(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / LOCK)], stdout=subprocess.PIPE, text=True)
    said = []

    def log(line):
        said.append(line)
        child.send_signal(signal.SIGKILL)

    try:
        assert child.stdout.readline() == "held\n"
        with alone(tmp_path, log=log):
            assert child.wait(timeout=20) == -signal.SIGKILL
    finally:
        child.kill()
    assert len(said) == 1 and said[0].startswith("another process trains in")


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with alone(tmp_path, log=said.append):
        assert said == [
            f"{tmp_path} is on a file system without locks ([Errno {errno.ENOLCK}] No locks available): see that "
            "nothing else trains there"
        ]
    with locked(tmp_path / "data" / ".store.lock"):  # as the preparation of data
        assert f"{tmp_path}/data is on a file system without locks" in capsys.readouterr().err
