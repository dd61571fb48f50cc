"""Holds every mesh and every combination of features against one device: the loss and every gradient leaf.

python tools/equivalence.py                      the meshes of 8 devices, then larger ones of 16, 32 and 64
python tools/equivalence.py --devices=8 --part=0/2     half of the meshes of 8 devices, for two programs side by side
python tools/equivalence.py --docs               also writes the table of what works into docs/parallelism.md
python tools/equivalence.py --docs --join A.json B.json    runs nothing: the table of what --json has kept of parts

Every case is one training step in float32 of a tiny model, from the same parameters and batch, with an optimizer that
records gradients. The reference is a single device with plain attention, all experts computed where they are, no
rematerialisation and no accumulation. On every mesh of 8 devices a pairwise covering array of the features is run: each
pair of values of two features occurs in some case; so do both ways of keys, where there is a choice. Meshes of four and
more axes are run with all of them on. Models with other features are run on a few meshes of 8 devices each.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the other half of this program

from tools.equivalence_cases import AXES, LARGE, MODELS, POSITIONS, ROWS, Case, cases, config_of, method_of

ROOT = Path(__file__).resolve().parent.parent


def batch_of(*, packed: bool) -> Any:
    """The batch of every case: rows of two documents each, or the same tokens as one."""
    from maxlm.data.batch import join_documents
    from maxlm.train.compare import example_batch

    batch = example_batch(1, rows=ROWS, length=POSITIONS, vocab=264)
    return batch if packed else join_documents(batch)


@functools.cache
def start(kind: str, packed: bool, layers: int) -> Any:
    """Parameters to start from.

    With experts, those of the first seed whose router decides clearly for every token: the last expert that it chooses
    has a logit more than 1e-4 above that of the best one left out, far above what another order of sums changes, so
    that every mesh has to choose the same; so it is of groups, and of scores where these and not logits are compared.
    Routers are drawn larger, which spreads the logits out, sigmoids less so, which would all be ones. What layers add
    to the stream is drawn as small as in a run (`depth_scaled`): over 32 layers with such routers, half a unit in the
    last place of each parameter would otherwise move gradients by 2e-4.
    """
    import numpy as np

    from maxlm import tree
    from maxlm.model.decoder import split_model
    from maxlm.resolve import resolve
    from maxlm.train.compare import drawn_params

    model = resolve(config_of(None, kind=kind, packed=packed, layers=layers), devices=1).model
    specs = split_model(model).specs
    if not model.moe.experts:
        return drawn_params(specs, seed=2)
    least, larger = make_margin(kind, packed, layers), 8 if model.moe.router == "softmax" else 3
    factors = {"router": larger, "output": (2 * layers) ** -0.5, "down": (2 * layers) ** -0.5}
    for seed in range(2, 100):
        drawn = drawn_params(specs, seed=seed)
        params = tree.map_paths(lambda path, x: np.float32(factors.get(path.split("/")[-1], 1)) * x, drawn)
        found = least(params)
        if found > 1e-4:
            rows = "packed" if packed else "unpacked"
            print(f"{kind}, {layers} layers, {rows}: experts chosen by {found:.2e} at least (seed {seed})", flush=True)
            return params
    raise SystemExit("no seed has a router that decides clearly; draw larger routers")


def make_margin(kind: str, packed: bool, layers: int) -> Callable[[Any], float]:
    """A function of parameters: by how much each token's last expert or group beats the best one left out."""
    from unittest import mock

    import jax
    import jax.numpy as jnp

    from maxlm.model import moe
    from maxlm.model.decoder import merge, split_model
    from maxlm.model.runtime import Runtime
    from maxlm.resolve import resolve

    config = resolve(config_of(None, kind=kind, packed=packed, layers=layers), devices=1)
    graphdef, batch, route, seen = split_model(config.model).graphdef, batch_of(packed=packed), moe.route, []

    def gap(values: Any, count: int) -> Any:
        best = jax.lax.top_k(values, count + 1)[0]
        return best[..., -2] - best[..., -1]

    def margin(logits: Any, bias: Any, settings: Any) -> Any:
        if bias is None and settings.groups == 1:
            return gap(logits, settings.active)  # scores are in the order of logits
        scores = jax.nn.softmax(logits) if settings.router == "softmax" else jax.nn.sigmoid(logits)
        grouped = (scores + (0 if bias is None else bias)).reshape(*scores.shape[:-1], settings.groups, -1)
        of_groups = jax.lax.top_k(grouped, 1 if settings.router == "softmax" else 2)[0].sum(axis=-1)
        last = jax.lax.top_k(of_groups, settings.top_groups)[0][..., -1:]
        allowed = jnp.where((of_groups >= last)[..., None], grouped, -jnp.inf).reshape(scores.shape)
        return jnp.minimum(gap(of_groups, settings.top_groups), gap(allowed, settings.active))

    def watched(logits: Any, bias: Any, settings: Any) -> Any:
        least = jnp.where(batch.segments > 0, margin(logits, bias, settings), jnp.inf).min()
        jax.debug.callback(lambda x: seen.append(float(x)), least)
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
        assert len(seen) == layers - config.model.moe.dense_layers
        return min(seen)

    return least


