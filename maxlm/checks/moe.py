"""Relations between the settings of `model.moe`, and of the mesh axis `expert`. Each problem is one sentence."""

from __future__ import annotations

from collections.abc import Iterator

from maxlm.checks.words import divisors
from maxlm.config import Config, MoeConfig


def check_moe(config: Config) -> Iterator[str]:
    """The problems of a filled config that come of experts, or of having none."""
    moe, sharded = config.model.moe, config.parallel.expert
    if not moe.experts:
        if moe.dense_layers:
            yield (
                f"model.moe.dense_layers is {moe.dense_layers}, but every layer of a model without experts is dense; "
                "type model.moe.dense_layers=0"
            )
        if sharded not in (0, 1):
            yield (
                f"parallel.expert is {sharded}, but the model has no experts to spread; type parallel.expert=1, and "
                "give the devices to parallel.data or parallel.fsdp"
            )
        return
    if moe.dense_layers >= config.model.num_layers:
        yield (
            f"model.moe.dense_layers is {moe.dense_layers}, which leaves none of {config.model.num_layers} layers to "
            f"the experts; use at most {config.model.num_layers - 1}, or model.moe.experts=0"
        )
    if moe.active > moe.experts:
        yield f"model.moe.active is {moe.active}, but there are {moe.experts} experts; use at most that"
    if sharded > 1 and moe.experts % sharded:
        yield (
            f"parallel.expert is {sharded}, which does not divide model.moe.experts {moe.experts}; use one of "
            f"{divisors(moe.experts)}"
        )
    for name, dim in (("dim", moe.dim), ("shared_dim", moe.shared_dim)):
        if config.parallel.tensor > 1 and dim % config.parallel.tensor:
            yield (
                f"parallel.tensor is {config.parallel.tensor}, which does not divide model.moe.{name} {dim}; use one "
                f"of {divisors(dim)}"
            )
    if moe.shared_gate and not moe.shared_dim:
        yield "model.moe.shared_gate is on, but there are no shared experts; set model.moe.shared_dim, or turn it off"
    if moe.capacity_factor and config.parallel.context not in (0, 1):
        yield (
            f"model.moe.capacity_factor is {moe.capacity_factor:g} with parallel.context {config.parallel.context}, "
            "but experts take tokens in the order of positions, which context parallelism changes; type "
            "model.moe.capacity_factor=0 (dropless), or parallel.context=1"
        )
    yield from _check_groups(moe)


def _check_groups(moe: MoeConfig) -> Iterator[str]:
    if moe.experts % moe.groups:
        yield (
            f"model.moe.groups is {moe.groups}, which does not divide model.moe.experts {moe.experts}; use one of "
            f"{divisors(moe.experts)}"
        )
        return
    size = moe.experts // moe.groups
    if moe.top_groups > moe.groups:
        yield f"model.moe.top_groups is {moe.top_groups}, but model.moe.groups is {moe.groups}; use at most that"
    elif moe.active > moe.top_groups * size:
        yield (
            f"model.moe.active is {moe.active}, but {moe.top_groups} groups (model.moe.top_groups) of {size} experts "
            f"have only {moe.top_groups * size}; raise top_groups, or lower active or groups"
        )
    if moe.groups > 1 and moe.router == "sigmoid" and size < 2:
        yield (
            "model.moe.router is 'sigmoid', which scores a group by its two best experts, but groups have one each; "
            f"type model.moe.groups={moe.experts // 2}"
        )
