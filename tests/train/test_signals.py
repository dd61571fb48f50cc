"""Signals become flags, and handlers are put back."""

import os
import signal
import threading

import pytest

from maxlm.train.signals import EXIT_PREEMPTED, Signals


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
