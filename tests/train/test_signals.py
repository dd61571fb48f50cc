"""Signals become flags, and handlers are put back."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from maxlm.train.signals import EXIT_PREEMPTED, Signals, leaving
from tests.runs import ROOT


def send(number: signal.Signals) -> None:
    """Delivers a signal to this process; Python runs its handler before the next instruction of the main thread."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_named(number, capfd):
    with Signals() as signals:
        assert signals.stop is None
        send(number)
        assert signals.stop == number.name
    assert f"{number.name}: saving and leaving" in capfd.readouterr().err


def test_a_second_interrupt_leaves_at_once_but_terms_do_not(capfd):
    with Signals() as signals:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert signals.stop == "SIGTERM"  # the first counts
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_profile_request_is_taken_once():
    with Signals() as signals:
        assert not signals.take_profile_request()
        send(signal.SIGUSR1)
        assert signals.take_profile_request()
        assert not signals.take_profile_request()
        assert signals.stop is None


def test_handlers_are_put_back_even_after_an_error():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.raises(RuntimeError, match="boom"), Signals():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        raise RuntimeError("boom")
    assert before == {number: signal.getsignal(number) for number in before}


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


def test_the_early_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with leaving(), Signals() as signals:
        send(signal.SIGTERM)
        assert signals.stop == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_are_refused_in_words():
    caught = []

    def enter():
        try:
            Signals().__enter__()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_the_exit_code_is_no_other_outcome():
    # 0 success, 1 error, 2 usage, 128 + n killed by a signal.
    assert 2 < EXIT_PREEMPTED < 128
