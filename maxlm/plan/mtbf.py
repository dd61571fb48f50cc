"""What failures will cost a long run: its goodput, simulated with the interval policy that runs go by.

A run of n chips fails n times as often as one chip does, at random and independently of the past. It trains, stands
still for the begin of each save, and has the save committed some seconds later, beside the training. A failure costs
what was done since the last committed save, and the time until the run trains again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from maxlm.checkpoint.interval import best_interval

CHIPS = (256, 4096, 32768)
HOUR = 3600.0

# Where nothing was measured: from a device to its host (a fourth-generation PCIe link, half used), from a host to its
# store, and what a restart takes besides reading: noticing, scheduling, starting and a compiled program from the cache.
TO_HOST, TO_STORE, RESTART = 8e9, 1e9, 120.0


class Costs(NamedTuple):
    """Seconds of a run, all chips together.

    stall: that the training stands still for a save. write: from a save's begin to its commit. restart: from a failure
    to the first step after it, with what is restored.
    """

    stall: float
    write: float
    restart: float


class Outlook(NamedTuple):
    """mtbf: seconds between failures of the run. interval: seconds of training between saves. goodput: share of the
    time that went into steps which were not lost. saving, lost, down: shares of the rest.
    """

    chips: int
    mtbf: float
    interval: float
    goodput: float
    saving: float
    lost: float
    down: float


def costs_of(state_bytes: float, *, devices_per_host: int, stall: float = 0.0, write: float = 0.0) -> Costs:
    """The costs of a run by the rates above.

    Args:
      state_bytes: of a device.
      stall, write: measured seconds, which count instead; 0: none.
    """
    share = state_bytes * max(devices_per_host, 1)
    write = write or share / TO_STORE
    return Costs(stall or state_bytes / TO_HOST, write, RESTART + share / TO_STORE)


def interval(costs: Costs, mtbf: float) -> float:
    """Seconds of training between saves: the best one, but no save begins before the one before is committed."""
    return max(best_interval(costs.stall, mtbf), costs.write, 1.0)


def simulate(
    chips: int, costs: Costs, *, chip_mtbf: float, failures: int = 4000, every: float = 0.0, seed: int = 0
) -> Outlook:
    """A run that goes on until it has failed so many times.

    Args:
      chip_mtbf: mean seconds between failures of one chip, with its share of the host and the network.
      every: seconds of training between saves; 0: as `interval` says.
    """
    mtbf = chip_mtbf / chips
    every, draw = every or interval(costs, mtbf), random.Random(seed)
    useful = saving = lost = down = 0.0
    for _ in range(failures):
        left = draw.expovariate(1 / mtbf)  # until it fails, from the first step after a restart
        cycle = every + costs.stall
        begun = int(left // cycle)  # saves whose stall was gone through; the next is being waited for or begun
        rest = left - begun * cycle
        # A save is committed `write` after its stall began, if the run has not failed by then.
        committed = begun if not begun or rest + costs.stall >= costs.write else begun - 1
        useful += committed * every
        saving += begun * costs.stall + max(rest - every, 0.0)
        lost += (begun - committed) * every + min(rest, every)
        down += costs.restart
    wall = useful + saving + lost + down
    return Outlook(chips, mtbf, every, useful / wall, saving / wall, lost / wall, down / wall)


def outlooks(costs: Costs, *, chip_mtbf_hours: float, chips: Sequence[int] = CHIPS) -> list[Outlook]:
    """For each number of chips, with the costs of one run: chips are added with the hosts that write their shares."""
    return [simulate(count, costs, chip_mtbf=chip_mtbf_hours * HOUR) for count in chips]


def lines(costs: Costs, found: Sequence[Outlook]) -> list[str]:
    """For a person."""
    head = (
        f"a save holds the training up for {costs.stall:.1f} s and is committed after {costs.write:.0f} s; a restart "
        f"takes {costs.restart:.0f} s"
    )
    return [
        head,
        *(
            f"{one.chips:>7,} chips: a failure every {one.mtbf / HOUR:.2f} h, a save every {one.interval:,.0f} s: "
            f"goodput {one.goodput:.1%} (saving {one.saving:.1%}, work lost {one.lost:.1%}, down {one.down:.1%})"
            for one in found
        ),
    ]
