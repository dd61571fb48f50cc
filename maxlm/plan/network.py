"""How long a collective takes, by a rule that is stated here and is the same for every plan.

A group of devices on a torus sends along every side of it that the group spans: along a closed side in both directions,
along an open one as fast as its end can, which is one. Between slices and nodes every device sends its own part, so a
group with g members in each of m slices has g network interfaces to a slice. Behind a switch a device has one link.
All sides are kept busy at once, and each step from device to device costs a fixed time besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from maxlm.plan.topology import Topology

HOP_SECONDS = {"tpu": 1e-6, "gpu": 3e-6, "cpu": 0.0}
"""Of one step of a ring: about what sums of a few bytes take on v5e (scaling-book, "Sharding") and under NCCL."""


class Span(NamedTuple):
    """How a group lies in the hardware.

    devices: in the group.
    slices: slices or nodes that it is spread over.
    lanes: links that a device of it can send on at once, counting both directions of a side as two.
    """

    devices: int
    slices: int
    lanes: float


def span(topology: Topology, places: Sequence[tuple[int, ...]]) -> Span:
    """The span of a group.

    Args:
      places: of each member: its slice, then its chip's coordinates along the torus (empty for switched devices).
    """
    slices = len({place[0] for place in places})
    if not topology.chip.torus_dims:
        return Span(len(places), slices, 1.0)
    lanes = 0.0
    for side, closed in enumerate(topology.wrapped):
        met = {place[1 + side] for place in places}
        if len(met) > 1:
            lanes += 2.0 if closed and len(met) == topology.shape[side] else 1.0
    return Span(len(places), slices, lanes or 1.0)  # the devices of one chip talk within it


def seconds(kind: str, payload: float, where: Span, topology: Topology) -> float:
    """Time of one collective.

    Args:
      kind: one of `collectives.KINDS`.
      payload: bytes of the whole array that is gathered, summed or exchanged.
    """
    chip = topology.chip
    if where.devices < 2 or not chip.link_bandwidth:
        return 0.0
    rounds = 2.0 if kind == "all-reduce" else 1.0
    inner = where.devices // where.slices
    time = 0.0
    if inner > 1:
        moved = payload if kind == "collective-permute" else payload * (inner - 1) / inner
        if "all-to-all" in kind and chip.torus_dims:
            moved /= 2 if where.lanes > 1 else 1  # parts go the shorter way round, a quarter of the ring on average
            moved *= max(inner ** (1 / max(where.lanes / 2, 1)) / 4, 1.0)
        time += rounds * moved / (chip.link_bandwidth * where.lanes)
    if where.slices > 1:
        across = payload if kind == "collective-permute" else payload * (where.slices - 1) / where.slices
        time += rounds * across / (chip.network_bandwidth * inner)
    return time + rounds * (where.devices - 1) ** 0.5 * HOP_SECONDS[chip.platform]
