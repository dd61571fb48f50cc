"""Compiles a run's training step for hardware that is not here, in a process of its own, and keeps what came of it.

The compiler of a TPU or GPU may need more memory than the machine has, or end its process: the child takes that, and
the caller gets one sentence. What was compiled is kept by content, so that the same step for the same hardware is
compiled once: the key is a hash of what shapes the step in the config, of the hardware, of the compiler's options, of
its and JAX's settings in the environment, of the versions, and of the sources that make the step.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import maxlm
from maxlm import programs
from maxlm.chips import Chip
from maxlm.compilation import compiler_options
from maxlm.config import Config
from maxlm.errors import UserError
from maxlm.plan.cuda import has_target
from maxlm.plan.topology import Topology
from maxlm.resolve import as_config_dict, resolve
from maxlm.train.outlook import at_heaviest

GIB = 2**30
LIMIT = 24 * GIB  # of the compiler's memory
POLL_SECONDS = 0.5
PART_SECONDS = 3600.0  # nobody writes a plan for so long
CACHE = "~/.cache/maxlm/plans"
FILES = ("config.py", "compilation.py", "tree.py", "jaxpr.py", "data/batch.py", "checkpoint/digest.py")
ROOMS = (*FILES, "model", "kernels", "parallel", "optim", "train")
"""Sources that decide, with those of `OWN`, what is compiled; how it is read may change without compiling again."""
OWN = ("plan/compile.py", "plan/child.py", "plan/cuda.py", "plan/topology.py")
CUDA = ("jax-cuda12-pjrt", "jax-cuda13-pjrt")  # either compiles
PACKAGES = ("jax", "jaxlib", "libtpu", *CUDA, "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax")
_PLACES = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")  # variables that say where, not what
_TEXTS = {
    "program": ".after_optimizations.txt",
    "buffers": "optimizations-buffer-assignment.txt",
    "ranges": "live-range.txt",
}
"""The texts of a `Step`, and how the names of the files end that XLA writes them to."""
Log = Callable[[str], None]


class CompileError(UserError):
    """The step cannot be compiled for this hardware."""


class NotHere(CompileError):
    """It cannot be compiled in this environment; the analytical model can say something of it all the same."""


class OutOfTime(CompileError):
    """The compiler was ended when the time that it was given was over."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step, as text.

    program: the scheduled program.
    whole: whether it was compiled to the end; if not, the program has no cycles and no emitters of collectives yet.
    refused: what the compiler says against it: that it does not fit the device's memory; "" where it does.
    buffers, ranges: XLA's reports of it ("" where the platform dumps none).
    mesh: size of every mesh axis.
    places: of every device of the mesh in order, its slice and coordinates (see `network.span`).
    attention: name of the attention back end.
    analysis: bytes as XLA sums them up: argument, output, alias, temp, generated_code, peak.
    seconds: (lowering, compiling); of what was ended early, (0, all of it).
    compiler_bytes: the most memory that the compiler's process held.
    versions: of the packages that took part.
    cached: whether it was there already.
    """

    program: str
    whole: bool
    refused: str
    buffers: str
    ranges: str
    mesh: Mapping[str, int]
    places: tuple[tuple[int, ...], ...]
    attention: str
    analysis: Mapping[str, int]
    seconds: tuple[float, float]
    compiler_bytes: int
    versions: Mapping[str, str]
    cached: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """What the child is asked for; `options` are the compiler's, and `whole` as of `Step`."""

    config: Config
    topology: Topology
    options: Mapping[str, str]
    whole: bool

    def as_json(self) -> str:
        """For `request_from_json`."""
        return json.dumps(
            {
                "config": as_config_dict(self.config).to_dict(),
                "topology": dataclasses.asdict(self.topology),
                "options": dict(self.options),
                "whole": self.whole,
            }
        )


