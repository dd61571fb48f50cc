"""Relations between the settings of the loop, of evaluations and of checkpoints. Each problem is one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from maxlm.config import ACTIVATION_NAMES, REMAT_WORDS, Config


def check_loop(config: Config) -> Iterator[str]:
    """The problems of `train`, `eval` and `checkpoint`."""
    yield from _check_best(config)
    train, window = config.train, config.eval.sequence_length or config.data.sequence_length
    if config.eval.overlap >= window:
        yield f"eval.overlap is {config.eval.overlap}, but a window has {window} positions; use at most {window - 1}"
    if len(train.profile) not in (0, 2):
        yield f"train.profile is {train.profile}, but it is (first step, steps), or empty for none; type (10, 3)"
    elif train.profile and train.profile[0] >= train.steps and not train.budget_seconds:
        yield (
            f"train.profile is {train.profile}, but the last step is {train.steps - 1}, counted from 0 (train.steps "
            f"{train.steps}): no window would open; begin it there or before"
        )
    if train.reduce_dtype == "bfloat16" != train.precision:
        yield (
            f"train.reduce_dtype is bfloat16, but train.precision is {train.precision}, which it would round off; type "
            "train.reduce_dtype=float32"
        )
    yield from _check_remat(config)
    times, least = train.watchdog
    if bool(times) != bool(least):
        yield (
            f"train.watchdog is {train.watchdog}, but it is (times the median, seconds at least); type (10.0, 60.0), "
            "or (0.0, 0.0) for none"
        )
    for name in config.eval.stores:
        if name not in config.data.stores:
            yield f"eval.stores names {name!r}, which is not in data.stores ({', '.join(config.data.stores)})"


def _check_remat(config: Config) -> Iterator[str]:
    remat, words = config.train.remat, ", ".join(REMAT_WORDS)
    if remat in REMAT_WORDS:
        return
    if re.search(r"[\s,]", remat):
        joined = "+".join(re.findall(r"\w+", remat))
        yield f"train.remat is {remat!r}, but names are joined by +; type train.remat={joined}"
        return
    names = remat.split("+")
    for name in names:
        if name in REMAT_WORDS:
            yield f"train.remat is {remat!r}, but {words} stand alone; type train.remat={name}, or leave {name} out"
        elif name not in ACTIVATION_NAMES:
            known = ACTIVATION_NAMES if len(names) > 1 else REMAT_WORDS + ACTIVATION_NAMES
            close = difflib.get_close_matches(name, known, n=1)
            yield (
                f"train.remat has {name!r}; {f'did you mean {close[0]!r}? ' if close else ''}"
                f"it is one of {words}, or names joined by +, out of {', '.join(ACTIVATION_NAMES)}"
            )
    if "mlp_gate" in names and not config.model.mlp.gated:
        others = "+".join(name for name in names if name != "mlp_gate")
        yield (
            f"train.remat has 'mlp_gate', but a feed-forward half of model.mlp.kind {config.model.mlp.kind!r} has no "
            f"gate; type train.remat={others or 'full'}"
        )


def _check_best(config: Config) -> Iterator[str]:
    """A checkpoint is judged by an evaluation of its own step."""
    saves, evaluations = config.checkpoint.every_steps, config.eval.every_steps
    if not config.checkpoint.keep_best:
        return
    if not evaluations:
        yield "checkpoint.keep_best needs evaluations to judge by; set eval.every_steps, or checkpoint.keep_best=0"
    elif evaluations > config.train.steps and not config.train.budget_seconds:
        yield (
            f"checkpoint.keep_best needs evaluations, but eval.every_steps is {evaluations} and train.steps "
            f"{config.train.steps}: there would be none before the end; type fewer, or checkpoint.keep_best=0"
        )
    elif max(saves, evaluations) % min(saves, evaluations):
        yield (
            f"checkpoint.keep_best needs evaluations of the states that are saved, but checkpoint.every_steps {saves} "
            f"and eval.every_steps {evaluations} do not divide one another; type eval.every_steps={saves}"
        )
    if config.checkpoint.mtbf_hours:
        yield (
            f"checkpoint.mtbf_hours is {config.checkpoint.mtbf_hours:g}, by which saves come at steps without an "
            "evaluation, and checkpoint.keep_best needs one; type checkpoint.mtbf_hours=0 or checkpoint.keep_best=0"
        )
