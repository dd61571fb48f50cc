"""Names of hardware, such as `v5p-128`, `2*v6e-256` or `h100x8x16`, and what they stand for.

The number in a slice's name counts TensorCores on v4, v5p and tpu7x, two a chip (`v5p-128` is 64 chips), and chips on
v5e and v6e: that is how Cloud TPU names them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from maxlm.chips import CHIPS, Chip
from maxlm.errors import UserError

FORMS = (
    "v5p-128 or v5p:4x4x4 (also v4, v5e, v6e, tpu7x), 2*v5p-128 for two slices, h100x8 for a node of eight GPUs (also "
    "a100, h200, b200), h100x8x16 for sixteen such nodes, cpu-8 for eight virtual CPU devices"
)
CUBE = 4  # chips along each side of the blocks that larger slices of a 3D torus are made of
SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}  # slices of less than a cube
FLAT = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7x": "tpu7x", "7x": "tpu7x", "ironwood": "tpu7x"}


class TopologyError(UserError):
    """The name stands for no hardware that is known."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices and how they are joined.

    name: as it was given.
    chip: what a device is.
    slices: parts that only the slow network joins: TPU slices, or GPU nodes.
    shape: chips along each side of a slice's torus; (devices of a node,) for GPUs and CPUs.
    """

    name: str
    chip: Chip
    slices: int
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of one slice or node."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def devices(self) -> int:
        """JAX devices, all told."""
        return self.slices * self.devices_per_slice

    @property
    def hosts(self) -> int:
        """Hosts that drive them."""
        return self.slices * math.ceil(self.devices_per_slice / (self.chip.devices_per_host or self.devices_per_slice))

    @property
    def wrapped(self) -> tuple[bool, ...]:
        """Which sides of a slice's torus are closed to a ring.

        A 3D slice of whole cubes is closed all round; of a 2D one, a side of 16 chips is.
        """
        if self.chip.torus_dims == 3:
            return tuple(all(size % CUBE == 0 for size in self.shape) for _ in self.shape)
        return tuple(size == 16 for size in self.shape) if self.chip.torus_dims == 2 else (False,)

    def describe(self) -> str:
        """In words: "64 v5p chips (4 x 4 x 4 torus), 16 hosts"."""
        what = "devices" if self.chip.platform == "cpu" else "chips" if self.chip.platform == "tpu" else "GPUs"
        parts = [f"{self.chips} {self.chip.name} {what}"]
        if self.chip.torus_dims:
            sides = " x ".join(map(str, self.shape))
            ring = "torus" if all(self.wrapped) else "mesh"
            each = f"{self.slices} slices, each a " if self.slices > 1 else ""
            parts[0] += f" ({each}{sides} {ring})"
        elif self.slices > 1:
            parts[0] += f" ({self.slices} nodes of {self.shape[0]})"
        if self.devices != self.chips:
            parts.append(f"{self.devices} JAX devices")
        return ", ".join([*parts, f"{self.hosts} host{'s' if self.hosts > 1 else ''}"])


def parse_topology(text: str, chips: Mapping[str, Chip] = CHIPS) -> Topology:
    """The hardware of a name.

    Args:
      text: in one of the forms of the module's docstring.
      chips: the table, as of `chips.load_chips` where there are more.

    Raises:
      TopologyError: no such chip, form or size, with the forms there are and the sizes near by.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*\*\s*)?(.+?)\s*", text.lower())
    slices, rest = (int(match[1] or 1), match[2]) if match else (1, "")
    chip, size = _split(rest, chips)
    if chip is None or slices < 1 or not size:
        raise TopologyError(f"{text!r} is no topology; type {FORMS}")
    if chip.torus_dims:
        shape = _torus(text, chip, size)
    else:
        numbers = [int(number) for number in re.findall(r"\d+", size)]
        if not re.fullmatch(r"[x-]\d+(x\d+)?", size) or len(numbers) > 2 or min(numbers) < 1:
            raise TopologyError(f"{text!r} is no topology; type {chip.name}x8, or {chip.name}x8x16 for 16 nodes")
        if len(numbers) == 2 and slices > 1:
            raise TopologyError(f"{text!r} gives the number of nodes twice; type {chip.name}x8x16")
        most, count = chip.devices_per_host, numbers[0] * math.prod(numbers[1:]) * slices
        if most and numbers[0] > most:
            raise TopologyError(
                f"{text!r} has {numbers[0]} GPUs in a node, and a node of {chip.name} holds {most}; type "
                f"{chip.name}x{most}x{-(-count // most)}"
            )
        slices, shape = numbers[1] if len(numbers) == 2 else slices, (numbers[0],)
    return Topology(name=text.strip(), chip=chip, slices=slices, shape=shape)