def request_from_json(text: str) -> Request:
    """The request that `Request.as_json` wrote."""
    given = json.loads(text)
    place = given["topology"]
    chip = Chip(**{**place["chip"], "kinds": tuple(place["chip"]["kinds"])})
    topology = Topology(**{**place, "chip": chip, "shape": tuple(place["shape"])})
    return Request(resolve(given["config"]), topology, given["options"], given["whole"])


def compile_step(
    config: Config,
    topology: Topology,
    *,
    whole: bool = True,
    cache: str | None = CACHE,
    limit: int = LIMIT,
    options: Mapping[str, str] | None = None,
    seconds: float = math.inf,
    log: Log = lambda line: None,
) -> Step:
    """The step of a resolved config for the hardware.

    Args:
      config: its mesh multiplies to the devices of the hardware. Of one with phases the heaviest step is compiled.
      whole: False ends the compiler as soon as it has laid out the memory, a small part of its time.
      cache: folder of what was compiled before; None: neither read nor written.
      limit: bytes of memory that the compiler may take.
      options: of the compiler; None: those of chip and step (`maxlm.compilation`).
      seconds: that it may take.

    Raises:
      CompileError: the compiler is not installed, needs more than `limit` or `seconds`, failed or died. That the step
        does not fit the device is no error: the result says so.
    """
    request = _request(config, topology, whole=whole, options=options)
    check_installed(config, topology)
    place = Path(cache).expanduser() / content_key(request) if cache else None
    if place is not None and _kept(place):
        return dataclasses.replace(_read(place), cached=True)
    with tempfile.TemporaryDirectory(prefix="maxlm-plan-") as folder:
        work = Path(folder)
        (work / "request.json").write_text(request.as_json())
        begun = time.monotonic()
        peak = _run_child(work, request, limit=limit, seconds=seconds, log=log)
        step = _collect(work, peak, elapsed=time.monotonic() - begun)
    if place is not None:
        try:
            _write(step, place)
        except OSError as error:  # what took minutes is not lost to it
            log(f"what was compiled is not kept in {cache} ({error}); give --plan_cache a folder that can be written")
    return step


def is_kept(config: Config, topology: Topology, *, cache: str, options: Mapping[str, str] | None = None) -> bool:
    """Whether the step was compiled to the end before, and is in the cache; arguments as of `compile_step`."""
    request = _request(config, topology, whole=True, options=options)
    return _kept(Path(cache).expanduser() / content_key(request))


def _request(config: Config, topology: Topology, *, whole: bool, options: Mapping[str, str] | None) -> Request:
    """As of `compile_step`. Compilers for other than TPUs are quick, and are always let to the end."""
    usual = compiler_options(topology.chip, accumulation=config.train.accumulation)
    chosen = usual if options is None else dict(options)
    return Request(config, topology, chosen, whole or topology.chip.platform != "tpu")


def check_installed(config: Config, topology: Topology) -> None:
    """Whether the step can be compiled here: all of the compiler of this platform is there, and knows the chip.

    Raises:
      NotHere: it is not, with what to type.
    """
    gpu = topology.chip.platform == "gpu"
    if gpu and not has_target(topology.chip):
        raise NotHere(f"what the compiler has to know of {topology.chip.name} is not known (maxlm/plan/cuda.py)")
    packages, extra = {"tpu": (("libtpu",), "plan"), "gpu": (CUDA, "plan-cuda")}.get(
        topology.chip.platform, (("jax",), "")
    )
    if not any(map(_installed, packages)):
        raise NotHere(
            f"to compile for {topology.name}, {packages[0]} has to be installed; type: pip install '.[{extra}]'"
        )
    if not gpu:
        return
    from maxlm.plan.analytic.backends import attention_backends

    if config.parallel.context > 1:  # attends in blocks of its own
        return
    if "cudnn" in attention_backends(at_heaviest(config), "gpu") and not _has_cudnn():
        raise NotHere(
            f"attention of {config.name} is cuDNN's on {topology.name}, which is compiled only where its library is; "
            f"type: pip install nvidia-cudnn-cu{'12' if _installed(CUDA[0]) else '13'}"
        )


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _has_cudnn() -> bool:
    """As a package, or as a library of the system."""
    return any(_installed(f"nvidia-cudnn-cu{cuda}") for cuda in (12, 13)) or bool(ctypes.util.find_library("cudnn"))


