"""What follows from a config, known before any device is started."""

from __future__ import annotations

import dataclasses
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
    costs = _token_flops(config)
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
    """Steps of one shape in a row: the first of them and how many, rows B and positions S of their batches."""

    from_step: int
    steps: int
    rows: int
    sequence_length: int

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.rows, self.sequence_length

    @property
    def tokens(self) -> int:
        """Positions of all batches."""
        return self.steps * self.rows * self.sequence_length


def run_stretches(config: Config) -> list[Stretch]:
    """What a run consumes, its phases one after the other."""
    data, found = config.data, []
    rows, positions, since = data.batch_size, data.sequence_length, 0
    for phase in sorted(data.phases.values(), key=lambda phase: phase.from_step):
        found.append(Stretch(since, phase.from_step - since, rows, positions))
        rows, positions, since = phase.batch_size or rows, phase.sequence_length or positions, phase.from_step
    return [*found, Stretch(since, config.train.steps - since, rows, positions)]


def heaviest(config: Config) -> Stretch:
    """The steps that take most memory and time: of the most tokens a batch, and of those the longest rows."""
    return max(run_stretches(config), key=lambda one: (math.prod(one.shape), one.sequence_length))


def at_heaviest(config: Config) -> Config:
    """The config of a run whose steps are all as the heaviest of this one's; itself where there are no phases."""
    if not config.data.phases:
        return config
    most = heaviest(config)
    data = dataclasses.replace(config.data, batch_size=most.rows, sequence_length=most.sequence_length, phases={})
    return dataclasses.replace(config, data=data)


def equal_steps(config: Config) -> float:
    """As many of the heaviest steps as take the FLOPs of the whole run; its steps, where they are all alike."""
    costs, most = _token_flops(config), heaviest(config)
    flops = sum(costs[stretch.sequence_length] * stretch.tokens for stretch in run_stretches(config))
    return flops / (costs[most.sequence_length] * math.prod(most.shape))


def _token_flops(config: Config) -> dict[int, float]:
    """Causal-exact FLOPs of a token, by the positions of its row."""
    lengths = {stretch.sequence_length for stretch in run_stretches(config)}
    return {length: ledger(config.model, sequence_length=length).causal_exact for length in lengths}


def run_tokens(config: Config) -> int:
    """Positions of all batches of a run."""
    return sum(stretch.tokens for stretch in run_stretches(config))
