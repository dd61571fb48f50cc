"""A profiler window, opened by config at a step or by SIGUSR1 at any time."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import jax

from maxlm.train.signals import Signals

FOLDER = "profile"
SIGNALLED_STEPS = 3
"""Steps of a window that a signal opens, where the config says nothing."""


class Profiler:
    """Traces the steps of a window into `folder`, readable by XProf, Perfetto or TensorBoard's profile plugin.

    The loop calls `before(step)`; when `closing(step)` says that the window ends with this step, the loop waits for
    the step's metrics and calls `after(step)`, so that the trace holds whole steps.
    """

    def __init__(self, window: tuple[int, ...], folder: Path, signals: Signals):
        self._start, self._steps = window or (0, SIGNALLED_STEPS)
        self._folder, self._signals = folder, signals
        self._last: int | None = None

    def before(self, step: int) -> None:
        """Opens the window if one is due at this step."""
        asked = self._signals.take_profile_request()
        configured = self._start and step == self._start
        if self._last is None and (asked or configured):
            jax.profiler.start_trace(str(self._folder))
            self._last = step + self._steps - 1

    def closing(self, step: int) -> bool:
        """Whether an open window ends with this step."""
        return self._last is not None and step >= self._last

    def after(self, step: int) -> None:
        """Closes the window if it ends with this step."""
        if self.closing(step):
            self._close()

    def _close(self) -> None:
        if self._last is not None:
            jax.profiler.stop_trace()
            self._last = None

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close()
