"""The moving average of the weights (EMA), used for evaluation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def update_average(average: dict[str, Any], params: dict[str, Any], decay: float) -> dict[str, Any]:
    """decay * average + (1 - decay) * params in float32; {} stays {}, for a run without an average.

    The average starts as a copy of the initial parameters, so it needs no correction of a bias towards zero. The
    caller keeps the old average when the guard refuses the update.
    """
    if not average:
        return average
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p.astype(jnp.float32) - a), average, params)
