"""Fitted coefficients as their papers print them, and synthetic runs made from them.

Parameters are counted with embeddings by Hoffmann et al. and by those who follow them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maxlm.study.law import Law, Points


class Published(NamedTuple):
    """A law and where it is printed."""

    law: Law
    source: str


LAWS: dict[str, Published] = {
    "hoffmann_2022": Published(
        Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
        "Hoffmann et al. 2022, Training compute-optimal large language models, arXiv 2203.15556, appendix D.3",
    ),
    "besiroglu_2024": Published(
        Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
        "Besiroglu et al. 2024, Chinchilla scaling: a replication attempt, arXiv 2404.10102, table 1",
    ),
    "muennighoff_2023": Published(
        Law(E=1.87, A=521.0, B=1488.0, alpha=0.353, beta=0.353),
        "Muennighoff et al. 2023, Scaling data-constrained language models, arXiv 2305.16264, appendix A",
    ),
}


def synthetic(law: Law, *, seed: int, noise: float = 0.01, sizes: int = 16, lengths: int = 15) -> Points:
    """Runs of a law on a grid of sizes by token counts, as wide as published studies are.

    Args:
      noise: standard deviation of log L.
      sizes, lengths: N from 2e7 to 2e10 and D from 1e9 to 1e12, in geometric steps.
    """
    params, tokens = (
        grid.ravel() for grid in np.meshgrid(np.geomspace(2e7, 2e10, sizes), np.geomspace(1e9, 1e12, lengths))
    )
    error = np.random.default_rng(seed).normal(0.0, noise, params.size)
    return Points(params, tokens, law.loss(params, tokens) * np.exp(error))
