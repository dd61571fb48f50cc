"""The one table of accelerators: what a device computes, holds and sends a second, and who says so.

A device is what JAX calls one: a TPU7x chip is two of them, a v4 or v5p chip is one (its two TensorCores work as one).
All figures are of one device, in bytes, seconds and FLOP/s (a multiplication and an addition are two); rates of links
are one way. They are what vendors print, so no run reaches them. `float32` is that of products which keep all bits, as
those of MaxLM do (`kernels.matmul.precision_of`): six passes in bfloat16 on TPUs, and the units for FP32, not the
tensor cores' TF32, on NVIDIA GPUs.

Prices are of on-demand lists, a start where nobody has a better one: they differ by region and contract.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxlm.errors import UserError

TERA = 1e12
GIGA = 1e9
GIB = 2**30
MIB = 2**20

GPU_SHARE = 0.95
"""Of a GPU's memory, what runs take (`cli` tells JAX, which takes 0.75 unless told) and plans count with."""

FLOAT32_PASSES = 6
"""Products of bfloat16 parts by which a TPU's matrix units make one of float32 operands (`lax.Precision.HIGHEST`)."""

_CLOUD = "cloud.google.com/tpu/docs, page of the generation, read 2026-11"
_LIBTPU = "what libtpu 0.0.42 says is available when a program needs too much"
_PALLAS = "jax 0.10.2, jax/_src/pallas/mosaic/tpu_info.py"
_BOOK = "jax-ml.github.io/scaling-book/tpus"
_GCP_PRICE = "cloud.google.com/tpu/pricing, us regions on demand, 2025"
_AWS_PRICE = "aws.amazon.com/ec2 p4d, p4de, p5, p5en, p6-b200, us-east on demand, a GPU's eighth, 2025"
_NVIDIA = "NVIDIA data sheet of the SXM part; dense, half of what it prints with sparsity"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it; 0 stands for what is not known on paper and has to be measured.

    name: as in topologies: v5p, h100.
    platform: tpu, gpu or cpu.
    kinds: what `device.device_kind` may say.
    flops: FLOP/s by dtype of the operands (float32, bfloat16, int8, float8).
    hbm_bytes: memory, of which `usable_bytes` is left to programs.
    hbm_bandwidth: of that memory.
    link_bandwidth: of one link of the torus (TPU), or of a device into the switch of its node (GPU).
    torus_dims: 2 or 3; a device has a link in both directions of each. 0: a switch joins all devices of a host.
    network_bandwidth: of a device between slices or nodes.
    devices_per_host, devices_per_chip: devices that one host drives; devices in a chip.
    slice_chips: chips of the largest slice, where slices have one.
    named_per_chip: what the number in a slice's name counts in a chip: `v5p-128` has 128 TensorCores, two a chip.
    vmem_bytes: on-chip vector memory of a core, out of which kernels work.
    clock: cycles a second that the compiler's estimates are in.
    price: dollars an hour.
    like: of a chip that a user's file adds: the chip of the table that it is compiled for as.
    sources: figure -> where it is from.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    flops: Mapping[str, float]
    hbm_bytes: float
    usable_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    torus_dims: int
    network_bandwidth: float
    devices_per_host: int
    devices_per_chip: int = 1
    slice_chips: int = 0
    named_per_chip: int = 1
    vmem_bytes: float = 0.0
    clock: float = 0.0
    price: float = 0.0
    like: str = ""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The chip of the table that compilers are asked for."""
        return self.like or self.name

    def peak(self, dtype: str) -> float:
        """FLOP/s of products of operands of `dtype`; those of float16 are bfloat16's."""
        return self.flops["bfloat16" if dtype == "float16" else dtype]


