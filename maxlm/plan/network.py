"""How long a collective takes, by a rule that is stated here and is the same for every plan.

A group of devices on a torus sends along every side of it that the group spans: along a closed side in both directions,
along an open one as fast as its end can, which is one. Between slices and nodes every device sends its own part, so a
group with g members in each of m slices has g network interfaces to a slice. Behind a switch a device has one link.
All sides are kept busy at once, and each step from device to device costs a fixed time besides.

An exchange of all with all is different: what a device has for a distant one goes over every link between them, so it
takes as long as the busiest link, the middle of the longest side. A permute hands all of it over one link.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from maxlm.plan.topology import Topology

HOP_SECONDS = {"tpu": 1e-6, "gpu": 3e-6, "cpu": 0.0}
"""Of one step of a ring: about what sums of a few bytes take on v5e (scaling-book, "Sharding") and under NCCL."""


class Span(NamedTuple):
    """How a group lies in the hardware.

    devices: in the group.
    slices: slices or nodes that it is spread over.
    sides: those of a slice's torus that it spans, each as (devices along it, whether it is closed to a ring); () for
      devices behind a switch or on one chip.
    """

    devices: int
    slices: int
    sides: tuple[tuple[int, bool], ...] = ()

    @property
    def lanes(self) -> float:
        """Links that a device of it can send on at once, counting both directions of a side as two."""
        return sum(2.0 if closed else 1.0 for _, closed in self.sides) or 1.0

    @property
    def steps(self) -> int:
        """Steps of its rings, of those that turn at once the longest ones after each other: slices after sides."""
        within = [size // 2 if closed else size - 1 for size, closed in self.sides]
        return sum(within or [self.devices // self.slices - 1]) + self.slices - 1

    @property
    def crowding(self) -> float:
        """Of an exchange of all with all, what the busiest link carries of what a device holds.

        In the middle of an open side meets what half of the devices has for the other half; a closed one has two
        middles. Behind a switch, what a device does not keep.
        """
        if not self.sides:
            inner = self.devices // self.slices
            return (inner - 1) / inner
        return max((size // 2) * ((size + 1) // 2) / size / (2 if closed else 1) for size, closed in self.sides)


def span(topology: Topology, places: Sequence[tuple[int, ...]]) -> Span:
    """The span of a group.

    Args:
      places: of each member: its slice, then its chip's coordinates along the torus (empty for switched devices).
    """
    slices = len({place[0] for place in places})
    if not topology.chip.torus_dims:
        return Span(len(places), slices)
    sides = []
    for side, closed in enumerate(topology.wrapped):
        met = len({place[1 + side] for place in places})
        if met > 1:
            sides.append((met, closed and met == topology.shape[side]))
    return Span(len(places), slices, tuple(sides))


def seconds(kind: str, payload: float, where: Span, topology: Topology) -> float:
    """Time of one collective.

    Args:
      kind: one of `collectives.KINDS`.
      payload: bytes of the whole array that is gathered or summed; of an exchange or a permute, those of a device.
    """
    if where.devices < 2:
        return 0.0
    chip = topology.chip
    link, network = (rate or math.inf for rate in (chip.link_bandwidth, chip.network_bandwidth))  # 0: it is not known
    inner, hop = where.devices // where.slices, HOP_SECONDS[chip.platform]
    if kind == "collective-permute":
        return payload / (link if where.slices == 1 else network) + hop
    time, across = 0.0, (where.slices - 1) / where.slices
    if "all-to-all" in kind:
        if inner > 1:
            time += payload / where.slices * where.crowding / link
        if where.slices > 1:
            time += payload * across / network
        return time + hop * (where.steps if where.sides else 1)
    if inner > 1:
        time += payload * (inner - 1) / inner / (link * where.lanes)
    if where.slices > 1:
        time += payload * across / (network * inner)
    return (time + where.steps * hop) * (2.0 if kind == "all-reduce" else 1.0)
