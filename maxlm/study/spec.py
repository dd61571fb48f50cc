"""What a study file says: a base config, rules, a design of runs, and the machine they are for.

A study file is Python with one function, `get_study()`, which returns a `Study`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxlm.config import Config
from maxlm.errors import UserError
from maxlm.pythonfile import load, told
from maxlm.study.ladder import Rules, Shape


class StudyError(UserError):
    """A study that cannot be planned, run or judged as asked; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Isoflops:
    """Slices of equal compute: at each budget several sizes, each trained for what the budget leaves.

    budgets: causal-exact training FLOPs.
    sizes: parameters besides embeddings over those of the size that the rules expect to be best (`shape_by_flops`).
    """

    budgets: tuple[float, ...]
    sizes: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Rungs:
    """One run for each value of a dial: `depth` (layers), `params` (besides embeddings) or `flops`."""

    dial: str
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Trunks:
    """For each size a warmup-stable-decay trunk, and for each token count a cooldown that branches off it.

    Hu et al. 2024 (MiniCPM, arXiv 2404.06395), Hägele et al. 2024 (arXiv 2405.18392). `params` are parameters besides
    embeddings.
    """

    params: tuple[float, ...]
    tokens: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All combinations of shapes, rules and settings, trained for the same number of tokens.

    settings: values by the dotted path of a config leaf, e.g. {"optim.peak_lr": (1e-3, 2e-3), "seed": (0, 1)}; also
      data.batch_size, optim.weight_decay or data.mixture. Under the transfer rule optim.peak_lr is that of the base
      width.
    rules: `ladder.RULES` that are tried; none: that of the study's rules.
    """

    shapes: tuple[Shape, ...]
    tokens: float
    settings: Mapping[str, tuple[Any, ...]]
    rules: tuple[str, ...] = ()


Design = Isoflops | Rungs | Trunks | Sweep


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run costs.

    flops_per_second: causal-exact training FLOPs that the whole machine does in a second at these sizes, all its jobs
      together; measure it, or see docs/performance.md.
    overhead_seconds: of a run: start, compilation and the evaluation at its end. What is compiled is kept
      (`train.compilation_cache`), so that runs of one shape, rule and batch pay for it once: give that of a later one.
    jobs: runs at a time, which share the machine's cores out; on accelerators 1, as a run takes them all.
    devices: of a run, on all its hosts: batches are rounded to be cut over them.
    """

    name: str = "this machine"
    flops_per_second: float = 50e9
    overhead_seconds: float = 15.0
    dollars_per_hour: float = 0.0
    jobs: int = 1
    devices: int = 1


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, whole. `base.model`'s shape, the batch, the rate and the steps are set by the rules and the design.

    coordinate_widths: widths of the coordinate check in the report; empty: none is made.
    """

    name: str
    base: Config
    rules: Rules
    design: Design
    machine: Machine = dataclasses.field(default_factory=Machine)
    coordinate_widths: tuple[int, ...] = ()


def load_study(path: str | Path) -> Study:
    """The study of a file.

    Raises:
      UserError: the file cannot be loaded, or has no `get_study()` that returns a Study.
    """
    path = Path(path)
    maker = getattr(load(path), "get_study", None)
    with told(path):
        study = maker() if callable(maker) else None
    if not isinstance(study, Study):
        raise StudyError(f"{path} has no function get_study() that returns a maxlm.study.spec.Study")
    return study
