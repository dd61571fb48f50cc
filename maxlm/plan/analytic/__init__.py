"""The analytical model of a step: bytes and seconds from the config alone, without compiling anything.

An `Estimator` judges thousands of configs a second, once the step has been traced for a model and a remat policy, which
takes a few seconds for each.
"""

from __future__ import annotations

from typing import NamedTuple

from maxlm.config import Config
from maxlm.plan.analytic.backends import names_results
from maxlm.plan.analytic.memory import Facts, Memory, facts, memory
from maxlm.plan.analytic.timing import Time, step_time
from maxlm.plan.topology import Topology
from maxlm.train.outlook import at_heaviest


class Estimate(NamedTuple):
    """memory, time: on one device. room: bytes that are left of what a program may use; below nought: it does not fit.

    tokens_per_second: of all devices.
    """

    memory: Memory
    time: Time
    room: float
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.room >= 0


class Estimator:
    """Estimates configs that share a model and an optimizer; each remat policy is traced once.

    The configs are resolved, with whole meshes of as many devices as the hardware has. Of phases the
    heaviest is judged.
    """

    def __init__(self, config: Config, topology: Topology, *, usable: float = 0.0):
        """With the model and optimizer of `config`.

        Args:
          usable: bytes of a device that a program may use; 0: as the chip table says.
        """
        self._config, self._topology = config, topology
        self._usable = usable or topology.chip.usable_bytes
        self._known: dict[tuple, Facts] = {}

    def __call__(self, config: Config) -> Estimate:
        """The estimate of one."""
        config = at_heaviest(config)
        known = self._facts(config)
        held, time = memory(config, known), step_time(config, self._topology, known)
        tokens = config.data.batch_size * config.data.sequence_length
        return Estimate(held, time, self._usable - held.total, tokens / time.total if time.total else 0.0)

    def _facts(self, config: Config) -> Facts:
        train, parallel, base = config.train, config.parallel, self._config
        if config.model is not base.model and config.model != base.model:
            raise ValueError("an Estimator is for one model; make another for another")
        key = (
            *(train.remat, train.precision, train.reduce_dtype, train.accumulation > 1),
            *(parallel.pipeline > 1, parallel.context > 1, config.optim.moments_dtype),
        )
        if key not in self._known:
            self._known[key] = facts(config, named=names_results(config, self._topology.chip.platform))
        return self._known[key]


def estimate(config: Config, topology: Topology, *, usable: float = 0.0) -> Estimate:
    """The estimate of one config; arguments as of `Estimator`."""
    return Estimator(config, topology, usable=usable)(config)
