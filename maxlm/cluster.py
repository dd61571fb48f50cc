"""Several processes as one program: finding the others, and agreeing on when to stop.

A process that gets a signal must not leave by itself: the others would wait for it in the next collective for ever.
With each step goes a flag of every device, and a process leaves when the sum that all of them read says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.errors import UserError


class Cluster(NamedTuple):
    """Which processes make up the program, and how that was found out.

    coordinator: host:port of process 0, and the numbers of processes and of this one; all None where JAX reads them
      from the scheduler's own environment.
    """

    why: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def detect(
    environment: Mapping[str, str], *, coordinator: str | None, processes: int | None, process: int | None
) -> Cluster | None:
    """The cluster that was asked for, or else the one whose scheduler started this process; None: a lone process.

    Raises:
      UserError: only a part of the three was given, or they contradict each other.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if any(value is not None for value in given.values()):
        if missing := [name for name, value in given.items() if value is None]:
            raise UserError(f"{' and '.join(missing)} is missing; --coordinator, --processes and --process go together")
        assert coordinator is not None and processes is not None and process is not None
        if ":" not in coordinator:
            raise UserError(f"--coordinator is {coordinator!r}; give host:port of process 0, as in 10.0.0.1:1234")
        if not 0 <= process < processes:
            raise UserError(f"--process is {process} of --processes={processes}; number them from 0 to {processes - 1}")
        return Cluster(f"process {process} of {processes}, as the flags say", coordinator, processes, process)
    several = [
        ("SLURM_NTASKS", "SLURM_PROCID", "SLURM"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "Open MPI"),
    ]
    for size, rank, name in several:
        # A shell on a node of an allocation has the size but no step of its own; only srun and mpirun set both.
        if rank in environment and int(environment.get(size, "1")) > 1:
            return Cluster(f"process {environment[rank]} of {environment[size]}, as {name} says ({rank}, {size})")
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1:
        return Cluster(f"one of {len(hosts)} TPU hosts (TPU_WORKER_HOSTNAMES)")
    return None


def join(
    *, coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> str:
    """Connects this process to the others, if there are any, and says in a line what was found and why.

    Call it before anything asks JAX for its devices.

    Raises:
      UserError: as of `detect`, or the others did not come within `timeout` seconds.
    """
    found = detect(os.environ, coordinator=coordinator, processes=processes, process=process)
    if found is None:
        return ""
    try:
        jax.distributed.initialize(found.coordinator, found.processes, found.process, initialization_timeout=timeout)
    except RuntimeError as error:
        where = found.coordinator or "the scheduler's first process"
        raise UserError(
            f"{found.why}: not all processes met at {where} within {timeout} s ({str(error).splitlines()[0]}); see "
            "that every one was started and that the address can be reached from all hosts"
        ) from error
    return f"{found.why}; this is process {jax.process_index()} of {jax.process_count()}"


class Agreement:
    """A flag of each process, summed over all without waiting: what is told in one step is read in the next.

    With one process it is read at once and costs nothing.
    """

    def __init__(self, mesh: Mesh):
        self._several = jax.process_count() > 1
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._sum = jax.jit(jnp.sum, out_shardings=everywhere)
        self._told: jax.Array | None = None

    def tell(self, flag: bool) -> bool:
        """Adds this process's flag of this step; returns whether any process's was set at the step before.

        Every process has to call it at every step. The returned value is the same on all of them.
        """
        if not self._several:
            return flag
        before = self._told
        size = self._sharding.mesh.size
        mine = np.array([flag], np.int32)
        flags = jax.make_array_from_callback((size,), self._sharding, lambda _: mine)
        self._told = self._sum(flags)
        return before is not None and bool(jax.device_get(before))
