"""Sizes as symbols: the config's program is traced with a prime in place of every dim that a mesh or a batch changes.

An axis of any array in the trace is then a product of a number and of primes, and says by itself what it is made of:
one of (rows x positions x choices of experts) is the tokens' entries for their experts, one of (kv heads x 4) the query
heads. The size of every array on any mesh and batch follows, without tracing again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from maxlm.config import Config, ModelConfig
from maxlm.model.moe import capacity
from maxlm.resolve import leaves

SYMBOLS = (
    "rows",  # of a microbatch
    "chunks",  # that the loss cuts a row into
    "chunk",  # positions of a row in one of them; chunks x chunk are the positions of a row
    "layers",  # cycles of `model.attention.windows` that are scanned
    "embed",
    "kv_heads",
    "mlp",
    "expert_mlp",
    "shared_mlp",
    "vocab",
    "experts",  # of a group
    "places",  # that are learned
    "query_latent",
    "kv_latent",
)
"""What is a prime in a trace."""

FLAGS = (
    "cut_embed",  # 1 / fsdp, of what is stored
    "cut_stream",  # 1 / tensor, of the positions between the tensor-parallel regions
    "cut_experts",  # 1 / expert, of the experts' matrices
    "gathers_weights",  # 1 where fsdp is above one, else 0
    "gathers_stream",  # 1 where tensor is above one and the stream's positions are cut over it, else 0
    "sums_stream",  # 1 where tensor is above one, else 0
    "units",  # microbatches of a pipeline, where the trace is of one
    "micros",  # microbatches that gradients are added up over
    "regions",  # rows that a device keeps for the experts, over the entries of its own tokens
)
"""What else a mesh multiplies a size by."""

COLUMNS = (*SYMBOLS, *FLAGS)
PLACE = {name: i for i, name in enumerate(COLUMNS)}


class Size(NamedTuple):
    """A number times powers of `COLUMNS`."""

    number: float
    exponents: tuple[int, ...]

    def times(self, number: float = 1.0, **powers: int) -> Size:
        """The size, multiplied."""
        exponents = list(self.exponents)
        for name, power in powers.items():
            exponents[PLACE[name]] += power
        return Size(self.number * number, tuple(exponents))

    def by(self, other: Size) -> Size:
        """The product of two."""
        exponents = tuple(a + b for a, b in zip(self.exponents, other.exponents, strict=True))
        return Size(self.number * other.number, exponents)

    def has(self, *names: str) -> bool:
        """Whether all of these are in it."""
        return all(self.exponents[PLACE[name]] for name in names)


class Proxy(NamedTuple):
    """config: with primes. primes: by symbol."""

    config: Config
    primes: Mapping[str, int]


def proxy(config: Config) -> Proxy:
    """The resolved config with primes in the place of its symbols, everything else as it is.

    The mesh of the proxy is one device. Where the batch is accumulated, it is in two microbatches.
    """
    model = config.model
    numbers = {abs(value) for _, _, value in leaves(model) if isinstance(value, int) and value}
    found = (n for n in range(401, 10_000, 2) if all(n % d for d in range(3, math.isqrt(n) + 1, 2)))
    usable = (n for n in found if all(number % n for number in numbers))
    primes = {name: next(usable) for name in SYMBOLS} | {"places": 1_000_003}
    accumulation = min(config.train.accumulation, 2)
    data = dataclasses.replace(
        config.data,
        batch_size=primes["rows"] * accumulation,
        sequence_length=primes["chunks"] * primes["chunk"],
        phases={},
    )
    train = dataclasses.replace(
        config.train, accumulation=accumulation, loss_chunk=primes["rows"] * primes["chunk"], norms_every=0
    )
    parallel = dataclasses.replace(config.parallel, data=1, fsdp=1, pipeline=1, context=1, expert=1, tensor=1)
    return Proxy(
        dataclasses.replace(config, model=_model(model, primes), data=data, train=train, parallel=parallel), primes
    )


def _model(model: ModelConfig, primes: Mapping[str, int]) -> ModelConfig:
    attention, moe, latent = model.attention, model.moe, model.attention.latent
    cycle = len(attention.windows)
    rest = (model.num_layers - moe.dense_layers) % cycle
    return dataclasses.replace(
        model,
        vocab_size=primes["vocab"],
        embed_dim=primes["embed"],
        num_layers=moe.dense_layers + primes["layers"] * cycle + rest,
        attention=dataclasses.replace(
            attention,
            kv_heads=primes["kv_heads"],
            q_heads=primes["kv_heads"] * (attention.q_heads // attention.kv_heads),
            latent=dataclasses.replace(
                latent,
                query_dim=primes["query_latent"] if latent.query_dim else 0,
                kv_dim=primes["kv_latent"] if latent.kv_dim else 0,
            ),
        ),
        mlp=dataclasses.replace(model.mlp, dim=primes["mlp"]),
        moe=dataclasses.replace(
            moe,
            experts=primes["experts"] * moe.groups,
            dim=primes["expert_mlp"],
            shared_dim=primes["shared_mlp"] if moe.shared_dim else 0,
        )
        if moe.experts
        else moe,
        learned_positions=primes["places"] if model.learned_positions else 0,
    )


def size_of(shape: tuple[int, ...], itemsize: int, primes: Mapping[str, int]) -> Size:
    """The bytes of an array of the trace."""
    number, exponents = float(itemsize), [0] * len(COLUMNS)
    for axis in shape:
        for name, prime in primes.items():
            while axis and axis % prime == 0:
                axis //= prime
                exponents[PLACE[name]] += 1
        number *= axis
    return Size(number, tuple(exponents))


def values(config: Config) -> np.ndarray:
    """What each of `COLUMNS` is on a device of the resolved config's mesh: (columns,) float64."""
    model, parallel, moe = config.model, config.parallel, config.model.moe
    accumulation, tensor, context = config.train.accumulation, parallel.tensor, parallel.context
    rows = config.data.batch_size // accumulation
    batch_shards = parallel.data * parallel.fsdp * parallel.expert
    length = config.data.sequence_length // context
    chunks = -(-rows // batch_shards * length // config.train.loss_chunk)
    scanned = (model.num_layers - moe.dense_layers) // len(model.attention.windows)
    stream = tensor if length % tensor == 0 and parallel.pipeline == 1 else 1
    held = moe.experts // parallel.expert if moe.experts else 1
    sent = float(min(moe.active, held))  # of a token to one device, at most
    if moe.capacity_factor:
        sent = min(sent, held * capacity(moe, config.data.sequence_length) / config.data.sequence_length)
    found = {
        "rows": rows / batch_shards,
        "chunks": chunks,
        "chunk": length / chunks,
        "layers": scanned / parallel.pipeline,
        "embed": model.embed_dim,
        "kv_heads": model.attention.kv_heads / tensor,
        "mlp": model.mlp.dim / tensor,
        "expert_mlp": moe.dim / tensor,
        "shared_mlp": moe.shared_dim / tensor,
        "vocab": model.vocab_size / tensor,
        "experts": moe.experts // moe.groups,
        "places": model.learned_positions,
        "query_latent": model.attention.latent.query_dim,
        "kv_latent": model.attention.latent.kv_dim,
        "cut_embed": 1 / parallel.fsdp,
        "cut_stream": 1 / stream,
        "cut_experts": 1 / parallel.expert,
        "gathers_weights": float(parallel.fsdp > 1),
        "gathers_stream": float(stream > 1),
        "sums_stream": float(tensor > 1),
        "units": accumulation if parallel.pipeline > 1 else 1,
        "micros": accumulation,
        "regions": parallel.expert * sent / moe.active if parallel.expert > 1 else 1.0,
    }
    return np.array([found[name] for name in COLUMNS])


class Sizes:
    """Many sizes, evaluated together."""

    def __init__(self, sizes: Sequence[Size]):
        self.numbers = np.array([size.number for size in sizes])
        self.exponents = np.array([size.exponents for size in sizes], float).reshape(-1, len(COLUMNS)).T

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """In bytes, for what `values` gives: (sizes,)."""
        logs = np.log(np.where(columns > 0, columns, 1.0))
        nothing = (columns == 0).astype(float) @ self.exponents  # has a factor of nought
        return np.where(nothing, 0.0, self.numbers * np.exp(logs @ self.exponents))
