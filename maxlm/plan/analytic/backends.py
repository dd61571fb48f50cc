"""Which attention a run will have on hardware that is not here."""

from __future__ import annotations

import jax.numpy as jnp

from maxlm.config import Config
from maxlm.kernels import attention
from maxlm.train.setup import attention_needs

UNNAMED = ("cudnn", "plain")
"""Attention back ends whose results a remat policy cannot save by name."""


def names_results(config: Config, platform: str) -> bool:
    """Whether the attention of a run on this platform names its results for remat."""
    return config.parallel.context > 1 or not attention_backends(config, platform) & set(UNNAMED)


def attention_backends(config: Config, platform: str) -> set[str]:
    """Names of the attention back ends of a run on this platform, without context parallelism."""
    return {
        attention.choose(
            platform=platform,
            dtype=jnp.dtype(config.train.precision),
            head_dim=config.model.attention.head_dim,
            needs=attention_needs(config, window=window, segments=config.data.mask_documents),
            queries=config.data.sequence_length,
            keys=config.data.sequence_length,
        ).name
        for window in config.model.attention.windows
    }