def _tpu(name: str, kinds: tuple[str, ...], *, tflops: float, int8: float, gib: float, **figures: Any) -> Chip:
    sources = {
        "flops, hbm_bytes, hbm_bandwidth": _CLOUD,
        "usable_bytes": _LIBTPU,
        "link_bandwidth": f"{_CLOUD}: both ways over all links, divided by twice their number",
        "network_bandwidth": f"{_CLOUD}; v4: {_BOOK}",
        "slice_chips": f"{_CLOUD}: a pod; v5p: the largest job that can be scheduled, of a pod of 8960",
        "vmem_bytes": _PALLAS,
        "clock": "peak over the FLOPs that the matrix units do a cycle",
        "price": _GCP_PRICE,
    }
    whole = tflops * TERA
    rates = {"bfloat16": whole, "float32": whole / FLOAT32_PASSES, "int8": int8 * TERA, "float8": whole}
    figures = {"devices_per_host": 4, "sources": sources, "flops": rates, **figures}
    return Chip(name=name, platform="tpu", kinds=kinds, usable_bytes=gib * GIB, **figures)


def _gpu(
    name: str, kinds: tuple[str, ...], *, tflops: tuple[float, float, float, float], mib: float, **figures: Any
) -> Chip:
    """tflops: of FP32, bfloat16, int8, float8; mib: what nvidia-smi prints as the total."""
    sources = {
        "flops, hbm_bandwidth, link_bandwidth": _NVIDIA,
        "hbm_bytes": "nvidia-smi, memory.total",
        "usable_bytes": f"{GPU_SHARE} of the total, which the command line has JAX take (0.75 unless told)",
        "network_bandwidth": "one adapter a GPU in the vendor's reference nodes: 200 Gb/s (A100), 400 Gb/s (later)",
        "price": _AWS_PRICE,
    }
    rates = dict(zip(("float32", "bfloat16", "int8", "float8"), (rate * TERA for rate in tflops), strict=True))
    total = mib * MIB
    figures = {"devices_per_host": 8, "torus_dims": 0, "sources": sources, **figures}
    return Chip(
        name=name, platform="gpu", kinds=kinds, flops=rates, hbm_bytes=total, usable_bytes=GPU_SHARE * total, **figures
    )


def _variant(base: Chip, name: str, *kinds: str, **figures: Any) -> Chip:
    return dataclasses.replace(base, name=name, kinds=kinds, **figures)