def _split(text: str, chips: Mapping[str, Chip]) -> tuple[Chip | None, str]:
    """The chip whose name the text begins with, the longest first, and what is left."""
    names = {name: name for name in chips} | ALIASES
    for name in sorted(names, key=len, reverse=True):
        if text.startswith(name) and text[len(name) :][:1] in ("-", ":", "x"):
            return chips[names[name]], text[len(name) :]
    return None, ""


def _torus(text: str, chip: Chip, size: str) -> tuple[int, ...]:
    sides, count = re.fullmatch(r":(\d+(?:x\d+)*)", size), re.fullmatch(r"-(\d+)", size)
    shape: tuple[int, ...] = ()
    if sides:
        shape = tuple(map(int, sides[1].split("x")))
        if len(shape) != chip.torus_dims or min(shape) < 1:
            example = f"{chip.name}:{'4x4x4' if chip.torus_dims == 3 else '16x16'}"
            raise TopologyError(
                f"{text!r} has {len(shape)} sides; a {chip.name} slice has {chip.torus_dims}, as in {example}"
            )
        chips, odd = math.prod(shape), 0
    elif count:
        chips, odd = divmod(int(count[1]), chip.named_per_chip)
    else:
        raise TopologyError(f"{text!r} is no topology; type {FORMS}")
    if chip.slice_chips and chips > chip.slice_chips:
        largest = f"{chip.name}-{chip.slice_chips * chip.named_per_chip}"
        raise TopologyError(
            f"{text!r} is a slice of {chips} chips, and the largest of {chip.name} has {chip.slice_chips} ({largest}); "
            f"for several slices type 2*{largest}"
        )
    if sides:
        if not _is_slice(shape):
            known = ", ".join("x".join(map(str, flat)) for flat in FLAT.values())
            which = known if chip.torus_dims == 2 else "with sides of 1, 2 or multiples of 4, such as 2x2x4 or 4x4x8"
            raise TopologyError(f"there is no slice {text!r}; those of {chip.name} are {which}")
        return shape
    shape = () if odd else _shape(chip, chips)
    if not shape:
        near = ", ".join(f"{chip.name}-{n * chip.named_per_chip}" for n in _sizes_near(chip, chips))
        counted = "chips" if chip.named_per_chip == 1 else "TensorCores, two a chip"
        raise TopologyError(f"there is no slice {text!r} (the number counts {counted}); the nearest are {near}")
    return shape


def _is_slice(shape: tuple[int, ...]) -> bool:
    """Whether a slice has these sides: 2D slices are listed, 3D ones are made of parts of a cube or of whole cubes."""
    if len(shape) == 2:
        return shape in FLAT.values()
    return all(side in (1, 2) or side % CUBE == 0 for side in shape)


def _shape(chip: Chip, chips: int) -> tuple[int, ...]:
    """The sides of a slice that is named by its size: as near to a cube or square as they come; () if there is none."""
    if chip.torus_dims == 2:
        return FLAT.get(chips, ())
    if chips in SMALL or chips % CUBE**3 or not chips:
        return SMALL.get(chips, ())
    cubes = chips // CUBE**3
    sides = [
        (a, b, cubes // (a * b))
        for a in range(1, round(cubes ** (1 / 3)) + 1)
        for b in range(a, math.isqrt(cubes // a) + 1)
        if cubes % (a * b) == 0
    ]
    return tuple(CUBE * side for side in min(sides, key=sum))


def _sizes_near(chip: Chip, chips: int) -> list[int]:
    cubes = (1, 2, 4, 8, 16, 32, 64, 96, 144)
    known = list(FLAT) if chip.torus_dims == 2 else [*SMALL, *(CUBE**3 * count for count in cubes)]
    known = [size for size in known if not chip.slice_chips or size <= chip.slice_chips]
    return sorted(sorted(known, key=lambda size: abs(math.log(size / max(chips, 1))))[:3])
