"""What a step holds and moves, operation by operation, with sizes as symbols.

`dissect` walks the traced step (`plan/trace.py`) once and keeps, for every moment that could be the fullest, how many
arrays of which size and role are alive; and the products, memory traffic and gathers of the whole step. `memory.py` and
`timing.py` then put in the numbers of a mesh, a batch and a chip, for thousands of them at once.

XLA's own doings are met half-way by a few rules, the same for every model:

- Elementwise operations are part of whatever uses their results. A result is an array of its own where a product, a
  kernel or a loop takes it, or where several users would otherwise keep more alive than it takes itself.
- A product's result in float32 that is cast at once exists in the narrow dtype alone.
- Weights are cast once a step, as a whole stack, and gathered from `fsdp` a layer at a time, in the compute dtype.
- A weight's gradient is whole for a moment, before it is scattered to `fsdp`.
- Loops hand on their sums in place, and write what they stack straight into the stack.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from maxlm.config import Config, DataConfig
from maxlm.plan.analytic.symbols import Proxy, Sizes, proxy
from maxlm.plan.analytic.trace import flatten, step_program
from maxlm.plan.analytic.walk import KINDS, ONE, ROLES, Held, Walker, Work


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What `dissect` finds.

    held: the kinds of arrays. moments: (moments, held) how many of each are alive. places: what each moment is of.
    work: what is done.
    """

    held: tuple[Held, ...]
    moments: np.ndarray
    places: tuple[str, ...]
    work: tuple[Work, ...]

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Of `held`."""
        return Sizes([held.size for held in self.held])

    @functools.cached_property
    def roles(self) -> np.ndarray:
        """(held, ROLES): 1.0 in the column of each one's role."""
        return np.array([[held.role == role for role in ROLES] for held in self.held], float)

    @functools.cached_property
    def amounts(self) -> Sizes:
        """Of `work`, over the whole step; some may be below nought, and are taken from others of their kind."""
        return Sizes([work.size.by(work.trips) for work in self.work])

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """(KINDS, work): 1.0 where the work is of that kind."""
        return np.array([[work.kind == kind for work in self.work] for kind in KINDS], float)


def dissect(config: Config, *, named: bool = True) -> Anatomy:
    """The anatomy of a resolved config's step; one for all meshes, batches, lengths, depths and widths.

    Args:
      named: whether the attention kernel names its results for remat.
    """
    plain, optim = Config(), config.optim
    shaped = {name: getattr(optim, name) for name in ("optimizer", "moments_dtype", "b1", "ema_decay", "clip_norm")}
    train = dataclasses.replace(
        plain.train,
        precision=config.train.precision,
        reduce_dtype=config.train.reduce_dtype,
        remat=config.train.remat,
        accumulation=1 if config.parallel.pipeline > 1 else config.train.accumulation,
    )
    traced = proxy(
        dataclasses.replace(
            plain,
            model=config.model,
            optim=dataclasses.replace(plain.optim, **shaped),
            train=train,
            data=DataConfig(mask_documents=config.data.mask_documents),
        )
    )
    key = (traced.config.model, traced.config.optim, traced.config.train, config.data.mask_documents, named)
    if key not in _DISSECTED:
        _DISSECTED[key] = _dissect(traced, named)
    return _DISSECTED[key]


_DISSECTED: dict[tuple, Anatomy] = {}


def _dissect(traced: Proxy, named: bool) -> Anatomy:
    program = flatten(step_program(traced, named=named).jaxpr)
    train = traced.config.train
    walker = Walker(traced.primes, accumulation=train.accumulation, reduced=jnp.dtype(train.reduce_dtype).itemsize)
    moments = walker.walk(program, ONE, outer=True)
    kinds = sorted({held for _, counts in moments for held in counts})
    place = {held: i for i, held in enumerate(kinds)}
    table = np.zeros((len(moments), len(kinds)), np.float32)
    for row, (_, counts) in enumerate(moments):
        for held, count in counts.items():
            table[row, place[held]] = count
    unique, first = np.unique(table, axis=0, return_index=True)
    return Anatomy(tuple(kinds), unique, tuple(moments[i][0] for i in first), tuple(walker.work))
