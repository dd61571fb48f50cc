"""Signals as flags that the loop reads between steps.

SIGTERM and SIGINT ask the run to save and leave; a second SIGINT raises KeyboardInterrupt at once. SIGUSR1 asks for a
profiler window. Until the first step there is nothing to save, and nobody to read a flag for hours, perhaps: then a
thread ends the process. Python's handlers wait while the main thread is in C++ (compiling, or waiting for the other
processes), but what its wakeup descriptor gives is there at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

# EX_TEMPFAIL of sysexits.h: not a failure, the same command again continues. A launcher restarts on this code alone.
EXIT_PREEMPTED = 75


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Inside, SIGTERM ends the process at once with EXIT_PREEMPTED: nothing is there yet to be saved.

    As the first process of a container it would otherwise not even hear the signal. `Signals` takes over from here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _leave(number: int, frame: types.FrameType | None) -> None:
    os.write(2, b"\nSIGTERM: leaving before the training has begun, or after its end\n")
    os._exit(EXIT_PREEMPTED)


class Signals:
    """Context manager that catches the run's signals and puts the handlers that were there back.

    Attributes:
      stop: name of the signal that asked the run to leave ("SIGTERM" or "SIGINT"), or None.
      armed: whether somebody reads `stop`; the loop sets it.

    Args:
      leave: ends the process, on a thread, for the signal of that name: one that comes before `armed`.
    """

    def __init__(self, leave: Callable[[str], Any]) -> None:
        self.stop: str | None = None
        self.armed = False
        self._leave = leave
        self._interrupts = 0
        self._profile = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        """Raises RuntimeError outside the main thread, where Python does not allow handlers."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals can only be caught in the main thread; call the training loop from there")
        heard, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), daemon=True, name="signals").start()
        handlers = {signal.SIGTERM: self._on_stop, signal.SIGINT: self._on_stop}
        if hasattr(signal, "SIGUSR1"):  # Windows has none
            handlers[signal.SIGUSR1] = self._on_profile
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._wakeup)

    def take_profile_request(self) -> bool:
        """Whether SIGUSR1 came since the last call."""
        requested, self._profile = self._profile, False
        return requested

    def _listen(self, heard: int) -> None:
        """Takes the numbers of the signals as they come, until the other end is closed."""
        with os.fdopen(heard, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in (signal.SIGTERM, signal.SIGINT) and not self.armed:
                    self._leave(signal.Signals(number[0]).name)

    def _on_stop(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.stop is None:
            self.stop = signal.Signals(number).name
            if self.armed:
                # A handler may interrupt a print, and buffered streams are not reentrant: write to the descriptor.
                again = "; Ctrl-C again leaves at once, without saving" if number == signal.SIGINT else ""
                os.write(2, f"\n{self.stop}: saving and leaving after this step{again}\n".encode())

    def _on_profile(self, number: int, frame: types.FrameType | None) -> None:
        self._profile = True
