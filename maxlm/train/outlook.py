"""What follows from a config, known before any device is started."""

from __future__ import annotations

import math

import jax
import numpy as np

from maxlm.config import Config
from maxlm.model.decoder import split_model
from maxlm.model.flops import ledger
from maxlm.optim.optimizers import make_optimizer
from maxlm.train.state import abstract_shapes

Figures = dict[str, dict[str, int | float]]


def outlook(config: Config) -> Figures:
    """Counts by section: parameters by component, tokens, FLOPs a token in both conventions, bytes of state.

    Args:
      config: resolved. Where one axis of the mesh is still -1, bytes are for the whole state alone.
    """
    counts = ledger(config.model, sequence_length=config.data.sequence_length)
    specs = split_model(config.model).specs
    state = abstract_shapes(config, make_optimizer(config.optim, specs))

    def size(tree: object) -> int:
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))

    tokens = run_tokens(config)
    total = size((state.params, state.opt_state, state.average))
    figures: Figures = {
        "parameters": {
            **dict(counts.params_by_component),
            "total": counts.params_total,
            "active": counts.params_active,
            "besides embeddings": counts.params_nonembedding,
        },
        "tokens": {
            "a step, at first": config.data.batch_size * config.data.sequence_length,
            "in all": tokens,
            "a parameter": tokens / counts.params_total,
        },
        "training FLOPs": {
            "a token, 6N": counts.six_n,
            "a token, causal-exact": counts.causal_exact,
            "in all, causal-exact": counts.causal_exact * tokens,
        },
        "bytes of state": {
            "parameters": size(state.params),
            "optimizer": size(state.opt_state),
            "moving average": size(state.average),
            "total": total,
        },
    }
    sizes = config.parallel.sizes.values()
    if min(sizes) > 0:
        figures["mesh"] = {"devices": math.prod(sizes)}
    return figures


def run_tokens(config: Config) -> int:
    """Positions of all batches of a run, its later phases with their own sizes."""
    phases = sorted(config.data.phases.values(), key=lambda phase: phase.from_step)
    rows, positions, since, tokens = config.data.batch_size, config.data.sequence_length, 0, 0
    for phase in phases:
        tokens += (phase.from_step - since) * rows * positions
        rows, positions, since = phase.batch_size or rows, phase.sequence_length or positions, phase.from_step
    return tokens + (config.train.steps - since) * rows * positions
