"""Measures MaxLM on this machine's CPU, side by side with a PyTorch peer and with the machine's own matrix products.

    python tools/bench.py [--seconds=SECONDS] [--json=PATH] [--only=step,start,save,loader]

step: our training step, the same model in PyTorch (Hugging Face's LlamaForCausalLM with scaled-dot-product attention,
  eager and compiled) and plain matrix products through JAX. Each runs in its own process; they take turns, ten
  seconds each after some that are not counted, and sleep meanwhile, so that others' work slows all of them alike. A
  rate is the median turn's, a ratio the median over rounds of the quotient of two neighbours, a peak the best turn's.
start: from the start of the process `maxlm train` to its first step done, with an empty compilation cache and with the
  one that this left behind.
save: what one asynchronous checkpoint takes from the loop. That it is written on cores which the next steps use as well
  is not counted.
loader: batches alone, without prefetch.

This file is the config of the runs that `start` measures as well: `maxlm train --config=tools/bench.py`.
Peers need `pip install -e '.[bench]'`; without it they are left out, which is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from maxlm.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    MlpConfig,
    ModelConfig,
    OptimConfig,
    StoreConfig,
    TokenizerConfig,
    TrainConfig,
)
from maxlm.resolve import as_config_dict, resolve

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "bfloat16")
PARTS = ("step", "start", "save", "loader")
SETTLE_SECONDS = 6.0  # ahead of a turn, not counted
TURN_SECONDS = 10.0
TURN_STEPS = 2  # at least, of a turn and ahead of it alike
LOADER_BATCHES = (4, 64)  # rows: the bench's own, and one in which the cost of a call is spread further

# What is aimed at, as (figure, at least or at most, value); printed beside what was measured.
AIMS: tuple[tuple[str, str, float], ...] = (
    ("float32: ours / faster peer", ">=", 1.3),
    ("bfloat16: ours / faster peer", ">=", 0.85),
    ("float32: fraction of peak, causal-exact", ">=", 0.5),
    ("start, cold cache, s", "<=", 25.0),
    ("start, warm cache, s", "<=", 8.0),
    ("save, stall of the loop, s", "<=", 1.2),
    ("loader, tokens/s", ">=", 5e6),
)


def bench_config(precision: str = "float32", corpus: str = "", rows: int = 4) -> Config:
    """The bench's run, unresolved: width 512, 8 layers, 8 heads, MLP 1,408, S 512, V 32,000, B 4, AdamW."""
    return Config(
        name="bench",
        model=ModelConfig(
            vocab_size=32_000,
            embed_dim=512,
            num_layers=8,
            attention=AttentionConfig(q_heads=8),
            mlp=MlpConfig(dim=1408),
        ),
        data=DataConfig(
            stores={"bench": StoreConfig(source=f"text:{corpus}/*.txt")},
            tokenizer=TokenizerConfig(kind="bytes"),
            sequence_length=512,
            batch_size=rows,
        ),
        optim=OptimConfig(optimizer="adamw"),
        train=TrainConfig(precision=precision, log_every=1),
        checkpoint=CheckpointConfig(),
    )


def get_config() -> Any:
    """What `maxlm train --config=tools/bench.py` runs, on the text that $MAXLM_BENCH_CORPUS holds."""
    return as_config_dict(bench_config(corpus=os.environ.get("MAXLM_BENCH_CORPUS", "corpus")))


# --- subjects: each is a function that makes ready in its own process and returns what one turn repeats ---------------


class Subject(NamedTuple):
    """turn: does the work once and waits for it. work: tokens, or FLOPs, that this is. note: how it was set up."""

    turn: Callable[[], None]
    work: float
    note: str


def our_step(dtype: str) -> Subject:
    """The program that `maxlm train` runs, on random tokens."""
    import jax
    import numpy as np

    from maxlm.data.batch import Batch
    from maxlm.parallel.mesh import make_mesh
    from maxlm.train.setup import make_setup, place_batch
    from maxlm.train.state import make_state

    config = resolve(bench_config(dtype), devices=jax.device_count())
    rows, positions = shape = config.data.batch_size, config.data.sequence_length
    setup = make_setup(config, make_mesh(config.parallel))
    tokens = random_tokens(rows, positions + 1, config.model.vocab_size)
    ones = np.ones(shape, np.int32)
    index = np.broadcast_to(np.arange(positions, dtype=np.int32), shape)
    host = Batch(tokens[:, :-1], tokens[:, 1:], ones, index, ones.astype(np.float32))
    batch = place_batch(setup.mesh, shape, lambda part: Batch(*(x[part] for x in host)))
    program = setup.compile(*shape)
    state = make_state(config, setup.optimizer, setup.shardings)

    def turn() -> None:
        nonlocal state
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)

    return Subject(turn, rows * positions, f"attention by {setup.attention}")


