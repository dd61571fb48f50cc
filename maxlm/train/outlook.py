"""What follows from a config, known before any device is started."""

from __future__ import annotations

import math
from typing import NamedTuple

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

    stretches = run_stretches(config)
    tokens = sum(stretch.tokens for stretch in stretches)
    costs = {length: ledger(config.model, sequence_length=length).causal_exact for _, length in stretches}
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
            "a token, causal-exact": counts.causal_exact,  # of the first phase's rows
            "in all, causal-exact": sum(costs[stretch.sequence_length] * stretch.tokens for stretch in stretches),
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


class Stretch(NamedTuple):
    """Steps of one shape in a row: the positions of all their batches, and those of a row."""

    tokens: int
    sequence_length: int


def run_stretches(config: Config) -> list[Stretch]:
    """What a run consumes, its phases one after the other."""
    data, found = config.data, []
    rows, positions, since = data.batch_size, data.sequence_length, 0
    for phase in sorted(data.phases.values(), key=lambda phase: phase.from_step):
        found.append(Stretch((phase.from_step - since) * rows * positions, positions))
        rows, positions, since = phase.batch_size or rows, phase.sequence_length or positions, phase.from_step
    return [*found, Stretch((config.train.steps - since) * rows * positions, positions)]


def run_tokens(config: Config) -> int:
    """Positions of all batches of a run."""
    return sum(stretch.tokens for stretch in run_stretches(config))
