"""Signals become flags, and handlers are put back."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maxlm.config import StoreConfig
from maxlm.files import locked
from maxlm.train.goodput import FILE_NAME as LEDGER
from maxlm.train.signals import EXIT_PREEMPTED, Signals, leaving
from tests.runs import ROOT, Runs


def armed():
    """Signals of a run that reads the flags."""
    signals = Signals(lambda name: pytest.fail(f"{name} is no reason to leave now"))
    signals.armed = True
    return signals


def send(number: signal.Signals) -> None:
    """Delivers a signal to this process; Python runs its handler before the next instruction of the main thread."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_named(number, capfd):
    with armed() as signals:
        assert signals.stop is None
        send(number)
        assert signals.stop == number.name
    assert f"{number.name}: saving and leaving" in capfd.readouterr().err


def test_a_second_interrupt_leaves_at_once_but_terms_do_not(capfd):
    with armed() as signals:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert signals.stop == "SIGTERM"  # the first counts
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_profile_request_is_taken_once():
    with armed() as signals:
        assert not signals.take_profile_request()
        send(signal.SIGUSR1)
        assert signals.take_profile_request()
        assert not signals.take_profile_request()
        assert signals.stop is None


def test_handlers_are_put_back_even_after_an_error():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.raises(RuntimeError, match="boom"), armed():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        raise RuntimeError("boom")
    assert before == {number: signal.getsignal(number) for number in before}
    assert signal.set_wakeup_fd(-1) == -1


def test_before_there_is_anything_to_save_a_signal_leaves_with_the_code_that_continues(tmp_path):
    """While the processes find each other; the default would be 143, which counts as a failure."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "maxlm.cli", "train", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    command += [f"--coordinator=localhost:{port}", "--processes=2", "--process=0", "--join_seconds=100"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            break  # it waits for the other
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == EXIT_PREEMPTED and "before the training has begun" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_until_somebody_reads_the_flag_a_signal_leaves_even_while_the_main_thread_is_in_c(number):
    """As in a compilation: Python runs no handler before it is over."""
    left = []
    with Signals(lambda name: left.append((name, time.monotonic()))) as signals:
        threading.Timer(0.1, send, [number]).start()
        hashlib.pbkdf2_hmac("sha256", b"one", b"call", 1_000_000)  # most of a second
        ended = time.monotonic()
        assert signals.stop == number.name  # if somebody reads it just now, it is there
    ((name, at),) = left
    assert name == number.name and at < ended


def test_a_run_that_prepares_its_data_is_left_by_all_at_once(tmp_path):
    """Process 0 waits for another that builds the same store, process 1 for process 0, in JAX's own code."""
    store = StoreConfig(source=f"text:{tmp_path}/corpus/*.txt", heldout_permille=100, path=f"{tmp_path}/store")
    runs = Runs(tmp_path, data__stores={"tiny": store})
    with locked(tmp_path / ".store.lock"):
        together = runs.start_together("run", processes=2, overrides=("--config.parallel.data=2",))
        try:
            until(lambda: "another process is preparing" in runs.log("run"), runs)
            until(lambda: catches(together[1].pid, signal.SIGUSR1), runs)  # as Signals does
            time.sleep(0.5)
            together[1].send_signal(signal.SIGTERM)
            assert [process.wait(timeout=200) for process in together] == [EXIT_PREEMPTED] * 2, runs.log("run")
        finally:
            for process in together:
                process.kill()
                process.wait()
    assert "SIGTERM before the first step: there is nothing to save yet" in runs.log("run")
    records = [json.loads(line) for line in (tmp_path / "run" / LEDGER).read_text().splitlines()]
    assert records[-1]["start_step"] is None and not records[-1]["mark"]


def until(true, runs):
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, runs.log("run")
        time.sleep(0.05)


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_the_early_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with leaving(), armed() as signals:
        send(signal.SIGTERM)
        assert signals.stop == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_are_refused_in_words():
    caught = []

    def enter():
        try:
            armed().__enter__()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_the_exit_code_is_no_other_outcome():
    # 0 success, 1 error, 2 usage, 128 + n killed by a signal.
    assert 2 < EXIT_PREEMPTED < 128