def content_key(request: Request) -> str:
    """Equal for requests that compile to the same text."""
    config = dataclasses.asdict(request.config)
    for section in ("name", "seed", "checkpoint", "eval"):
        config.pop(section, None)
    config["data"] = {
        name: config["data"][name] for name in ("sequence_length", "batch_size", "mask_documents", "phases")
    }
    sources = hashlib.sha256()
    root = Path(maxlm.__file__).parent
    for room in (*ROOMS, *OWN):
        for path in sorted((root / room).rglob("*.py")) if (root / room).is_dir() else [root / room]:
            sources.update(path.read_bytes())
    topology = dataclasses.asdict(request.topology)
    for figure in ("usable_bytes", "slice_chips", "price", "sources"):  # are for judging what was compiled
        topology["chip"].pop(figure)
    content = json.dumps(
        [
            config,
            topology,
            sorted(request.options.items()),
            request.whole,
            versions(),
            _settings(),
            sources.hexdigest(),
        ],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Of the packages that take part in compiling, those that are installed."""
    return {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}


def _settings() -> dict[str, str]:
    """What the child inherits that changes what it compiles."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("JAX_") and name not in _PLACES}
    kept["XLA_FLAGS"] = " ".join(_without_count(os.environ.get("XLA_FLAGS", "")))
    return kept | {"LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", "")}


def _without_count(flags: str) -> list[str]:
    """XLA's flags but for the number of CPU devices, which the topology says."""
    return [flag for flag in flags.split() if "host_platform_device_count" not in flag]


# --- the child -------------------------------------------------------------------------------------------------------


def _environment(work: Path, topology: Topology) -> dict[str, str]:
    environment = programs.environment()
    dump = f"--xla_dump_to={work / 'dump'} --xla_dump_hlo_pass_re=^$"
    flags = [environment.get("XLA_FLAGS", ""), dump]
    environment["JAX_PLATFORMS"] = "cpu"  # the others' compilers are asked by their descriptions, not as devices
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what comes from it has no reports, and others' names
    if topology.chip.platform == "tpu":
        # No questions to a metadata server, and no lock: other processes may be planning too.
        environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if topology.chip.platform == "gpu":
        flags.append("--xla_gpu_autotune_level=0")  # would try kernels out on a device
    if topology.chip.platform == "cpu":
        flags = [*_without_count(flags[0]), f"--xla_force_host_platform_device_count={topology.devices}", dump]
    environment["XLA_FLAGS"] = " ".join(filter(None, flags))
    return environment


