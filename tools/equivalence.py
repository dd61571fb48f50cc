"""Holds every mesh and every combination of features against one device: the loss and every gradient leaf.

python tools/equivalence.py                      the meshes of 8 devices, then larger ones of 16, 32 and 64
python tools/equivalence.py --devices=8 --part=0/2     half of the meshes of 8 devices, for two programs side by side
python tools/equivalence.py --docs               also writes the table of what works into docs/parallelism.md
python tools/equivalence.py --docs --join A.json B.json    runs nothing: the table of what --json has kept of parts

Every case is one training step in float32 of a tiny model, from the same parameters and batch, with an optimizer that
records gradients. The reference is a single device with plain attention, all experts computed where they are, no
rematerialisation and no accumulation. On every mesh of 8 devices a pairwise covering array of the features is run: each
pair of values of two features occurs in some case. Meshes of four and more axes are run with all of them on.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
AXES = ("data", "fsdp", "pipeline", "context", "expert", "tensor")
ROWS, POSITIONS = 32, 32
EXPERTS = 8
# What production runs use: hybrid sharding with tensor and context, experts across nodes, pipelines of all of it.
LARGE: dict[int, tuple[dict[str, int], ...]] = {
    16: (
        {"data": 2, "fsdp": 2, "context": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "pipeline": 2, "tensor": 2},
        {"fsdp": 2, "pipeline": 2, "expert": 2, "tensor": 2},
        {"fsdp": 2, "pipeline": 2, "context": 2, "tensor": 2},
    ),
    32: (
        {"data": 2, "fsdp": 2, "pipeline": 2, "context": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "pipeline": 2, "expert": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "context": 2, "expert": 2, "tensor": 2},
    ),
    64: ({axis: 2 for axis in AXES},),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One mesh and one value of each feature."""

    mesh: tuple[tuple[str, int], ...]
    moe: bool
    packed: bool
    remat: str
    accumulation: int
    schedule: str = ""  # empty: no pipeline

    @property
    def name(self) -> str:
        """For people and for --case."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh) or "one device"
        parts = [
            mesh,
            "moe" if self.moe else "dense",
            "packed" if self.packed else "unpacked",
            f"remat {self.remat}",
            f"accumulation {self.accumulation}",
            self.schedule,
        ]
        return ", ".join(part for part in parts if part)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to spread a power of two of devices over the axes; sizes of one are left out."""
    twos = devices.bit_length() - 1
    for powers in itertools.product(range(twos + 1), repeat=len(AXES)):
        if sum(powers) == twos:
            yield {axis: 2**power for axis, power in zip(AXES, powers, strict=True) if power}