_A100 = _gpu(
    "a100",
    ("NVIDIA A100-SXM4-80GB",),
    tflops=(19.5, 312.0, 624.0, 312.0),
    mib=81_920,
    hbm_bandwidth=2039 * GIGA,
    link_bandwidth=300 * GIGA,
    network_bandwidth=25 * GIGA,
    price=3.43,
)
_H100 = _gpu(
    "h100",
    ("NVIDIA H100 80GB HBM3",),
    tflops=(66.9, 989.4, 1978.9, 1978.9),
    mib=81_559,
    hbm_bandwidth=3350 * GIGA,
    link_bandwidth=450 * GIGA,
    network_bandwidth=50 * GIGA,
    price=6.88,
)
_PCIE: dict[str, Any] = {"link_bandwidth": 32 * GIGA, "price": 0.0}  # fourth generation, 16 lanes

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu(
            "v4",
            ("TPU v4",),
            tflops=275.0,
            int8=275.0,
            gib=30.75,
            hbm_bytes=32 * GIB,
            hbm_bandwidth=1228 * GIGA,
            link_bandwidth=50 * GIGA,
            torus_dims=3,
            network_bandwidth=6.25 * GIGA,
            slice_chips=4096,
            named_per_chip=2,
            vmem_bytes=16 * MIB,
            clock=1.049e9,
            price=3.22,
        ),
        _tpu(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            tflops=197.0,
            int8=394.0,
            gib=15.75,
            hbm_bytes=16 * GIB,
            hbm_bandwidth=819 * GIGA,
            link_bandwidth=50 * GIGA,
            torus_dims=2,
            network_bandwidth=3.125 * GIGA,
            slice_chips=256,
            vmem_bytes=128 * MIB,
            clock=1.503e9,
            price=1.20,
        ),
        _tpu(
            "v5p",
            ("TPU v5", "TPU v5p"),
            tflops=459.0,
            int8=918.0,
            gib=95.74,
            hbm_bytes=96 * GIB,
            hbm_bandwidth=2765 * GIGA,
            link_bandwidth=100 * GIGA,
            torus_dims=3,
            network_bandwidth=6.25 * GIGA,
            slice_chips=6144,
            named_per_chip=2,
            vmem_bytes=64 * MIB,
            clock=1.751e9,
            price=4.20,
        ),
        _tpu(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            tflops=918.0,
            int8=1836.0,
            gib=31.25,
            hbm_bytes=32 * GIB,
            hbm_bandwidth=1638 * GIGA,
            link_bandwidth=100 * GIGA,
            torus_dims=2,
            network_bandwidth=12.5 * GIGA,
            slice_chips=256,
            vmem_bytes=128 * MIB,
            clock=1.751e9,
            price=2.70,
        ),
        _tpu(
            "tpu7x",
            ("TPU7x",),
            tflops=1153.5,
            int8=1153.5,
            gib=94.75,
            flops={"bfloat16": 1153.5e12, "float32": 1153.5e12 / FLOAT32_PASSES, "int8": 1153.5e12, "float8": 2307e12},
            hbm_bytes=96 * GIB,
            hbm_bandwidth=3690 * GIGA,
            link_bandwidth=50 * GIGA,  # the chip's links have 100; two devices share them
            torus_dims=3,
            network_bandwidth=6.25 * GIGA,
            slice_chips=9216,
            devices_per_host=8,
            devices_per_chip=2,
            named_per_chip=2,
            vmem_bytes=64 * MIB,
            clock=2.2e9,
            price=6.00,
        ),
        _A100,
        _variant(
            _A100,
            "a100-40gb",
            "NVIDIA A100-SXM4-40GB",
            hbm_bytes=40_960 * MIB,
            usable_bytes=GPU_SHARE * 40_960 * MIB,
            hbm_bandwidth=1555 * GIGA,
            price=2.74,
        ),
        _variant(_A100, "a100-pcie", "NVIDIA A100 80GB PCIe", hbm_bandwidth=1935 * GIGA, **_PCIE),
        _variant(
            _A100,
            "a100-pcie-40gb",
            "NVIDIA A100-PCIE-40GB",
            hbm_bytes=40_960 * MIB,
            usable_bytes=GPU_SHARE * 40_960 * MIB,
            hbm_bandwidth=1555 * GIGA,
            **_PCIE,
        ),
        _H100,
        _gpu(
            "h100-pcie",
            ("NVIDIA H100 PCIe",),
            tflops=(51.2, 756.0, 1513.0, 1513.0),
            mib=81_559,
            hbm_bandwidth=2000 * GIGA,
            link_bandwidth=64 * GIGA,
            network_bandwidth=50 * GIGA,
        ),
        _variant(
            _H100,
            "h200",
            "NVIDIA H200",
            hbm_bytes=143_771 * MIB,
            usable_bytes=GPU_SHARE * 143_771 * MIB,
            hbm_bandwidth=4800 * GIGA,
            price=7.91,
        ),
        _gpu(
            "b200",
            ("NVIDIA B200",),
            tflops=(75.0, 2250.0, 4500.0, 4500.0),
            mib=183_359,
            hbm_bandwidth=8000 * GIGA,
            link_bandwidth=900 * GIGA,
            network_bandwidth=50 * GIGA,
            price=14.24,
        ),
        _gpu(
            "l4",
            ("NVIDIA L4",),
            tflops=(30.3, 121.0, 242.5, 242.5),
            mib=23_034,
            hbm_bandwidth=300 * GIGA,
            link_bandwidth=32 * GIGA,
            network_bandwidth=12.5 * GIGA,
        ),
        _gpu(
            "l40s",
            ("NVIDIA L40S",),
            tflops=(91.6, 362.0, 733.0, 733.0),
            mib=46_068,
            hbm_bandwidth=864 * GIGA,
            link_bandwidth=32 * GIGA,
            network_bandwidth=25 * GIGA,
        ),
        Chip(
            name="cpu",
            platform="cpu",
            kinds=("cpu",),
            flops={"float32": 0.0, "bfloat16": 0.0, "int8": 0.0, "float8": 0.0},
            hbm_bytes=0.0,
            usable_bytes=0.0,
            hbm_bandwidth=0.0,
            link_bandwidth=0.0,
            torus_dims=0,
            network_bandwidth=0.0,
            devices_per_host=0,
            sources={"all": "measured on the machine itself"},
        ),
    )
}


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls by this `device_kind`; None where the table has none."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def load_chips(path: str | Path) -> dict[str, Chip]:
    """The table with the chips of a JSON file added, or put in the place of those of the same name.

    The file holds `{"name": {"like": "h100", "hbm_bandwidth": 4e12, ...}}`: a chip of the table and what is different;
    `flops` may give only some dtypes.

    Raises:
      UserError: the file cannot be read, or names a chip, figure or dtype that there is not.
    """
    try:
        added = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the chips in {path} cannot be read ({error}); give a JSON file") from error
    table = dict(CHIPS)
    if not isinstance(added, dict) or not all(isinstance(figures, dict) for figures in added.values()):
        raise UserError(f'{path} holds no chips by name; write {{"name": {{"like": "h100", "hbm_bandwidth": 4e12}}}}')
    for name, figures in added.items():
        figures = dict(figures)
        like = str(figures.pop("like", name))
        if like not in table:
            raise UserError(
                f'{path}: {name} is like {like!r}, which is not in the table; use "like": one of {_names()}'
            )
        known = {field.name for field in dataclasses.fields(Chip)} - {"name", "platform", "like", "sources"}
        if unknown := set(figures) - known:
            raise UserError(
                f"{path}: {name} has {', '.join(sorted(unknown))}; known figures: {', '.join(sorted(known))}"
            )
        base = table[like]
        if wrong := [figure for figure, value in figures.items() if not _of_kind(value, getattr(base, figure))]:
            raise UserError(
                f"{path}: {name} has {wrong[0]}={figures[wrong[0]]!r}; write it as it is of {like}: "
                f"{getattr(base, wrong[0])!r}"
            )
        if odd := [dtype for dtype in figures.get("flops", ()) if dtype not in base.flops]:
            nearest = difflib.get_close_matches(odd[0], base.flops, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{path}: {name} has flops of {odd[0]!r}, which is no dtype of the table; type {nearest!r} (there are "
                f"{', '.join(base.flops)})"
            )
        if "flops" in figures:
            figures["flops"] = {**base.flops, **figures["flops"]}
        figures["kinds"] = tuple(figures.get("kinds", ()))
        figures["sources"] = {**base.sources, **{figure: str(path) for figure in figures if figure != "kinds"}}
        if "hbm_bytes" in figures and base.hbm_bytes:  # as large a part of it is left to programs, unless it is said
            figures.setdefault("usable_bytes", figures["hbm_bytes"] * base.usable_bytes / base.hbm_bytes)
        table[name.lower()] = dataclasses.replace(base, name=name.lower(), like=base.kind, **figures)
    return table


def _of_kind(value: Any, known: Any) -> bool:
    """Whether it can stand where the table has `known`: a number, numbers by name, or words in a row."""
    if isinstance(known, Mapping):
        return isinstance(value, dict) and all(_of_kind(part, 0.0) for part in value.values())
    if isinstance(known, tuple):
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names() -> str:
    return ", ".join(CHIPS)
