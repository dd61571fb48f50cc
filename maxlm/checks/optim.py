"""Relations between the settings of the optimizer, its schedule and the guard. Each problem is one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator

from maxlm.config import Config, GuardConfig, OptimConfig

# A decay above this does not move a bfloat16 number: v and decay * v round to the same one, and a moment never falls.
LARGEST_BFLOAT16_DECAY = 1.0 - 2.0**-8
# By optimizer, the decays of the moments that are kept in optim.moments_dtype. Muon's embeddings and norms are AdamW's.
STORED_MOMENTS = {
    "adamw": ("b1", "b2"),
    "adafactor": ("b1",),
    "lion": ("b2",),
    "muon": ("b1", "b2", "muon_momentum"),
}
# What is added to a root that may be zero, by optimizer: updates of gradients that have a norm, which are then at most
# 1.8e19, have to be finite numbers of float32. Of Muon also where their squares are all too small for float32: a matrix
# of any size over its epsilon is then still small enough for its polynomial to converge.
SMALLEST_EPSILON = {"adamw": 1e-18, "muon": 1e-12}


def check_optim(config: Config) -> Iterator[str]:
    """The problems of `optim`, and of the steps that its schedule goes over."""
    yield from _check_schedule(config)
    yield from _check_guard(config.optim.guard)
    yield from _check_moments(config.optim)
    yield from _check_rules(config.optim)


def _check_schedule(config: Config) -> Iterator[str]:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps is {optim.warmup_steps}, but train.steps is {steps}: the warm-up would never end; "
            f"use at most {steps - 1}"
        )
    elif optim.schedule == "wsd" and optim.warmup_steps + optim.decay_steps > steps:
        yield (
            f"optim.warmup_steps {optim.warmup_steps} and optim.decay_steps {optim.decay_steps} are together more "
            f"than train.steps {steps}; use decay_steps of at most {steps - optim.warmup_steps}"
        )
    if optim.decay_steps and optim.schedule != "wsd":
        yield (
            f"optim.decay_steps is {optim.decay_steps}, but optim.schedule {optim.schedule!r} has no cooldown; "
            "type optim.schedule=wsd or optim.decay_steps=0"
        )
    if config.train.budget_seconds and (optim.decay_steps or config.data.phases):
        yield (
            f"train.budget_seconds is {config.train.budget_seconds:g}, which leaves the number of steps open, but "
            "optim.decay_steps and data.phases need it; type optim.schedule=linear, or train.budget_seconds=0"
        )


def _check_guard(guard: GuardConfig) -> Iterator[str]:
    refusals, within, times = guard.rollback
    if any(guard.rollback) and not (0 < refusals <= within and times):
        yield (
            f"optim.guard.rollback is {guard.rollback}; give (K, M, N) with 1 <= K <= M and N >= 1, as in "
            "(4, 64, 3): back after 4 refusals in 64 steps, 3 times at most"
        )
    if refusals > guard.max_rejections:
        yield (
            f"optim.guard.rollback waits for {refusals} refusals, but optim.guard.max_rejections "
            f"{guard.max_rejections} in a row end the run before; use at most {guard.max_rejections} as the first "
            f"number, or optim.guard.max_rejections={refusals} or more"
        )
    if guard.min_history > guard.window:
        yield (
            f"optim.guard.min_history is {guard.min_history}, more than optim.guard.window {guard.window} can hold; "
            "use at most that"
        )


def _check_moments(optim: OptimConfig) -> Iterator[str]:
    if optim.moments_dtype == "bfloat16":
        for path in STORED_MOMENTS[optim.optimizer]:
            if (decay := getattr(optim, path)) > LARGEST_BFLOAT16_DECAY:
                yield (
                    f"optim.{path} is {decay}, but a bfloat16 moment cannot follow a decay above "
                    f"{LARGEST_BFLOAT16_DECAY:.4f}; "
                    "lower it, or type optim.moments_dtype=float32"
                )
    for path in ("b1", "b2", "ema_decay", "muon_momentum"):
        if (decay := getattr(optim, path)) >= 1:
            yield f"optim.{path} is {decay}, but a decay has to be below 1"
    if optim.epsilon < (least := SMALLEST_EPSILON.get(optim.optimizer, 0.0)):
        yield (
            f"optim.epsilon is {optim.epsilon:g}, but {optim.optimizer} divides by a root that is 0 where a gradient "
            f"is, and needs {least:g} or more; type optim.epsilon=1e-8"
        )


def _check_rules(optim: OptimConfig) -> Iterator[str]:
    for path, rules in (("decay_rules", optim.decay_rules), ("lr_rules", optim.lr_rules)):
        for pattern, multiplier in rules:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"optim.{path} has the pattern {pattern!r}, which is not a regular expression: {error}"
            if multiplier < 0:
                yield (
                    f"optim.{path} gives {pattern!r} the multiplier {multiplier:g}, but it has to be at least 0, which "
                    "leaves the parameters as they are"
                )