@functools.cache
def reference(kind: str, packed: bool, layers: int) -> Any:
    """What one device computes from there."""
    import jax

    from maxlm.model.runtime import Runtime
    from maxlm.resolve import resolve
    from maxlm.train.compare import loss_and_gradients

    config = resolve(config_of(None, kind=kind, packed=packed, layers=layers), devices=1)
    params, batch = start(kind, packed, layers), batch_of(packed=packed)
    runtime = Runtime(experts_limited=bool(config.model.moe.capacity_factor))
    return loss_and_gradients(config, batch, params=params, devices=jax.devices()[:1], runtime=runtime)


def run(case: Case) -> list[Any]:
    """The distances of a case from its reference, the farthest first."""
    import jax

    from maxlm.resolve import resolve
    from maxlm.train.compare import distances, loss_and_gradients

    of = case.kind, case.packed, case.layers
    config = config_of(case, kind=case.kind, packed=case.packed, layers=case.layers)
    config = resolve(config, devices=jax.device_count())
    got = loss_and_gradients(config, batch_of(packed=case.packed), params=start(*of))
    return distances(got, reference(*of))


def main() -> int:
    """Runs the cases asked for; 1 if any is too far from its reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, choices=(8, *LARGE), help="only the cases of so many devices")
    parser.add_argument("--part", type=part, metavar="I/N", help="of those of --devices every N-th from the I-th on")
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/parallelism.md")
    parser.add_argument("--join", type=Path, nargs="+", help="run nothing, and take the results of these files")
    given = parser.parse_args()
    if given.part and not given.devices:
        parser.error("--part is a part of the cases of one number of devices; type --devices=8 with it")
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
        if lacking := incomplete(results):
            print(lacking, file=sys.stderr)
            return 1
        write_table(results)
    return 1 if wrong or not results else 0


def part(text: str) -> tuple[int, int]:
    """'1/2' as (1, 2)."""
    first, _, step = text.partition("/")
    if not (first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; the two halves are 0/2 and 1/2")
    return int(first), int(step)


def incomplete(results: list[dict[str, Any]]) -> str:
    """What keeps results from being those of every case once, in words; empty: nothing."""
    there = collections.Counter(result["case"] for result in results)
    wanted = {devices: [case.name for case in cases(devices)] for devices in (8, *LARGE)}
    lacking = {devices: sum(name not in there for name in names) for devices, names in wanted.items()}
    known = {name for names in wanted.values() for name in names}
    problems = []
    if any(lacking.values()):
        counts = ", ".join(f"{count} on {devices} devices" for devices, count in lacking.items() if count)
        problems.append(f"{sum(lacking.values())} of {len(known)} cases are missing ({counts}); run them, and --join")
    if unknown := sorted(there.keys() - known):
        problems.append(f"{len(unknown)} results are of cases that there are none of (any more), e.g. {unknown[0]!r}")
    if twice := [name for name, count in there.items() if count > 1]:
        problems.append(f"{len(twice)} cases are there more than once, e.g. {twice[0]!r}")
    return f"no table is written: {'; '.join(problems)}" if problems else ""


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
    first, step = given.part or (0, 1)
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
    rounds = [[(8, "0/2"), (8, "1/2")], [(16, "0/1"), (32, "0/1")], [(64, "0/1")]]
    with tempfile.TemporaryDirectory() as folder:
        return [result for together in rounds for result in run_together(together, Path(folder), case=given.case)]


def run_together(parts: list[tuple[int, str]], folder: Path, *, case: str) -> list[dict[str, Any]]:
    """Numbers of devices and parts of their cases, each in a process of its own.

    Raises:
      SystemExit: one of them has not come to its end. (It says 1 also where `case` chooses none of its cases.)
    """
    started = []
    for devices, share in parts:
        path = folder / f"{devices}-{share.replace('/', '-')}.json"
        command = [sys.executable, __file__, f"--devices={devices}", f"--part={share}", f"--json={path}"]
        started.append((path, subprocess.Popen([*command, f"--case={case}"], cwd=ROOT)))
    codes = [process.wait() for _, process in started]
    for (path, _), code in zip(started, codes, strict=True):
        if code not in (0, 1) or not path.exists():
            raise SystemExit(
                f"the program of {path.stem.replace('-', ' devices, part ', 1)} ended with {code}, unfinished"
            )
    return [result for path, _ in started for result in json.loads(path.read_text())]


def write_table(results: list[dict[str, Any]]) -> None:
    """The pairs of axes and features or models that were proved, between the marks in docs/parallelism.md."""
    features = [
        *AXES,
        "experts",
        "packed documents",
        "remat",
        "accumulation",
        "1f1b",
        "gpipe",
        "interleaved",
        "zero_bubble",
        "ring",
        "gather",
    ]

    def has(result: dict[str, Any], row: str) -> bool:
        flags = {
            "experts": result["moe"],
            "packed documents": result["packed"],
            "remat": result["remat"] != "none",
            "accumulation": result["accumulation"] > 1,
        }
        names = (*result["mesh"], result["schedule"], result.get("model", ""), context_method_of(result))
        return flags.get(row, row in names)

    def context_method_of(result: dict[str, Any]) -> str:
        context, staged = result["mesh"].get("context", 1), "pipeline" in result["mesh"]
        return method_of(result.get("model", ""), result.get("method", ""), context=context, staged=staged)

    def cell(row: str, column: str) -> str:
        return str(sum(has(result, row) and has(result, column) for result in results) or "")

    def table(rows: Iterable[str]) -> list[str]:
        lines = ["| | " + " | ".join(AXES) + " |", "|---" * (len(AXES) + 1) + "|"]
        return lines + [f"| {row} | " + " | ".join(cell(row, axis) for axis in AXES) + " |" for row in rows]

    worst = max(results, key=lambda result: result["share"])
    sizes = collections.Counter(math.prod(result["mesh"].values()) for result in results)
    counts = [f"{count} on {devices} devices" for devices, count in sorted(sizes.items())]
    text = "\n".join(
        [
            f"{len(results)} cases agree with one device ({', '.join(counts)});",
            f"the farthest is at {worst['share']:.0%} of what is allowed",
            f"({worst['case']}).",
            "Each number says in how many cases the two occurred together. In this first table there is none where the",
            "combination is refused when the config is resolved:",
            "",
            *table(features),
            "",
            "Further models, each with all of its features, on some meshes (others are not refused, and were not run):",
            "",
            *table(MODELS),
        ]
    )
    page = ROOT / "docs" / "parallelism.md"
    before, rest = page.read_text().split("<!-- equivalence -->\n")
    after = rest.split("<!-- /equivalence -->")[1]
    page.write_text(f"{before}<!-- equivalence -->\n{text}\n<!-- /equivalence -->{after}")


if __name__ == "__main__":
    sys.exit(main())
