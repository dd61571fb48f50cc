"""Relations between the settings of a pipeline. Each problem is one sentence."""

from __future__ import annotations

from collections.abc import Iterator

from maxlm.checks.words import divisors
from maxlm.config import Config


def check_pipeline(config: Config) -> Iterator[str]:
    """The problems of `parallel.pipeline`, its schedule and what it is combined with."""
    parallel, model = config.parallel, config.model
    name, stages, virtual = parallel.pipeline_schedule, parallel.pipeline, parallel.virtual_stages
    if stages < 2:
        if virtual > 1 and stages == 1:
            yield (
                f"parallel.virtual_stages is {virtual}, but parallel.pipeline is 1; type parallel.virtual_stages=1, or "
                "give the pipeline stages"
            )
        return
    if (virtual > 1) != (name == "interleaved"):
        yield (
            f"parallel.virtual_stages is {virtual} with parallel.pipeline_schedule {name!r}; interleaved takes 2 or "
            "more, every other schedule 1"
        )
    micros = config.train.accumulation
    if name == "interleaved" and micros % stages:
        yield (
            f"train.accumulation is {micros}, but interleaved takes microbatches in groups of parallel.pipeline "
            f"{stages}; use a multiple of {stages}, or another parallel.pipeline_schedule"
        )
    if model.moe.dense_layers:
        yield (
            f"model.moe.dense_layers is {model.moe.dense_layers} with parallel.pipeline {stages}, but a pipeline "
            "spreads layers of one structure; type parallel.pipeline=1 or model.moe.dense_layers=0"
        )
    if model.mtp_layers:
        yield (
            f"model.mtp_layers is {model.mtp_layers} with parallel.pipeline {stages}, but no stage of a pipeline has "
            "layers that predict further tokens; type parallel.pipeline=1 or model.mtp_layers=0"
        )
    cycle = len(model.attention.windows)
    if model.num_layers % (stages * virtual * cycle):
        units = f"{model.num_layers // cycle} cycles of model.attention.windows" if cycle > 1 else "layers"
        whole = f"model.num_layers is {model.num_layers}"
        if model.num_layers % cycle:
            yield (
                f"{whole}, which {cycle} entries of model.attention.windows do not divide; with parallel.pipeline "
                f"above 1 use a multiple of {cycle}"
            )
        else:
            yield (
                f"{whole}: {units} do not divide into parallel.pipeline {stages} x parallel.virtual_stages {virtual} "
                f"parts; use two whose product is one of {divisors(model.num_layers // cycle)}"
            )
