"""How many steps fit into a stated time: measured once on the machine at hand, then part of the run's config."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlm.cluster import decided
from maxlm.config import Config
from maxlm.data.batch import Batch
from maxlm.data.loader import Loader
from maxlm.resolve import resolve
from maxlm.train.setup import Setup, place_batch
from maxlm.train.state import make_state

TIMED_STEPS = 8  # after one that is not timed


def with_steps(config: Config, steps: int) -> Config:
    """The config with a fixed number of steps and no budget, and without what would begin after the last of them."""
    profile = config.train.profile if steps > max(config.train.profile[:1], default=0) else ()
    train = dataclasses.replace(config.train, steps=steps, budget_seconds=0.0, profile=profile)
    best = config.checkpoint.keep_best if config.eval.every_steps <= steps else 0
    checkpoint = dataclasses.replace(config.checkpoint, keep_best=best)
    return resolve(dataclasses.replace(config, train=train, checkpoint=checkpoint))


def recorded_steps(config: Config, workdir: Path) -> Config:
    """The config with the number of steps that the run in `workdir` was given, if it has begun: process 0 says it.

    Of a run in a bucket the others may not have the record yet, or not any more; whoever goes on to measure while
    another does not would wait for it for ever.
    """
    if not config.train.budget_seconds:
        return config
    record = workdir / "config.json"
    steps = decided(lambda: json.loads(record.read_text())["train"]["steps"] if record.exists() else None)
    return config if steps is None else with_steps(config, steps)


def fitted_steps(config: Config, setup: Setup, loader: Loader, *, log: Callable[[str], None]) -> int:
    """As many steps as `train.budget_seconds` holds, `train.steps` at most, by the median time of a few real ones."""
    shape = loader.shape(0)
    program = setup.compile(*shape, log=log)
    state = make_state(setup.config, setup.optimizer, setup.shardings)
    seconds = []

    def read(step: int) -> Batch:
        return place_batch(setup.mesh, shape, lambda rows: loader.batch(step, rows))

    for step in range(1 + TIMED_STEPS):
        batch = read(step)
        began = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[1:])[TIMED_STEPS // 2]
    if jax.process_count() > 1:  # all have to take the same number of steps
        median = float(multihost_utils.broadcast_one_to_all(np.float32(median)))
    steps = max(min(round(config.train.budget_seconds / median), config.train.steps), config.optim.warmup_steps + 1)
    log(f"a step takes {median:.2f} s: {steps} steps fit into {config.train.budget_seconds:g} s")
    if config.train.profile and config.train.profile[0] >= steps:
        log(f"train.profile is {config.train.profile}: that is after the last of them, and nothing is traced")
    if config.checkpoint.keep_best and config.eval.every_steps > steps:
        log(f"eval.every_steps is {config.eval.every_steps}: there is none to judge by, and no checkpoint kept as best")
    return steps