def _run_child(work: Path, request: Request, *, limit: int, seconds: float, log: Log) -> int:
    """Runs it to its end, or until the memory is laid out; returns the most memory that it held."""
    topology = request.topology
    with open(work / "log", "wb") as out:
        child = subprocess.Popen(
            [*programs.module_words("maxlm.plan.child"), str(work), str(os.getpid())],
            env=_environment(work, topology),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    peak, said, begun = 0, 0.0, time.monotonic()
    try:
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            peak = max(peak, _resident(child.pid))
            if peak > limit:
                raise CompileError(
                    f"compiling for {topology.name} needs more than {limit / GIB:.3g} GiB of this machine's memory; "
                    "plan a smaller slice of the same kind, or raise --limit_gib on a larger machine"
                )
            if not request.whole and _laid_out(work):
                return peak
            took = time.monotonic() - begun
            if took > seconds:
                raise OutOfTime(f"compiling for {topology.name} was ended after {took / 60:.1f} min")
            if took - said > 60:
                said = took
                log(f"compiling for {topology.name}: {said / 60:.0f} min, {peak / GIB:.1f} GiB")
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        _explain((work / "log").read_text(errors="replace"), child.returncode, work, topology)
    return peak


def _laid_out(work: Path) -> bool:
    """Whether the program and all reports of the step's memory are there, the last of them for a second."""
    reports = [_dumped(work, ending) for ending in (*_TEXTS.values(), "memory-usage-report.txt")]
    return all(reports) and time.time() - max(path.stat().st_mtime for found in reports for path in found) > 1


def _dumped(work: Path, ending: str) -> list[Path]:
    """What XLA has written of the step."""
    return [path for path in (work / "dump").glob(f"*{ending}") if "train_step" in path.name]


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _explain(text: str, code: int, work: Path, topology: Topology) -> None:
    """Keeps it as a refusal that the step does not fit the device, whose memory is laid out all the same.

    Raises:
      CompileError: anything else.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    full = [line for line in lines if "RESOURCE_EXHAUSTED" in line and "memory" in line.lower()]
    if full and any((work / "dump").glob("*train_step*memory-usage-report.txt")):
        said = full[0][full[0].index("RESOURCE_EXHAUSTED") :].removeprefix("RESOURCE_EXHAUSTED: ")
        (work / "refused").write_text(said)
        return
    last = " / ".join(lines[-2:]) or "it gave no reason"
    if code < 0:
        raise CompileError(f"the compiler for {topology.name} died ({signal.Signals(-code).name}): {last}")
    raise CompileError(f"the step does not compile for {topology.name}: {last}")


def _collect(work: Path, peak: int, *, elapsed: float) -> Step:
    facts = json.loads((work / "facts.json").read_text())
    whole = (work / "step.hlo").exists()
    refused = work / "refused"

    def largest(ending: str) -> str:
        found = _dumped(work, ending)
        return max(found, key=lambda path: path.stat().st_size).read_text() if found else ""

    texts = {name: largest(ending) for name, ending in _TEXTS.items()}
    return Step(
        program=(work / "step.hlo").read_text() if whole else texts["program"],
        buffers=texts["buffers"],
        ranges=texts["ranges"],
        whole=whole,
        refused=refused.read_text() if refused.exists() else "",
        mesh=facts["mesh"],
        places=tuple(tuple(place) for place in facts["places"]),
        attention=facts["attention"],
        analysis=facts.get("analysis", {}),
        seconds=tuple(facts.get("seconds", (0.0, elapsed))),
        compiler_bytes=peak,
        versions=versions(),
    )


# --- the cache -------------------------------------------------------------------------------------------------------


_PART, _FACTS = ".part-", "step.json"


def _write(step: Step, place: Path) -> None:
    """Beside its place, and moved into it, so that it is never half there; what was once interrupted is removed.

    Raises:
      OSError: it cannot be written; nothing is left of it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob(f"{_PART}*"):
        with contextlib.suppress(FileNotFoundError):  # another process may be moving or removing it
            if time.time() - left.stat().st_mtime > PART_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=_PART))
    facts = {name: value for name, value in vars(step).items() if name not in (*_TEXTS, "cached")}
    try:
        for name in _TEXTS:
            (beside / f"{name}.txt.gz").write_bytes(gzip.compress(getattr(step, name).encode(), 5))
        (beside / _FACTS).write_text(json.dumps(facts, indent=1))
        beside.rename(place)
    except OSError:
        if not _kept(place):  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _kept(place: Path) -> bool:
    return os.path.exists(place / _FACTS)  # False of a folder that this user may not look into, where `Path` raises


def _read(place: Path) -> Step:
    facts: dict[str, Any] = json.loads((place / _FACTS).read_text())
    texts: dict[str, Any] = {name: gzip.decompress((place / f"{name}.txt.gz").read_bytes()).decode() for name in _TEXTS}
    facts["places"] = tuple(tuple(where) for where in facts["places"])
    facts["seconds"] = tuple(facts["seconds"])
    return Step(**facts, **texts)
