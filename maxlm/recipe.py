"""What a recipe of `configs/` says of the hardware that it was tuned for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from maxlm.config import ParallelConfig
from maxlm.errors import UserError


class RecipeError(UserError):
    """The recipe says nothing of the hardware that was asked for."""


class Place(NamedTuple):
    """Settings of a recipe that go with a topology.

    rows: of a step's batch.
    parallel: the mesh.
    kept: activations that the backward pass finds saved; (): block inputs alone.
    accumulation: microbatches of a step.
    """

    rows: int
    parallel: ParallelConfig
    kept: tuple[str, ...] = ()
    accumulation: int = 1

    @property
    def remat(self) -> str:
        """`train.remat` for what is kept."""
        return "+".join(self.kept) or "full"


def at(places: Mapping[str, Place], topology: str) -> Place:
    """The settings for a topology.

    Raises:
      RecipeError: there are none, with the topologies that there are.
    """
    if topology not in places:
        raise RecipeError(
            f"this recipe was not tuned for {topology!r}, but for {', '.join(places)}; take the nearest, with a "
            "mesh and a batch of your own, as in --config.parallel.fsdp=8 --config.data.batch_size=64"
        )
    return places[topology]
