"""Several processes as one program: finding the others, reading the same data, and agreeing on when to stop.

A process that gets a signal must not leave by itself: the others would wait for it in the next collective for ever.
With each step goes a flag of every device, and a process leaves when the sum that all of them read says so.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import cloud_tpu_init, clusters, distributed
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.errors import UserError
from maxlm.heartbeat import SILENCE_SECONDS, Heartbeat
from maxlm.rollcall import JOIN_SECONDS, Absent, Place, roll_call

_JAX_SILENCE = 100  # seconds after which JAX ends the others itself, without a name: ours has to come first
_PATIENCE = 7200  # seconds: whoever dies meanwhile is noticed by the heartbeat
_meetings: Counter[str] = Counter()  # the coordinator knows a meeting by its number
_DONE = "done: "  # begins what `done_first` tells: what follows went wrong
_OPEN_MPI = "Open MPI"
_LINE = 1024  # bytes that each process contributes to `agree_on`


class Cluster(NamedTuple):
    """Which processes make up the program, and how that was found out.

    coordinator: host:port of process 0, and the numbers of processes and of this one; all None where JAX reads them
      from the scheduler's own environment.
    """

    why: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


class Joined(NamedTuple):
    """Being one of several: what was found and why, in a line, the watch over them, and the call that connects JAX.

    For a lone process the line is empty, the watch has nobody to watch and nothing is connected.
    """

    why: str
    heartbeat: Heartbeat
    connect: Callable[[], None] = lambda: None

    def run(self, work: Callable[[], int]) -> int:
        """Does this process's part and gives its exit code; if one fails or is lost, all leave (see `Heartbeat`)."""

        def whole() -> int:
            self.connect()  # watched: JAX waits for one that dies meanwhile, and then ends this process from C++
            code = work()
            if self.why:
                meet("the end")  # process 0 writes the report alone; JAX waits five minutes, then ends all with SIGABRT
                jax.distributed.shutdown()  # waits for the others, whom the heartbeat still watches
            return code

        return self.heartbeat.run(whole)


