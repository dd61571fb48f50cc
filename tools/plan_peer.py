"""Plans the same work with MaxText 0.2.5 and with MaxLM, compiled for the same chips, and prints them side by side.

python tools/plan_peer.py [WORK ...] [--python=python3.12] [--folder=DIR] [--json=PATH]

MaxText needs Python 3.12 and newer packages than ours; the tool makes an environment for it in --folder (several GB)
and runs both sides in it, so that both are compiled by one jax and one libtpu. Where that cannot be had, or MaxText's
step does not compile, ours is set beside what MaxText was once found to need (`Work.given`), and the page says how.

What is compared, of programs that are compiled to the end on both sides: the compiler's own peak of memory a chip,
which counts on-chip memory too (some 0.1 GiB); bytes on the wire by kind, as the compiler emits them; how many of those
no other work hides; and its estimate of cycles, which leaves out kernels and collectives. MaxText's attention runs in
blocks of 2,048, as its own recipes have it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maxlm.plan.hlo import Module

ROOT = Path(__file__).parent.parent
PEER = ("maxtext[tpu]==0.2.5", "jax[tpu]==0.11.2")  # jax pins the libtpu that belongs to it, MaxText does not
FOLDER = "~/.cache/maxlm/peer"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Work:
    """The same training step on both sides.

    recipe, topology: ours. positions, rows: of a row; rows of a device.
    model: MaxText's name of it.
    peer: further settings of MaxText, with the mesh that its own recipes would take.
    given: what MaxText 0.2.5 was `FOUND` to need, for a machine without it: bytes, cycles.
    remat: of ours, where the recipe keeps more for the backward pass than MaxText does; "": the recipe's.
    """

    recipe: str
    topology: str
    positions: int
    rows: int
    model: str
    peer: tuple[str, ...]
    given: Mapping[str, float]
    remat: str = ""


GIB = 2**30
FOUND = "found by this tool before, jax 0.11.2, libtpu 0.0.48.1"
# What is kept for the backward pass, by the memory that was found: of 8B on v5p all that a layer's products make
# (without the first products of the feed-forward half, save_dot_except_mlpwi, it is 24.6 GiB), which of 70B would not
# fit; on v6e 28 GiB lie on the host.
KEPT = ("remat_policy=minimal_with_context",)
PROJECTIONS = ("remat_policy=save_qkv_proj",)
OFFLOADED = (
    "remat_policy=custom",
    *(f"{name}=offload" for name in ("decoder_layer_input", "query_proj", "key_proj", "value_proj", "out_proj")),
)
WORKS: Mapping[str, Work] = {
    "llama3-8b-v5p": Work(
        "llama3_8b",
        "v5p-128",
        8192,
        2,
        "llama3-8b",
        KEPT,
        {"memory": 56.6 * GIB, "cycles": 3.32e9, "all-gather": 28.5e9, "all-reduce": 29.6e9},
    ),
    "llama3-70b-v5p": Work(
        "llama3_70b",
        "v5p-256",
        4096,
        2,
        "llama3-70b",
        PROJECTIONS,
        {"memory": 37.3 * GIB, "cycles": 1.683e10, "all-gather": 273.8e9, "all-reduce": 275.8e9},
        remat="attention_qkv",
    ),
    "llama3-8b-v6e": Work(
        "llama3_8b",
        "v6e-256",
        8192,
        4,
        "llama3-8b",
        OFFLOADED,
        {"memory": 28.35 * GIB, "cycles": 5.156e9, "all-gather": 29.3e9, "all-reduce": 29.9e9},
    ),
    "mixtral-8x7b-v5p": Work(
        "mixtral_8x7b",
        "v5p-128",
        4096,
        4,
        "mixtral-8x7b",
        ("ici_expert_parallelism=8", "ici_fsdp_parallelism=8", "allow_split_physical_axes=true"),
        {
            "memory": 31.6 * GIB,
            "cycles": 6.332e9,
            "all-gather": 19.7e9,
            "all-reduce": 22.2e9,
            "reduce-scatter": 10.1e9,
            "all-to-all": 113e9,
        },
        remat="full",
    ),
}
BLOCKS = [
    f"sa_block_{name}=2048" for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
]
VMEM = {"xla_tpu_scoped_vmem_limit_kib": "98304"}


# --- one side, inside the environment --------------------------------------------------------------------------------


def ours(work: Work) -> dict[str, Any]:
    """Figures of MaxLM's step."""
    from maxlm.plan.compile import compile_step
    from maxlm.plan.hlo import parse
    from maxlm.plan.topology import parse_topology
    from maxlm.plan.uneven import settled
    from maxlm.resolve import resolve

    spec = importlib.util.spec_from_file_location(work.recipe, ROOT / "configs" / f"{work.recipe}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    topology = parse_topology(work.topology)
    given = module.get_config(work.topology)
    given.data.sequence_length = work.positions
    given.data.batch_size = given.eval.batch_size = work.rows * topology.devices
    given.train.reduce_dtype = "bfloat16"  # as MaxText adds gradients up; the recipes keep float32
    if work.remat:
        given.train.remat = work.remat
    config = resolve(given, devices=topology.devices)
    step = compile_step(config, topology, cache=None, options=VMEM, log=print)
    if step.refused:
        raise SystemExit(f"{work.recipe} on {work.topology}: {step.refused}")
    return figures(settled(parse(step.program), config), step.mesh, memory=step.analysis["peak_memory"])


def peers(work: Work) -> dict[str, Any]:
    """Figures of MaxText's step: its own compile-only program, with the compiled step caught on its way out."""
    import maxtext
    from absl import flags
    from maxtext.trainers.pre_train import train_compile

    from maxlm.plan.hlo import parse

    caught: list[Any] = []
    compile_it = train_compile.jit_and_compile

    def catching(*args: Any, **kwargs: Any) -> Any:
        mesh = inspect.signature(compile_it).bind(*args, **kwargs).arguments["mesh"]
        caught.extend([compile_it(*args, **kwargs), mesh])
        return caught[0]

    train_compile.jit_and_compile = catching
    base = Path(next(iter(maxtext.__path__))) / "configs" / "base.yml"
    options = " ".join(f"--{name}={value}" for name, value in VMEM.items())
    settings = [
        f"model_name={work.model}",
        f"compile_topology={work.topology}",
        "compile_topology_num_slices=1",
        f"per_device_batch_size={work.rows}",
        f"max_target_length={work.positions}",
        "attention=flash",
        "dataset_type=synthetic",
        "enable_checkpointing=false",
        "run_name=plan",
        "base_output_directory=/tmp",
        f"compile_xla_flags={options}",
        *BLOCKS,
        *work.peer,
    ]
    flags.FLAGS.mark_as_parsed()
    train_compile.main(["train_compile", str(base), *settings])
    compiled, mesh = caught
    return figures(parse(compiled.as_text()), dict(mesh.shape), memory=compiled.memory_analysis().peak_memory_in_bytes)


def figures(module: Module, mesh: Mapping[str, int], *, memory: int) -> dict[str, Any]:
    """What is compared, of a step that was compiled to the end; the same reading for both sides.

    Args:
      module: of ours with the shares of what is not done in every step, the norms; MaxText's step has no such part.
      memory: the compiler's peak of a device, in bytes.
    """
    from importlib.metadata import version

    import jax

    from maxlm.plan.collectives import by_kind_and_axes, find
    from maxlm.plan.hlo import total_flops

    sent = find(module, mesh)
    rows = by_kind_and_axes(sent)
    found: dict[str, Any] = {
        "memory": memory,
        "flops": total_flops(module),
        "cycles": sum(times * instruction.cycles for instruction, _, times in module.scheduled()),
        "wire": sum(row.wire for row in rows),
        "exposed": sum(one.times * one.wire for one in sent if not one.asynchronous),
        "by": f"jax {jax.__version__}, libtpu {version('libtpu')}",
    }
    return found | {kind: sum(row.wire for row in rows if row.kind == kind) for kind in KINDS}


# --- the environment -------------------------------------------------------------------------------------------------


def interpreter(asked: str) -> str:
    """A Python 3.12; "" if there is none that runs."""
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob("3.12*/bin/python"))
    for candidate in (asked, "python3.12", *map(str, pyenv), sys.executable):
        path = shutil.which(candidate) if candidate else None
        if path is None:
            continue
        said = subprocess.run([path, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
        if said.stdout.strip() == "(3, 12)":
            return path
    return ""


def environment(folder: Path, python: str) -> Path:
    """The interpreter of an environment that holds MaxText and what MaxLM needs; made where it is not there.

    Raises:
      subprocess.CalledProcessError: it cannot be made; what pip said is printed.
    """
    inside = folder / "maxtext-0.2.5" / "bin" / "python"
    if (folder / "made").exists() and (folder / "made").read_text() == " ".join(PEER):
        return inside
    subprocess.run([python, "-m", "venv", "--clear", str(inside.parent.parent)], check=True)
    # In one call, as our needs and theirs are met by one set of packages.
    subprocess.run([str(inside), "-m", "pip", "install", "-q", *PEER, str(ROOT)], check=True)
    (folder / "made").write_text(" ".join(PEER))
    return inside


def run_side(python: str, side: str, name: str, *, folder: Path) -> dict[str, Any]:
    """One side in a process of its own.

    Raises:
      subprocess.CalledProcessError: it failed; what it said is printed.
    """
    out = folder / f"{name}.{side}.json"
    tpu = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [python, str(Path(__file__)), name, f"--side={side}", f"--json={out}"]
    subprocess.run(command, check=True, env={**os.environ, **tpu, "PYTHONPATH": str(ROOT)})
    return json.loads(out.read_text())


# --- the page --------------------------------------------------------------------------------------------------------


def table(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Lines of both sides with the ratio of ours to theirs; a figure that one side lacks is left out, and 0 stays."""
    lines = [f"{'':18}{'MaxLM':>12}{'MaxText':>12}{'ratio':>8}"]
    units = {"memory": (GIB, "GiB"), "cycles": (1e9, "1e9"), "flops": (1e12, "TFLOP")}
    for name in ("memory", "cycles", "flops", "wire", "exposed", *KINDS):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or not (a or b):
            continue
        scale, unit = units.get(name, (1e9, "GB"))
        ratio = f"{a / b:8.3f}" if b else f"{'-':>8}"
        lines.append(f"{name + ', ' + unit:18}{a / scale:12.4g}{b / scale:12.4g}{ratio}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Compares what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; all")
    parser.add_argument("--python", default="", help="a Python 3.12 to make MaxText's environment from")
    parser.add_argument("--folder", default=FOLDER, help="where the environment is made and figures are kept")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.works) - set(WORKS):
        parser.error(f"{', '.join(sorted(unknown))}: no such work; there are {', '.join(WORKS)}")
    if args.side:
        side = {"ours": ours, "peer": peers}[args.side]
        Path(args.json).write_text(json.dumps(side(WORKS[args.works[0]]), indent=1))
        return 0
    folder = Path(args.folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    python = interpreter(args.python)
    if not python:
        print(
            "There is no Python 3.12 here, which MaxText needs (--python names one): its figures are those once found."
        )
    try:
        inside = str(environment(folder, python)) if python else sys.executable
    except subprocess.CalledProcessError as error:
        print(f"MaxText's environment cannot be made ({error}): its figures are those once found.")
        inside, python = sys.executable, ""
    every, failed = {}, []
    for name in args.works or WORKS:
        theirs: dict[str, Any] = {**WORKS[name].given, "by": FOUND}
        try:
            mine = run_side(inside, "ours", name, folder=folder)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} of ours ({error})")
            continue
        try:
            theirs = run_side(inside, "peer", name, folder=folder) if python else theirs
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} of MaxText ({error})")
        every[name] = {"ours": mine, "peer": theirs}
        print(f"\n{name}: {mine['by']} / {theirs['by']}", *table(mine, theirs), sep="\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(every, indent=1) + "\n")
    if failed:
        print("did not compile:", *failed, sep="\n  ")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
