"""When the next save is due: at fixed steps, or as often as failures and the measured cost of a save make it best."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlm.checkpoint.interval import interval_steps


class Pace:
    """The steps at which one kind of checkpoint is due; the same on every process.

    Args:
      every_steps: between saves; with `mtbf` at most.
      mtbf: seconds between the failures that this kind of checkpoint is for; 0: every_steps as it stands.
    """

    def __init__(self, every_steps: int, *, mtbf: float):
        self._every, self._mtbf = every_steps, mtbf
        self._steps = every_steps  # chosen last
        self._next: int | None = None

    def due(self, step: int) -> bool:
        """Whether a save is due after `step` batches; called for every step in turn."""
        if not self._mtbf:
            return step > 0 and step % self._every == 0
        if self._next is None:
            self._next = step - 1 + self._every
        return step >= self._next

    def saved(self, step: int, *, cost: float, write_seconds: float, step_seconds: float) -> int:
        """Called by all processes after a save at `step`, with what process 0 has measured; the steps to the next.

        Args:
          cost: seconds that the training stood still for it.
          write_seconds: from its begin to its commit; 0: not known.
          step_seconds: of a step.
        """
        steps = self._every
        if self._mtbf:
            steps = interval_steps(
                cost=cost,
                mtbf=self._mtbf,
                step_seconds=max(step_seconds, 1e-6),
                write_seconds=write_seconds,
                at_most=self._every,
            )
            if jax.process_count() > 1:  # clocks differ
                with jax.transfer_guard("allow"):
                    steps = int(multihost_utils.broadcast_one_to_all(np.int32(steps)))
            self._next = step + steps
        self._steps = steps
        return steps

    def go_on_from(self, step: int) -> None:
        """The run counts from `step` on, with the interval chosen before: it went back there, or nothing was saved."""
        self._next = step + self._steps