def detect(
    environment: Mapping[str, str],
    *,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    tpu_vm_hosts: int = 0,
) -> Cluster | None:
    """The cluster that was asked for, or else the one whose scheduler started this process; None: a lone process.

    Args:
      tpu_vm_hosts: how many hosts the metadata of this TPU VM names; 0 on any other machine.

    Raises:
      UserError: only a part of the three was given, or they contradict each other.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if any(value is not None for value in given.values()):
        if missing := [name for name, value in given.items() if value is None]:
            raise UserError(f"{' and '.join(missing)} is missing; --coordinator, --processes and --process go together")
        assert coordinator is not None and processes is not None and process is not None
        if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
            raise UserError(f"--coordinator is {coordinator!r}; give host:port of process 0, as in 10.0.0.1:1234")
        if not 0 <= process < processes:
            raise UserError(f"--process is {process} of --processes={processes}; number them from 0 to {processes - 1}")
        return Cluster(f"process {process} of {processes}, as the flags say", coordinator, processes, process)
    several = [
        # The script of an allocation has number and size as well; only what srun starts has a step of its own.
        ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", _OPEN_MPI),
    ]
    for size, rank, own, name in several:
        if rank in environment and own in environment and int(environment.get(size, "1")) > 1:
            return Cluster(f"process {environment[rank]} of {environment[size]}, as {name} says ({rank}, {size})")
    # TPU pods come before other pods of a JobSet: libtpu numbers its hosts itself, and JAX has to number them alike.
    # Of the two variables JAX takes the first that there is, too.
    name = "TPU_PROCESS_ADDRESSES" if "TPU_PROCESS_ADDRESSES" in environment else "TPU_WORKER_HOSTNAMES"
    hosts = [host for host in environment.get(name, "").split(",") if host]
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * slices > 1:
        of_slices = f" in each of {slices} slices" if slices > 1 else ""
        return Cluster(f"one of {len(hosts)} TPU hosts{of_slices} ({name})")
    if "JOBSET_COORDINATOR" in environment and "JOB_COMPLETION_INDEX" in environment:
        return _of_jobset(environment)
    if tpu_vm_hosts > 1:
        return Cluster(f"one of {tpu_vm_hosts} TPU VM hosts (metadata of this machine)")
    return None


def _of_jobset(environment: Mapping[str, str]) -> Cluster | None:
    """The place of an indexed pod, from the variables that launch/gke.py puts into its manifest."""
    names = ("JOBSET_PROCESSES", "JOBSET_HOSTS_PER_JOB", "JOBSET_JOB_INDEX", "JOB_COMPLETION_INDEX")
    try:
        processes, hosts, job, index = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"JOBSET_COORDINATOR is set, but not all of {', '.join(names)} are numbers ({error}); "
            "make the manifest with launch/gke.py"
        ) from error
    if processes == 1:
        return None
    number = job * hosts + index
    why = f"process {number} of {processes}, pod {index} of job {job}, as the JobSet says"
    return Cluster(why, environment["JOBSET_COORDINATOR"], processes, number)


def _tpu_vm_hosts() -> int:
    """How many hosts of all slices the metadata of this TPU VM names; 0 elsewhere, without asking the network."""
    if not cloud_tpu_init.running_in_cloud_tpu_vm or not GceTpuCluster.is_env_present():
        return 0
    return GceTpuCluster.get_process_count()


def join(
    facts: Mapping[str, str],
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = JOIN_SECONDS,
    silence: float = SILENCE_SECONDS,
    log: Callable[[str], None],
) -> Joined:
    """Finds the others, if there are any, and compares what all are about to run; JAX is connected by `Joined.run`.

    Call it before anything asks JAX for its devices. JAX_COORDINATOR_BIND_ADDRESS says where process 0 listens.

    Args:
      facts: What every process has to have in common, by name (`rollcall.run_facts`).
      timeout: Seconds to wait for the others; half of them at most for the name of process 0 to be known.
      silence: Seconds without a sign of life after which one of them counts as lost.
      log: Takes a line before each wait, with what was found and why, and one when all are there.

    Raises:
      UserError: as of `detect`; or the others run something else.
      Absent: they did not come within `timeout` seconds.
    """
    found = detect(
        os.environ, coordinator=coordinator, processes=processes, process=process, tpu_vm_hosts=_tpu_vm_hosts()
    )
    if found is None:
        return Joined("", Heartbeat())
    where, size, number, devices = found.coordinator, found.processes, found.process, None
    began = time.monotonic()
    if where is None:
        log(f"{found.why}; looking up where process 0 is, for up to {timeout / 2:.0f} s")
        try:
            where, size, number, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, int(timeout / 2)
            )
        except RuntimeError as error:  # the name of process 0's host, or this machine's metadata, is not there
            raise Absent(
                f"this is {found.why}, but JAX did not find process 0 within {time.monotonic() - began:.0f} s "
                f"({error}); see that it was started, and that its name can be looked up from {socket.gethostname()}"
            ) from error
    if where is None or size is None or number is None:
        hint = " (of Open MPI it knows versions up to 4)" if _OPEN_MPI in found.why else ""
        raise UserError(
            f"{found.why}, but JAX does not find its place in it{hint}; give --coordinator, --processes, --process"
        )
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    left = max(timeout - (time.monotonic() - began), timeout / 2)
    log(f"{found.why}; waiting up to {left:.0f} s for the others at {where}")
    lines = roll_call(Place(where, size, number, bind), facts, timeout=left)
    connect = functools.partial(
        jax.distributed.initialize,
        where,
        size,
        number,
        devices,
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=max(_JAX_SILENCE, int(2 * silence)),
    )
    why = f"{found.why}; this is process {number} of {size}, process 0 is at {where}"
    log(why)
    return Joined(why, Heartbeat(lines, process=number, limit=silence), connect)


def meet(where: str) -> None:
    """Waits until all processes are here, however long they take: what comes next may not wait as long.

    Only process 0 keeps compiled programs, so it is ahead of the others after a restart; gloo gives up after 30 s.
    """
    if jax.process_count() > 1:
        _meetings[where] += 1
        client = distributed.global_state.client
        assert client is not None  # there are several processes
        client.wait_at_barrier(f"maxlm: {where} {_meetings[where]}", timeout_in_ms=_PATIENCE * 1000)


def say_here(line: str) -> None:
    """Says on the standard error, with number and host, what concerns this process alone: process 0 has the log."""
    print(f"maxlm: process {jax.process_index()} on {socket.gethostname()}: {line}", file=sys.stderr, flush=True)


def agree_on(what: str, mine: str | UserError) -> None:
    """Compares a short text of every process, in a collective that each of them has to enter.

    Args:
      what: Name of the thing, for the message.
      mine: What this process has, or the error that kept it from having it.

    Raises:
      UserError: on every process: one had an error, or another text than most; with its number and host.
    """
    if jax.process_count() == 1:
        if isinstance(mine, UserError):
            raise mine
        return
    failed = isinstance(mine, UserError)
    line = np.zeros((_LINE,), np.uint8)
    text = f"{int(failed)}\0{socket.gethostname()}\0{mine}".encode()[:_LINE]
    line[: len(text)] = np.frombuffer(text, np.uint8)
    meet(what)  # one of them may come much later: it prepares the data, say
    lines = multihost_utils.process_allgather(line)
    if isinstance(mine, UserError):
        raise mine
    entries = [bytes(row).rstrip(b"\0").decode(errors="replace").split("\0", 2) for row in lines]
    problems = [
        f"process {number} on {host} has none: {text}" for number, (bad, host, text) in enumerate(entries) if bad == "1"
    ]
    if not problems:
        expected = Counter(text for _, _, text in entries).most_common(1)[0][0]
        problems = [
            f"process {number} on {host} has {text}, the others {expected}"
            for number, (_, host, text) in enumerate(entries)
            if text != expected
        ]
    if problems:
        raise UserError(f"the processes do not have the same {what}: {'; '.join(problems[:8])}")


def told(mine: bytes, *, source: bool) -> bytes:
    """What one of the processes has, on all of them; each has to enter.

    Args:
      mine: read on that process alone.
      source: whether this is the one.
    """
    if jax.process_count() == 1:
        return mine
    meet("told")  # the one that knows may have had to look for long
    with jax.transfer_guard("allow"):  # meant, whatever the training loop guards against
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine)), is_source=source))
        text = np.zeros(size, np.uint8)
        if source:
            text[:] = np.frombuffer(mine, np.uint8)
        everyones = multihost_utils.broadcast_one_to_all(text, is_source=source)
    return np.asarray(everyones, np.uint8).tobytes()


def decided(decide: Callable[[], Any], *, error: type[UserError] = UserError) -> Any:
    """What process 0 finds, on all processes, each of which has to call it.

    What processes look up for themselves, in a folder above all, may differ for a moment, and with it the collectives
    that they enter next.

    Args:
      decide: called by process 0; gives what JSON can hold.
      error: what the other processes raise where process 0 has raised a UserError or OSError.
    """
    if jax.process_count() == 1:
        return decide()
    if jax.process_index() == 0:
        try:
            found = decide()
        except (UserError, OSError) as trouble:
            meet("decided")
            told(json.dumps([f"process 0: {trouble}", None]).encode(), source=True)
            raise
        meet("decided")
        told(json.dumps(["", found]).encode(), source=True)
        return found
    meet("decided")  # the others may wait long for it
    failed, found = json.loads(told(b"", source=False))
    if failed:
        raise error(failed)
    return found


def done_first(what: str, work: Callable[[], None]) -> None:
    """Lets process 0 do some work while the others wait for it: on any thread, as no collective takes part.

    Args:
      what: a name that is never used again.
      work: called by process 0.

    Raises:
      OSError: on the other processes, where process 0 has failed at it.
    """
    if jax.process_count() == 1:
        work()
        return
    client, key = distributed.global_state.client, f"maxlm: {what}"
    assert client is not None  # there are several processes
    if jax.process_index():
        if trouble := client.blocking_key_value_get(key, _PATIENCE * 1000).removeprefix(_DONE):
            raise OSError(trouble)
        return
    try:
        work()
    except BaseException as error:
        client.key_value_set(key, f"{_DONE}process 0: {error}")
        raise
    client.key_value_set(key, _DONE)


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