def peer_eager(dtype: str) -> Subject:
    """PyTorch, operation by operation."""
    return _peer(dtype, compiled=False)


def peer_compiled(dtype: str) -> Subject:
    """PyTorch through torch.compile."""
    return _peer(dtype, compiled=True)


def _peer(dtype: str, *, compiled: bool) -> Subject:
    """In bfloat16 the faster of autocast over float32 weights, and weights and moments in bfloat16 altogether."""
    if dtype == "float32":
        return _peer_variant(compiled=compiled, weights="float32", autocast=False)
    variants = [_peer_variant(compiled=compiled, weights=weights, autocast=weights == "float32") for weights in DTYPES]
    seconds = [min(timed(variant.turn) for _ in range(3)) for variant in variants]
    return variants[seconds.index(min(seconds))]


def _peer_variant(*, compiled: bool, weights: str, autocast: bool) -> Subject:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = resolve(bench_config())
    model, optim, attention = config.model, config.optim, config.model.attention
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    dims: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": model.mlp.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.q_heads,
        "num_key_value_heads": attention.kv_heads,
        "max_position_embeddings": config.data.sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    peer = LlamaForCausalLM(LlamaConfig(**dims))
    peer.to(getattr(torch, weights))
    update = torch.optim.AdamW(
        peer.parameters(),
        lr=optim.peak_lr,
        betas=(optim.b1, optim.b2),
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    rows, positions = config.data.batch_size, config.data.sequence_length
    tokens = torch.from_numpy(random_tokens(rows, positions, model.vocab_size)).long()

    def loss() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return peer(input_ids=tokens, labels=tokens).loss

    forward = torch.compile(loss) if compiled else loss

    def turn() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), optim.clip_norm)
        update.step()
        update.zero_grad(set_to_none=True)

    turn()
    how = "autocast over float32 weights" if autocast else f"weights and moments in {weights}"
    return Subject(turn, rows * positions, f"PyTorch {torch.__version__}, fused AdamW, {how}")


def matrix_products(dtype: str) -> Subject:
    """Square products of 2,048 through JAX, with float32 sums: the machine's peak."""
    import jax
    import jax.numpy as jnp

    size = 2048
    square = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return Subject(lambda: product(square).block_until_ready(), 2 * size**3, f"{size} x {size} by {size} x {size}")


SUBJECTS: dict[str, Callable[[str], Subject]] = {
    "ours": our_step,
    "peer eager": peer_eager,
    "peer compiled": peer_compiled,
    "products": matrix_products,
}


def random_tokens(rows: int, positions: int, vocab: int) -> Any:
    """Int32 (rows, positions), the same every time."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab, (rows, positions), np.int32)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


# --- taking turns -----------------------------------------------------------------------------------------------------


def serve(name: str, dtype: str, pipe: Connection) -> None:
    """A subject's process: sends its note, then the rate of a turn for every message, until told to stop."""
    try:
        subject = SUBJECTS[name](dtype)
        for _ in range(2):
            subject.turn()
    except Exception as error:  # a peer that cannot run here must not take the bench with it
        pipe.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        return
    pipe.send({"note": subject.note})
    while pipe.recv():
        # Not counted: memory given back before the sleep, a virtual machine is slow to give again, for several steps.
        rate(subject, SETTLE_SECONDS)
        pipe.send(rate(subject, TURN_SECONDS))


def rate(subject: Subject, seconds: float) -> float:
    """Work a second of steps made for so many seconds."""
    begun, count = time.perf_counter(), 0
    while count < TURN_STEPS or time.perf_counter() - begun < seconds:
        subject.turn()
        count += 1
    return count * subject.work / (time.perf_counter() - begun)