def covering_array(features: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows in which every pair of values of two features occurs, few of them (greedily; the same every time)."""
    names = list(features)
    rows = [dict(zip(names, values, strict=True)) for values in itertools.product(*features.values())]

    def pairs(row: dict[str, Any]) -> set[tuple]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    missing = set().union(*(pairs(row) for row in rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def cases(devices: int) -> Iterator[Case]:
    """All cases of a number of devices."""
    for sizes in meshes(devices) if devices == 8 else LARGE[devices]:
        stages = sizes.get("pipeline", 1)
        features: dict[str, Sequence[Any]] = {
            # A dense model has nothing to spread over `expert`: the config is refused.
            "moe": (True,) if sizes.get("expert", 1) > 1 else (False, True),
            "packed": (True, False),
            "remat": ("none", "full"),
            "accumulation": (1, 2) if stages == 1 else (stages, 2 * stages),
            "schedule": ("gpipe", "1f1b", "interleaved", "zero_bubble") if stages > 1 else ("",),
        }
        rows = covering_array(features) if devices < 64 else covering_array(features)[:2]
        for row in rows:
            yield Case(tuple(sizes.items()), **row)


def layers(case: Case) -> int:
    """As few as the stages allow: a stage, or a part of one, holds whole cycles of two windows."""
    stages = dict(case.mesh).get("pipeline", 1)
    return max(4, 2 * stages * (2 if case.schedule == "interleaved" else 1))


def config_of(case: Case | None, *, moe: bool, packed: bool, layers: int) -> Any:
    """The config of a case, or of its reference."""
    from maxlm import config as c

    parallel: dict[str, Any] = {"data": 1}
    train: dict[str, Any] = {}
    if case is not None:
        parallel |= dict(case.mesh)
        if case.schedule:
            parallel["pipeline_schedule"] = case.schedule
            parallel["virtual_stages"] = 2 if case.schedule == "interleaved" else 1
        train = {"remat": case.remat, "accumulation": case.accumulation}
    experts = c.MoeConfig(experts=EXPERTS, active=2, dim=16, shared_dim=16, balance_loss=0.02, router_z_loss=0.001)
    return c.Config(
        name="equivalence",
        model=c.ModelConfig(
            vocab_size=264,
            embed_dim=32,
            num_layers=layers,
            attention=c.AttentionConfig(
                q_heads=16, kv_heads=8, head_dim=8, qk_norm="head", softcap=20.0, windows=(12, 0)
            ),
            mlp=c.MlpConfig(dim=64),
            moe=experts if moe else c.MoeConfig(),
        ),
        data=c.DataConfig(
            stores={"none": c.StoreConfig(source="text:none")},
            tokenizer=c.TokenizerConfig(kind="bytes"),
            sequence_length=POSITIONS,
            batch_size=ROWS,
            mask_documents=packed,
        ),
        train=c.TrainConfig(
            steps=10, precision="float32", norms_every=0, loss_chunk=256, compilation_cache="", z_loss=1e-3, **train
        ),
        eval=c.EvalConfig(batch_size=ROWS),
        parallel=c.ParallelConfig(**parallel),
    )


def batch_of(*, packed: bool) -> Any:
    """The batch of every case: rows of two documents each, or the same tokens as one."""
    from maxlm.data.batch import join_documents
    from maxlm.train.compare import example_batch

    batch = example_batch(1, rows=ROWS, length=POSITIONS, vocab=264)
    return batch if packed else join_documents(batch)


@functools.cache
def start(moe: bool, packed: bool, layers: int) -> Any:
    """Parameters to start from.

    With experts, those of the first seed whose router decides clearly for every token: the last expert that it chooses
    has a logit more than 1e-4 above that of the best one left out, far above what another order of sums changes, so
    that every mesh has to choose the same. Routers are drawn eight times as large, which spreads the logits out.
    """
    from maxlm import tree
    from maxlm.model.decoder import split_model
    from maxlm.resolve import resolve
    from maxlm.train.compare import drawn_params

    specs = split_model(resolve(config_of(None, moe=moe, packed=packed, layers=layers), devices=1).model).specs
    if not moe:
        return drawn_params(specs, seed=2)
    least = make_margin(packed, layers)
    for seed in range(2, 50):
        params = tree.map_paths(lambda path, x: 8 * x if path.endswith("router") else x, drawn_params(specs, seed=seed))
        found = least(params)
        if found > 1e-4:
            kind = "packed" if packed else "unpacked"
            print(f"experts of {layers} layers, {kind}: chosen by {found:.2e} at least (seed {seed})", flush=True)
            return params
    raise SystemExit("no seed has a router that decides clearly; draw larger routers")


def make_margin(packed: bool, layers: int) -> Callable[[Any], float]:
    """A function of parameters: by how much each token's last expert beats the best one left out, at least."""
    from unittest import mock

    import jax
    import jax.numpy as jnp

    from maxlm.model import moe
    from maxlm.model.decoder import merge, split_model
    from maxlm.model.runtime import Runtime
    from maxlm.resolve import resolve

    config = resolve(config_of(None, moe=True, packed=packed, layers=layers), devices=1)
    graphdef, batch, route, seen = split_model(config.model).graphdef, batch_of(packed=packed), moe.route, []

    def watched(logits: Any, bias: Any, settings: Any) -> Any:
        best = jax.lax.top_k(logits, settings.active + 1)[0]
        gap = jnp.where(batch.segments > 0, best[..., -2] - best[..., -1], jnp.inf).min()
        jax.debug.callback(lambda x: seen.append(float(x)), gap)
        return route(logits, bias, settings)

    @jax.jit
    def hidden(params: Any) -> Any:
        segments = batch.segments if packed else None
        model = merge(graphdef, params)
        return model.hidden(
            batch.tokens, positions_BS=batch.positions, segments_BS=segments, runtime=Runtime()
        ).hidden_BSD

    def least(params: Any) -> float:
        seen.clear()
        with mock.patch("maxlm.model.moe.route", watched):
            jax.block_until_ready(hidden(params))
        jax.effects_barrier()
        assert len(seen) == layers
        return min(seen)

    return least


@functools.cache
def reference(moe: bool, packed: bool, layers: int) -> Any:
    """What one device computes from there."""
    import jax

    from maxlm.model.runtime import Runtime
    from maxlm.resolve import resolve
    from maxlm.train.compare import loss_and_gradients

    config = resolve(config_of(None, moe=moe, packed=packed, layers=layers), devices=1)
    params, batch = start(moe, packed, layers), batch_of(packed=packed)
    return loss_and_gradients(config, batch, params=params, devices=jax.devices()[:1], runtime=Runtime())


def refuse_permutes_in_branches(program: str) -> None:
    """Stops before a program is run that would hang: stages take different branches, and a permute waits for all.

    Raises:
      RuntimeError: a branch of a conditional has a collective-permute, which XLA's CPU back end runs as a rendezvous of
        every device.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = computations.setdefault(start[1], [])
        lines.append(line)

    def called(line: str) -> Iterator[str]:
        single = r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
        yield from re.findall(single, line)
        for names in re.findall(r"branch_computations=\{([^}]*)\}", line):
            yield from (name.strip().lstrip("%") for name in names.split(","))

    conditionals = [line for lines in computations.values() for line in lines if " conditional(" in line]
    waiting, seen = [name for line in conditionals for name in called(line)], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations.get(name, ()):
            if " collective-permute(" in line or " collective-permute-start(" in line:
                where = re.search(r'op_name="([^"]*)"', line)
                raise RuntimeError(f"a branch of the program permutes: {where[1] if where else line.strip()}")
            waiting += called(line)


def run(case: Case) -> list[Any]:
    """The distances of a case from its reference, the farthest first."""
    import jax

    from maxlm.resolve import resolve
    from maxlm.train.compare import Distance, distances, loss_and_gradients

    depth = layers(case)
    config = resolve(config_of(case, moe=case.moe, packed=case.packed, layers=depth), devices=jax.device_count())
    expected = reference(case.moe, case.packed, depth)
    params, batch = start(case.moe, case.packed, depth), batch_of(packed=case.packed)
    got = loss_and_gradients(config, batch, params=params, inspect=refuse_permutes_in_branches)
    found = distances(got, expected)
    # One token that goes elsewhere moves a layer's load by at least 8 / (2 * 1024), its mean over 16 layers by 2e-4.
    load = got.metrics["load_max_over_mean"] / expected.metrics["load_max_over_mean"] if case.moe else 1
    if abs(load - 1) > 1e-5:
        found.insert(0, Distance(float("inf"), "which experts the tokens went to"))
    return found


def main() -> int:
    """Runs the cases asked for; 1 if any is too far from its reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, choices=(8, *LARGE), help="only the cases of so many devices")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case from the I-th on")
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/parallelism.md")
    parser.add_argument("--join", type=Path, nargs="+", help="run nothing, and take the results of these files")
    given = parser.parse_args()
    if given.join:
        results = [result for path in given.join for result in json.loads(path.read_text())]
    else:
        results = run_here(given) if given.devices else run_all(given)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [result for result in results if result["share"] > 1]
    if results:
        worst = max(results, key=lambda result: result["share"])
        print(f"worst: {worst['share']:.3f} of what is allowed, {worst['what']}, in: {worst['case']}")
    print(f"{len(results)} cases, {len(wrong)} too far from one device")
    if given.docs and not wrong:
        write_table(results)
    return 1 if wrong or not results else 0


