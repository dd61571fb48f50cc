"""The live line of a run: where it is, how well it does, how fast it goes and how long it will take.

Time is measured on completed steps: `update` is called when a step's metrics have arrived on the host, so the device
has done the work. The clock stands still inside `paused` (evaluation, checkpoints) and `once` (compilation, which does
not come again and has no part in the ETA). A step that was sent off before a pause has to be reported before it, or its
work would be done in time that is not counted; `update` inside a pause is therefore refused.

Tokens are loss-bearing positions: padding does not count, neither in tokens/s nor in MFU. MFU is tokens/s times the
FLOPs of a token over the peak of all devices (see `peak`). A figure above 100% would only say that the peak is wrong
(a measured one may have been taken while the machine was busy), so it is left out, as when the peak is unknown.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WINDOW_SECONDS = 20.0  # of training that "recent" means for tokens/s, MFU and ETA
WINDOW_STEPS = 500  # at most, so that very short steps cost nothing to sum up
REFRESH_SECONDS = 0.25  # between redraws of the bar


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a token costs and what the devices can do."""

    flops_6n: float  # FLOPs of a token, forward and backward, by the 6N convention
    flops_causal: float  # FLOPs of a token with attention over the positions that it sees
    peak_flops: float | None  # FLOP/s of all devices together; None: not known

    def mfu_6n(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation as a fraction, or None when there is no honest one."""
        return utilisation(tokens_per_second * self.flops_6n, self.peak_flops)

    def mfu_causal(self, tokens_per_second: float) -> float | None:
        """As `mfu_6n`, in the causal-exact convention."""
        return utilisation(tokens_per_second * self.flops_causal, self.peak_flops)


def utilisation(rate: float, peak: float | None) -> float | None:
    """The fraction, or None when it would not be honest: the peak is unknown, or too low to be one."""
    return rate / peak if peak and rate <= peak else None


class Reading(NamedTuple):
    """What the clock says after a step."""

    seconds: float  # that this step took, pauses excluded
    tokens_per_second: float  # over the recent window
    mfu_6n: float | None
    mfu_causal: float | None
    eta_seconds: float  # until the last step, pauses that come again included at the rate seen so far


class Progress:
    """A bar that redraws itself on a terminal; elsewhere a line every `log_every` steps.

    Use as a context manager, entered when the first step can be sent off; the clock starts there.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int,
        log_every: int,
        cost: Cost,
        stream: TextIO | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Nothing is shown or measured yet.

        Args:
          total_steps: steps of the whole run.
          start_step: steps done before, in earlier processes.
          log_every: steps between lines where there is no terminal.
          cost: what MFU is computed from.
          stream: where lines go; None: nowhere (every process but the first), readings are made all the same.
          clock: seconds, monotonic.
        """
        self._total, self._start, self._log_every = total_steps, start_step, log_every
        self._cost, self._clock = cost, clock
        self._console = None if stream is None else Console(file=stream, highlight=False)
        self._live: Live | None = None
        self._step = start_step
        self._pauses = 0  # nested ones open
        self._begun = self._paused_at = self._last = 0.0
        self._paused_seconds = self._once_seconds = 0.0
        self._drawn = -math.inf
        # Of recent steps: training time at the end, seconds, tokens.
        self._recent: collections.deque[tuple[float, float, float]] = collections.deque(maxlen=WINDOW_STEPS)

    def __enter__(self) -> Progress:
        self._begun = self._clock()
        if self._console is not None and self._console.is_terminal:
            # Redrawn from `update`, so that no second thread competes with the one that feeds the devices.
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def train_seconds(self) -> float:
        """Time of this process on steps so far: since entry, without the pauses."""
        now = self._paused_at if self._pauses else self._clock()
        return now - self._begun - self._paused_seconds - self._once_seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside, for what comes again: evaluations, checkpoints. May be nested."""
        with self._stopped():
            yield
        if not self._pauses:
            self._paused_seconds += self._clock() - self._paused_at

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Stops the clock inside, for what does not come again, such as compiling. May not be nested."""
        with self._stopped():
            yield
        self._once_seconds += self._clock() - self._paused_at

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[None]:
        if not self._pauses:
            self._paused_at = self._clock()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def renew(self, cost: Cost) -> None:
        """From the next step on a token costs something else; how fast it goes is measured anew."""
        self._cost = cost
        self._recent.clear()

    def update(
        self, step: int, *, tokens: float, loss: float, learning_rate: float, grad_norm: float, accepted: bool
    ) -> Reading:
        """Takes in a completed step and shows it.

        Args:
          step: steps done now, this one included.
          tokens: loss-bearing positions of the step over the whole batch.
          loss: nats a token.
          learning_rate: of this step.
          grad_norm: global norm before clipping.
          accepted: whether the guard let the update through; a refused one gets a line of its own.

        Raises:
          RuntimeError: inside a pause.
        """
        if self._pauses:
            raise RuntimeError(
                f"step {step} was reported while the clock is paused; report pending steps before pausing"
            )
        reading = self._measure(step, tokens)
        if not accepted:
            self.note(f"step {step}: update refused (loss {loss:.4g}, gradient norm {grad_norm:.4g})")
        line = format_line(
            step, total=self._total, loss=loss, learning_rate=learning_rate, grad_norm=grad_norm, reading=reading
        )
        done = step >= self._total
        if self._live is not None:
            if done or self._clock() - self._drawn >= REFRESH_SECONDS:
                self._drawn = self._clock()
                table = Table.grid(expand=True)
                table.add_row(ProgressBar(total=self._total, completed=step))
                table.add_row(Text(line, no_wrap=True, overflow="ellipsis"))
                self._live.update(table, refresh=True)
        elif done or step % self._log_every == 0 or step == self._start + 1:
            self.note(line)
        return reading

    def note(self, text: str) -> None:
        """Shows a line of its own, above the bar if there is one."""
        if self._console is not None:
            self._console.print(Text(text), soft_wrap=True)

    def _measure(self, step: int, tokens: float) -> Reading:
        now = self.train_seconds
        seconds, self._last, self._step = now - self._last, now, step
        self._recent.append((now, seconds, tokens))
        while len(self._recent) > 1 and now - self._recent[0][0] > WINDOW_SECONDS:
            self._recent.popleft()
        span = sum(s for _, s, _ in self._recent)
        rate = sum(t for _, _, t in self._recent) / span if span else 0.0
        # Evaluations and checkpoints to come take their share, as they have so far.
        stretch = 1.0 + self._paused_seconds / now if now else 1.0
        return Reading(
            seconds=seconds,
            tokens_per_second=rate,
            mfu_6n=self._cost.mfu_6n(rate),
            mfu_causal=self._cost.mfu_causal(rate),
            eta_seconds=max(self._total - step, 0) * span / len(self._recent) * stretch,
        )


def format_line(step: int, *, total: int, loss: float, learning_rate: float, grad_norm: float, reading: Reading) -> str:
    """One aligned line under 120 columns (of runs below 10 million steps)."""
    width = len(str(total))
    return "  ".join(
        (
            f"step {step:{width}d}/{total} {100 * step / total:4.1f}%",
            f"loss {loss:6.3f}",
            f"lr {learning_rate:.2e}".replace("e-0", "e-").replace("e+0", "e+"),
            f"grad {_short(grad_norm):>7s}",
            f"{_count(reading.tokens_per_second):>5s} tok/s",
            f"MFU {_percent(reading.mfu_6n)} 6N {_percent(reading.mfu_causal)} causal",
            f"ETA {format_duration(reading.eta_seconds)}",
        )
    )


def plain_console() -> Console:
    """A console for reports, which prints names of configs and stores as they are: `8b[v2]` and `:x:` are no markup."""
    return Console(markup=False, emoji=False)


def format_duration(seconds: float) -> str:
    """Up to eight characters: 1:05, 2:03:04, 3d04h."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _percent(fraction: float | None) -> str:
    return f"{100 * fraction:4.1f}%" if fraction is not None else f"{'–':>5s}"


def _short(value: float) -> str:
    """At most seven characters."""
    if value == 0 or 1e-3 <= value < 999.5:
        return f"{value:.3f}"
    return f"{value:.1e}"


def _count(value: float) -> str:
    """Three digits, in thousands, millions or billions; at most five characters."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # rounds to one of the unit
            scaled = value / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0f}"