@contextmanager
def at_work(name: str, dtype: str) -> Iterator[tuple[Connection, dict[str, str]]]:
    """A subject's process and its first message."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(name, dtype, there), daemon=True)
    process.start()
    there.close()
    try:
        try:
            yield here, here.recv()
        except EOFError:
            yield here, {"error": f"its process ended with exit code {process.exitcode}"}
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def measure_steps(dtype: str, *, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Rates of every subject, turn by turn: tokens/s, and FLOP/s of `products`; notes and errors by subject."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        pipes: dict[str, Connection] = {}
        notes: dict[str, str] = {}
        errors: dict[str, str] = {}
        for name in SUBJECTS:
            if name.startswith("peer") and not all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
                errors[name] = "torch and transformers are not installed: pip install -e '.[bench]'"
                continue
            say(f"{dtype}: making {name} ready")
            pipe, first = stack.enter_context(at_work(name, dtype))
            if "error" in first:
                errors[name] = first["error"]
            else:
                pipes[name], notes[name] = pipe, first["note"]
        rates: dict[str, list[float]] = {name: [] for name in pipes}
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(next(iter(rates.values()), [0.0] * 3)) < 3:
            for name, pipe in pipes.items():
                pipe.send(True)
                rates[name].append(pipe.recv())
            say(f"{dtype}: " + ", ".join(f"{name} {values[-1]:,.4g}" for name, values in rates.items()))
    return {"rates": rates, "notes": notes, "errors": errors}


def step_figures(dtype: str, measured: dict[str, Any]) -> dict[str, float]:
    """The figures that a reader compares, from the turns of one dtype."""
    from maxlm.model.flops import ledger

    config = resolve(bench_config(dtype))
    flops = ledger(config.model, sequence_length=config.data.sequence_length)
    rates = measured["rates"]
    figures = {f"{dtype}: {name}, tokens/s": statistics.median(v) for name, v in rates.items() if name != "products"}
    if "products" in rates:
        peak = max(rates["products"])
        figures[f"{dtype}: peak of matrix products, GFLOP/s"] = peak / 1e9
        for name in [name for name in rates if name != "products"]:
            who = "" if name == "ours" else f", {name}"
            speed = statistics.median(rates[name])
            figures[f"{dtype}: fraction of peak, 6N{who}"] = speed * flops.six_n / peak
            figures[f"{dtype}: fraction of peak, causal-exact{who}"] = speed * flops.causal_exact / peak
    if "ours" in rates:
        ratios = {
            name: statistics.median(ours / peer for ours, peer in zip(rates["ours"], rates[name], strict=True))
            for name in rates
            if name.startswith("peer")
        }
        figures |= {f"{dtype}: ours / {name}": ratio for name, ratio in ratios.items()}
        if ratios:
            figures[f"{dtype}: ours / faster peer"] = min(ratios.values())
    return figures


# --- start, save, loader ----------------------------------------------------------------------------------------------


def write_corpus(folder: Path) -> Path:
    """Some four million characters of made-up text."""
    folder.mkdir()
    dice = random.Random(0)
    for number in range(64):
        text = " ".join(f"{dice.randrange(10**6)}" for _ in range(9000))
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


def measure_start(folder: Path, corpus: Path) -> dict[str, float]:
    """Seconds from the start of `maxlm train` to the line of its first step, its data being prepared already."""
    flags = ["--config=tools/bench.py", f"--config.data.cache_dir={folder / 'data'}"]
    environment = {**os.environ, "MAXLM_BENCH_CORPUS": str(corpus)}
    environment.pop("GLIBC_TUNABLES", None)  # a user's command has to set it itself, which takes a second start
    maxlm = [sys.executable, "-m", "maxlm.cli"]
    prepare = [*maxlm, "prepare", *flags, f"--workdir={folder / 'prepare'}"]
    subprocess.run(prepare, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    figures = {}
    for kind in ("cold", "warm"):
        train = [*maxlm, "train", *flags, f"--workdir={folder / kind}"]
        train.append(f"--config.train.compilation_cache={folder / 'programs'}")
        begun = time.perf_counter()
        with subprocess.Popen(train, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.split()[:1] == ["step"]:
                    figures[f"start, {kind} cache, s"] = time.perf_counter() - begun
                    break
            process.kill()
        if f"start, {kind} cache, s" not in figures:
            raise RuntimeError(f"maxlm train ended before its first step; run: {' '.join(train)}")
    return figures


def measure_save(folder: Path) -> dict[str, float]:
    """Seconds that the second save of a run keeps the loop, and until it is committed while nothing else runs."""
    import jax

    from maxlm.checkpoint.manager import Checkpointer
    from maxlm.parallel.mesh import make_mesh
    from maxlm.train.setup import make_setup
    from maxlm.train.state import make_state

    config = resolve(bench_config(), devices=jax.device_count())
    setup = make_setup(config, make_mesh(config.parallel))
    state = jax.block_until_ready(make_state(config, setup.optimizer, setup.shardings))
    with Checkpointer(folder / "checkpoints", config.checkpoint, log=print) as checkpointer:
        checkpointer.prepare(setup.abstract_state())
        for step in (1, 2):
            begun = time.perf_counter()
            result = checkpointer.save(step, state, metadata={})
            checkpointer.wait()
            committed = time.perf_counter() - begun
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {
        "save, stall of the loop, s": result.stall_seconds,
        "save, until committed, s": committed,
        "save, size of the state, MB": size / 1e6,
    }


def measure_loader(folder: Path, corpus: Path, *, seconds: float) -> dict[str, float]:
    """Tokens a second of `Loader.batch` alone."""
    from maxlm.data.loader import Loader
    from maxlm.data.prepare import prepare_data

    figures = {}
    for rows in LOADER_BATCHES:
        config = resolve(bench_config(corpus=str(corpus), rows=rows))
        loader = Loader(prepare_data(config, folder / "loader").stores, config.data, seed=config.seed)
        step, end = 0, time.perf_counter() + seconds
        begun = time.perf_counter()
        while time.perf_counter() < end:
            loader.batch(step)
            step += 1
        rate = step * rows * config.data.sequence_length / (time.perf_counter() - begun)
        figures["loader, tokens/s" if rows == LOADER_BATCHES[0] else f"loader, tokens/s in batches of {rows} rows"] = (
            rate
        )
    return figures


# --- report -----------------------------------------------------------------------------------------------------------


def report(console: Console, figures: dict[str, float], notes: list[str]) -> None:
    """Prints the figures, those with an aim beside it, and the notes."""
    aims = {name: (sense, value) for name, sense, value in AIMS}
    table = Table("figure", "measured", "aim", "", box=None, pad_edge=False)
    for name, value in figures.items():
        sense, aim = aims.get(name, ("", 0.0))
        met = "" if not sense else "met" if (value >= aim) == (sense == ">=") else "missed"
        table.add_row(name, f"{value:,.4g}", f"{sense} {aim:,.4g}" if sense else "", met)
    console.print(table)
    for note in notes:
        console.print(note)


def main() -> None:
    """Reads the command line, measures what is asked for and reports it."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="of taking turns, for each dtype")
    parser.add_argument("--json", type=Path, help="also write everything, turn by turn, to this file")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to measure, out of {','.join(PARTS)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="dtypes of `step`")
    given = parser.parse_args()
    parts, dtypes = given.only.split(","), given.dtypes.split(",")
    if unknown := (set(parts) - set(PARTS)) | (set(dtypes) - set(DTYPES)):
        parser.error(
            f"{', '.join(sorted(unknown))} cannot be measured; parts: {','.join(PARTS)}; dtypes: {','.join(DTYPES)}"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    # For every subject alike: without huge pages a sixth of our step, and as much of the peer's, goes into page faults.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    console = Console(soft_wrap=True, markup=False, emoji=False)
    figures: dict[str, float] = {}
    notes: list[str] = []
    turns: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="maxlm_bench_") as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus")
        for dtype in dtypes if "step" in parts else ():
            turns[dtype] = measure_steps(dtype, seconds=given.seconds, say=lambda line: print(line, file=sys.stderr))
            figures |= step_figures(dtype, turns[dtype])
            notes += [f"{dtype}, {who}: {what}" for who, what in turns[dtype]["notes"].items()]
            notes += [f"{dtype}, {who}: left out. {what}" for who, what in turns[dtype]["errors"].items()]
        if "start" in parts:
            figures |= measure_start(folder, corpus)
        if "save" in parts:
            figures |= measure_save(folder)
        if "loader" in parts:
            figures |= measure_loader(folder, corpus, seconds=3.0)
    machine = {"cores": cores(), "machine": platform.machine(), "load": os.getloadavg()[0]}
    notes.append(f"{machine['cores']} cores ({machine['machine']}), load average {machine['load']:.1f} at the end")
    report(console, figures, notes)
    if given.json:
        found = {"figures": figures, "notes": notes, "turns": turns, "machine": machine}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