def run_here(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of one number of devices, in this process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Compiles several times faster, to programs that are a little slower; there is one of each here.
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={given.devices} "
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
    from maxlm.compilation import settle_cpu_devices

    settle_cpu_devices()
    first, step = (int(number) for number in given.part.split("/"))
    chosen = [case for case in itertools.islice(cases(given.devices), first, None, step) if given.case in case.name]
    results, began = [], time.monotonic()
    for number, case in enumerate(chosen, 1):
        started = time.monotonic()
        worst = run(case)[0]
        seconds = time.monotonic() - started
        results.append({**dataclasses.asdict(case), "mesh": dict(case.mesh), "case": case.name, **worst._asdict()})
        left = (time.monotonic() - began) / number * (len(chosen) - number)
        print(
            f"{number}/{len(chosen)} {worst.share:7.3f}  {worst.what:36s} {seconds:4.0f} s  {left / 60:3.0f} min left  "
            f"{case.name}{'   TOO FAR' if worst.share > 1 else ''}",
            flush=True,
        )
    return results


def run_all(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All numbers of devices, two processes at a time: a process has one number of devices for its whole life."""
    results: list[dict[str, Any]] = []
    rounds = [[(8, "0/2"), (8, "1/2")], [(16, "0/1"), (32, "0/1")], [(64, "0/1")]]
    for together in rounds:
        started = []
        for devices, part in together:
            path = ROOT / f".equivalence-{devices}-{part.replace('/', '-')}.json"
            command = [sys.executable, __file__, f"--devices={devices}", f"--part={part}", f"--json={path}"]
            started.append((path, subprocess.Popen([*command, f"--case={given.case}"], cwd=ROOT)))
        for path, process in started:
            process.wait()
            if path.exists():
                results += json.loads(path.read_text())
                path.unlink()
            elif not given.case:
                raise SystemExit(f"{path.name} was not written: the program before ended with {process.returncode}")
    return results


def write_table(results: list[dict[str, Any]]) -> None:
    """The pairs of axes and features that were proved, between the marks in docs/parallelism.md."""
    rows = [
        *AXES,
        "experts",
        "packed documents",
        "remat",
        "accumulation",
        "1f1b",
        "gpipe",
        "interleaved",
        "zero_bubble",
    ]

    def has(result: dict[str, Any], row: str) -> bool:
        flags = {
            "experts": result["moe"],
            "packed documents": result["packed"],
            "remat": result["remat"] != "none",
            "accumulation": result["accumulation"] > 1,
        }
        return flags[row] if row in flags else row in result["mesh"] or result["schedule"] == row

    def cell(row: str, column: str) -> str:
        return str(sum(has(result, row) and has(result, column) for result in results) or "")

    lines = ["| | " + " | ".join(AXES) + " |", "|---" * (len(AXES) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(cell(row, axis) for axis in AXES) + " |" for row in rows]
    worst = max(results, key=lambda result: result["share"])
    sizes = collections.Counter(math.prod(result["mesh"].values()) for result in results)
    counts = [f"{count} on {devices} devices" for devices, count in sorted(sizes.items())]
    text = "\n".join(
        [
            f"{len(results)} cases agree with one device ({', '.join(counts)}); the farthest is at "
            f"{worst['share']:.0%} of what is allowed",
            f"({worst['case']}).",
            "Each number says in how many cases the two occurred together; where there is none, the combination is",
            "refused when the config is resolved.",
            "",
            *lines,
        ]
    )
    page = ROOT / "docs" / "parallelism.md"
    before, rest = page.read_text().split("<!-- equivalence -->\n")
    after = rest.split("<!-- /equivalence -->")[1]
    page.write_text(f"{before}<!-- equivalence -->\n{text}\n<!-- /equivalence -->{after}")


if __name__ == "__main__":
    sys.exit(main())
