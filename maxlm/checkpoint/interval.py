"""How often to save: the interval that loses the least time to saving and to doing work again. Pure functions.

A save costs `cost` seconds of training (the stall alone: what is written beside the training costs nothing), and a
failure costs the work since the last save. Young (1974, "A first order approximation to the optimum checkpoint
interval") balances the two as sqrt(2 cost mtbf); Daly (2006, "A higher order estimate of the optimum checkpoint
interval for restart dumps", equation 37) holds where failures are frequent, too.
"""

from __future__ import annotations

import math


def best_interval(cost: float, mtbf: float) -> float:
    """Seconds of training between the end of one save and the begin of the next (Daly 2006, equation 37).

    Args:
      cost: seconds that the training stands still for a save.
      mtbf: mean seconds between failures of the whole run, whose failures come independently of each other.

    Raises:
      ValueError: a negative cost, or a time between failures that is not positive.
    """
    if cost < 0 or mtbf <= 0:
        raise ValueError(f"a save of {cost:g} s and a failure every {mtbf:g} s cannot be")
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def interval_steps(*, cost: float, mtbf: float, step_seconds: float, write_seconds: float, at_most: int) -> int:
    """Steps from one save to the next, 1 to `at_most`.

    Args:
      cost, mtbf: as for `best_interval`.
      step_seconds: seconds of a step.
      write_seconds: what a save takes from its begin to its commit; a next one before that would wait for it.
      at_most: steps, whatever else would be best.
    """
    seconds = max(best_interval(cost, mtbf), write_seconds)
    return max(1, min(at_most, math.ceil(seconds / step_seconds)))
