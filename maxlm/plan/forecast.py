"""A step's time and memory on the CPUs of this machine, foretold: work as traced, at rates measured on a few kernels.

No table knows what a machine's cores do, so what a step is made of is measured in small, with the run's own kernels and
shapes: a layer's products with their gradients, attention, the loss, elementwise work, the optimizer and a sum over
devices. Virtual devices share the cores, so that the work of all of them counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.allocator import give_back_at_once
from maxlm.config import Config
from maxlm.kernels.attention import Mask, choose, features
from maxlm.kernels.chunked import chunked
from maxlm.kernels.matmul import einsum
from maxlm.model.flops import positions_seen
from maxlm.model.layers import rms_norm
from maxlm.model.loss import chunked_cross_entropy
from maxlm.model.mlp import GATED, UNGATED
from maxlm.plan.analytic.backends import names_results
from maxlm.plan.analytic.memory import facts, state_bytes, state_leaves
from maxlm.plan.analytic.symbols import PLACE, values
from maxlm.plan.analytic.walk import KINDS, TOKENS, Work
from maxlm.plan.collectives import Traffic
from maxlm.plan.plan import Plan
from maxlm.train.outlook import at_heaviest
from maxlm.train.watermark import Watermark

UNCACHED = 2**26  # bytes, more than a core's share of any cache
SECONDS = 0.8  # of measuring each kernel, besides its compilation
FLOPS = 1e10  # of a run of a kernel that is measured, about: some fifth of a second on two cores
POSITIONS = 1024  # of such a run at least, where the step has as many: with fewer, each takes longer
ROW = 4096  # positions of attention likewise: from there on its blocks are as large as they get


class Rates(NamedTuple):
    """Measured on all cores together. Of kernels with more than `FLOPS` a part is, and counted up.

    products: FLOP/s of a layer's products, gradients among them.
    attend, attend_back: seconds of a layer's attention on a whole row with a device's heads, on average over the
      layers, whose windows may differ: forward, and the backward pass besides.
    loss: seconds a token, gradients included.
    elementwise: bytes a second, read and written.
    optimizer: seconds a parameter.
    meet: seconds of a collective of all devices that moves next to nothing, and besides, send: bytes of its payload a
      second. No collectives are priced (meet 0, send infinite) with one device or on a mesh larger than this process's.
    scratch: bytes that a device takes while a step runs, beside what the compiler plans: libraries behind products lay
      their operands out anew. Of kernels that are measured in part it is that of the part, and too low.
    seconds: that measuring took, compilation included.
    """

    products: float
    attend: float
    attend_back: float
    loss: float
    elementwise: float
    optimizer: float
    meet: float
    send: float
    scratch: float
    seconds: float


class Forecast(NamedTuple):
    """seconds: of a step, by part. bytes: of all devices of this machine, state included."""

    parts: Mapping[str, float]
    bytes: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts.values())


def calibrate(config: Config, *, seconds: float = SECONDS) -> Rates:
    """The rates of this process's CPUs for the kernels of a resolved config, in the shapes of one device.

    Afterwards the process gives memory back at once (`give_back_at_once`), and takes a tenth longer for a step.

    Args:
      seconds: of measuring each of them.
    """
    begun = time.perf_counter()
    model, parallel, dtype = config.model, config.parallel, jnp.dtype(config.train.precision)
    shards = max(parallel.data * parallel.fsdp * parallel.expert, 1)
    rows = max(config.data.batch_size // config.train.accumulation // shards, 1)
    length, width = config.data.sequence_length // parallel.context, model.embed_dim
    layer = _part(rows, length, width, (model.moe.dim if model.moe.experts else model.mlp.dim) // parallel.tensor)
    x = jnp.ones((layer.rows, layer.length, width), dtype)
    w = jnp.ones((width, layer.columns), jnp.float32)
    y = jnp.ones((layer.rows, layer.length, layer.columns), dtype)

    def product(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
        out, pull = jax.vjp(lambda x, w: einsum("bsd,df->bsf", x, w, dtype=dtype), x, w)
        return out, pull(g)

    vocab = model.vocab_size // parallel.tensor
    judged = _part(rows, length, width, vocab)
    stream = jnp.ones((judged.rows, judged.length, width), dtype)
    head = jnp.ones((width, judged.columns), jnp.float32) / width

    def loss(x: jax.Array, head: jax.Array) -> jax.Array:
        targets, weights = jnp.zeros(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2], jnp.float32)
        sums = chunked_cross_entropy(
            x, head, targets, weights, chunk=config.train.loss_chunk, softcap=model.logits_softcap, z_loss=0.0
        )
        return sums.nll_sum

    def elementwise(x: jax.Array, y: jax.Array) -> Any:
        gate = GATED[model.mlp.kind] if model.mlp.gated else lambda a, b: UNGATED[model.mlp.kind](a) + b
        outs, pull = jax.vjp(lambda x, y: (rms_norm(x, jnp.ones((width,)), model.norm_epsilon), gate(y, y)), x, y)
        return outs, pull((x, y))

    # As a step's arrays, these are in no cache when their turn comes.
    copies = max(round(UNCACHED / (x.nbytes + y.nbytes)), 1)
    wide, gated = (jnp.ones((copies * layer.rows, *array.shape[1:]), dtype) for array in (x, y))
    numbers = [jnp.full((UNCACHED // 16,), 1.0 + i, jnp.float32) for i in range(4)]

    def update(p: jax.Array, g: jax.Array, *moments: jax.Array) -> Any:
        norm = jnp.sqrt(jnp.sum(jnp.square(g)))
        (m, s), g = moments, g / jnp.maximum(norm, 1.0)
        m, s = 0.9 * m + 0.1 * g, 0.95 * s + 0.05 * g * g
        new = p - 1e-3 * (m / (jnp.sqrt(s) + 1e-8) + 0.1 * p), m, s
        return [jnp.where(jnp.isfinite(norm), a, b) for a, b in zip(new, (p, *moments), strict=True)]

    few, many = _exchanges(math.prod(parallel.sizes.values()), seconds)
    loss_and_gradients = jax.value_and_grad(loss, argnums=(0, 1))
    forward, both = _attention_seconds(config, seconds)
    loss_seconds = _measured(loss_and_gradients, stream, head, seconds=seconds)
    timed = Rates(
        products=6.0 * x.size * layer.columns / _measured(product, x, w, y, seconds=seconds),
        attend=forward,
        attend_back=max(both - forward, forward),
        loss=loss_seconds / (judged.rows * judged.length) * (vocab / judged.columns),
        # Of each array the forward pass reads one and writes one; the backward pass reads two and writes one.
        elementwise=5.0 * (wide.nbytes + gated.nbytes) / _measured(elementwise, wide, gated, seconds=seconds),
        optimizer=_measured(update, *numbers, seconds=seconds) / numbers[0].size,
        meet=few,
        send=_MANY * 4 / (many - few) if many > few else math.inf,
        scratch=0.0,
        seconds=0.0,
    )
    give_back_at_once()  # after all that is timed
    scratch = max(_beside(product, x, w, y), _beside(loss_and_gradients, stream, head))
    return timed._replace(scratch=scratch, seconds=time.perf_counter() - begun)


class _Part(NamedTuple):
    """Of a product (rows, length, width) x (width, columns)."""

    rows: int
    length: int
    columns: int


def _part(rows: int, length: int, width: int, columns: int) -> _Part:
    """What is measured of a product with both its gradients: all of it up to `FLOPS`.

    Of more, fewer rows and positions are, as long as there are `POSITIONS`, and then fewer columns.
    """

    def room(*others: int) -> int:
        return int(FLOPS // (6 * width * math.prod(others)))

    rows = min(rows, max(room(length, columns), -(-POSITIONS // length)))
    length = min(length, max(room(rows, columns), POSITIONS))
    fit = room(rows, length)
    return _Part(rows, length, columns if fit >= columns else min(columns, max(fit // 64, 1) * 64))


def _attention_seconds(config: Config, seconds: float) -> tuple[float, float]:
    """Of a layer's attention on a whole row with a device's heads, on average: forward, and with the backward pass."""
    attention, parallel, dtype = config.model.attention, config.parallel, jnp.dtype(config.train.precision)
    heads, groups = attention.kv_heads // parallel.tensor, attention.q_heads // attention.kv_heads
    whole, dims = config.data.sequence_length, {"head_dim": attention.head_dim, "value_dim": attention.value_dim}

    def kernel(mask: Mask) -> Callable[..., jax.Array]:
        """That of the whole row, wherever a part of it is measured."""
        # Over `context` every shard's queries meet the keys of all shards: together what a whole row takes, in blocks.
        if parallel.context > 1:
            return functools.partial(chunked, together=False)
        needs, head_dim = features(mask, **dims), attention.head_dim
        asked = choose(platform="cpu", dtype=dtype, head_dim=head_dim, needs=needs, queries=whole, keys=whole)
        return asked.function

    def attend(window: int, segments: jax.Array | None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = Mask(scale=attention.head_dim**-0.5, window=window, segments_q=segments, segments_k=segments)
        return kernel(mask)(q, k, v, mask)

    def attend_and_back(window: int, segments: jax.Array | None, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(attend, window, segments), q, k, v)
        return out, pull(out)

    def flops(window: int, row: int) -> float:
        """Of one kv head, with the backward pass: seven products of which two are the forward pass's."""
        return 7.0 * row * positions_seen(window, row) * groups * sum(dims.values())

    def taken(function: Callable[..., Any], window: int) -> float:
        row, of_all = whole, flops(window, whole) * heads
        while row >= 2 * ROW and flops(window, row) > FLOPS:
            row //= 2
        measured = min(heads, max(int(FLOPS // flops(window, row)), 1))
        q = jnp.ones((1, row, measured * groups, attention.head_dim), dtype)
        k = jnp.ones((1, row, measured, attention.head_dim), dtype)
        v = jnp.ones((1, row, measured, attention.value_dim), dtype)
        segments = jnp.zeros((1, row), jnp.int32) if config.data.mask_documents else None
        took = _measured(functools.partial(function, window, segments), q, k, v, seconds=seconds)
        return took * (of_all / (flops(window, row) * measured))

    forward, both = (
        sum(share * taken(function, window) for window, share in _windows(config).items())
        for function in (attend, attend_and_back)
    )
    return forward, both


def _windows(config: Config) -> dict[int, float]:
    """Each window of the layers with its share of them; one that a row does not fill is none."""
    windows, row = config.model.attention.windows, config.data.sequence_length
    layers = config.model.num_layers + config.model.mtp_layers
    counts = Counter(windows[i % len(windows)] for i in range(layers))
    shares: dict[int, float] = {}
    for window, count in counts.items():
        seen = window if window < row else 0
        shares[seen] = shares.get(seen, 0.0) + count / layers
    return shares


def _measured(function: Callable[..., Any], *args: jax.Array, seconds: float) -> float:
    """The median time of a run within a compiled loop, as a step's kernels run: without what sending one off costs."""

    def repeat(count: jax.Array, *args: jax.Array) -> Any:
        # Results are the loop's own, or XLA would compute no more of them than is looked at; and each run needs
        # something of the one before, or it could be done once for all.
        def body(_: jax.Array, outs: list[jax.Array]) -> list[jax.Array]:
            before = sum((out.reshape(-1)[0].astype(jnp.float32) for out in outs), jnp.zeros(()))
            return jax.tree.leaves(function(args[0] + (before * 0).astype(args[0].dtype), *args[1:]))

        shapes = jax.tree.leaves(jax.eval_shape(function, *args))
        return jax.lax.fori_loop(0, count, body, [jnp.zeros(out.shape, out.dtype) for out in shapes])

    compiled = jax.jit(repeat)

    def run(count: int) -> float:
        begun = time.perf_counter()
        jax.block_until_ready(compiled(count, *args))
        return (time.perf_counter() - begun) / count

    run(1)  # compiles
    count = max(1, round(seconds / 5 / run(1)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(run(count))
    return sorted(times)[len(times) // 2]


_MANY = 2**18  # numbers of a collective that has much to move


def _exchanges(devices: int, seconds: float) -> tuple[float, float]:
    """Seconds of a sum over so many devices of this process, of one number and of `_MANY`; 0 where there are not."""
    if not 1 < devices <= jax.device_count():
        return 0.0, 0.0
    mesh = jax.sharding.Mesh(jax.devices()[:devices], "all")
    total = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    few, many = (_measured(total, jnp.ones((size,)), seconds=seconds) for size in (1, _MANY))
    return few, many


def _beside(function: Callable[..., Any], *args: jax.Array) -> float:
    """Bytes that a run takes beside its results and what the compiler plans; 0 where the system does not tell."""
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))  # what only the first run does
    grown = []
    for _ in range(3):
        watermark = Watermark()
        jax.block_until_ready(compiled(*args))
        grown.append(watermark.growth() or 0)
    planned = compiled_bytes(compiled) - sum(x.nbytes for x in args)
    return max(max(grown) - planned, 0.0)


def forecast(config: Config, rates: Rates, *, device_bytes: float, traffic: Sequence[Traffic]) -> Forecast:
    """Of a resolved config on as many virtual devices as its mesh has.

    Args:
      device_bytes: that the compiler says a device needs (`compiled_bytes`).
      traffic: the collectives of the compiled step.
    """
    parallel = config.parallel
    devices = math.prod(parallel.sizes.values())
    anatomy = facts(config, named=names_results(config, "cpu")).anatomy
    amounts = anatomy.amounts(values(config)) * devices
    done = {kind: 0.0 for kind in KINDS}
    for work, amount in zip(anatomy.work, amounts.tolist(), strict=True):
        if not _of_loss(work):
            done[work.kind] += amount
    # Layers are counted on all devices. On each of them they meet a microbatch's rows of its shard of the batch; the
    # `context` devices of a row share out its positions, and those of `tensor` its heads, of which `rates` are.
    shards = parallel.data * parallel.fsdp * parallel.expert
    rows = config.data.batch_size / shards / config.train.accumulation / parallel.context
    held = state_bytes(config, state_leaves(config.model, config.optim))
    tokens = config.data.batch_size * config.data.sequence_length
    parts = {
        "products": done["product"] / rates.products,
        "attention": rows * (done["attention_forward"] * rates.attend + done["attention_backward"] * rates.attend_back),
        "loss": (1 + config.model.mtp_layers) * tokens * parallel.tensor * rates.loss,
        "elementwise": done["traffic"] / rates.elementwise,
        "optimizer": held["parameters"] / 4 * devices * rates.optimizer,
        "collectives": sum(row.count * rates.meet + row.payload / rates.send for row in traffic),
    }
    return Forecast(parts, (device_bytes + rates.scratch) * devices)


def _of_loss(work: Work) -> bool:
    """Whether it is within what was measured of the loss: its products, and what is done to logits and in each chunk.

    What is done once to as many entries as the head has may be the optimizer's, or a cast of the table.
    """
    of_tokens = any(work.size.exponents[PLACE[name]] or work.trips.exponents[PLACE[name]] for name in TOKENS)
    return bool(work.size.exponents[PLACE["vocab"]]) and (work.kind == "product" or of_tokens)


def compiled_bytes(program: jax.stages.Compiled) -> float:
    """What the compiler says that a device needs while a step runs, state included."""
    found: Any = program.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return float(held + found.temp_size_in_bytes)


def on_this_machine(plan: Plan, config: Config) -> Plan:
    """A plan for CPUs with the time that this machine takes, calibrated in this process."""
    config = at_heaviest(config)
    with contextlib.suppress(RuntimeError):  # devices have started: what they are too few for is not timed
        jax.config.update("jax_num_cpu_devices", plan.devices)
    rates = calibrate(config)
    foretold = forecast(config, rates, device_bytes=float(plan.memory.total), traffic=plan.traffic)
    scratch = round(rates.scratch)
    memory = dataclasses.replace(
        plan.memory,
        total=plan.memory.total + scratch,
        components={**plan.memory.components, "scratch of libraries": scratch},
    )
    ruled, tokens = plan.forecast, plan.forecast.tokens
    rate = tokens / foretold.seconds if foretold.seconds else 0.0
    faster = rate / ruled.tokens_per_second if ruled.tokens_per_second else 0.0

    def scaled(mfu: float | None) -> float | None:
        """A share of a peak that a file of chips gave; the table has none of a CPU."""
        return None if mfu is None else mfu * faster

    timed = dataclasses.replace(
        ruled,
        seconds=foretold.seconds,
        parts=dict(foretold.parts),
        tokens_per_second=rate,
        mfu_causal=scaled(ruled.mfu_causal),
        mfu_6n=scaled(ruled.mfu_6n),
        # Are of the time by the rules, which this one is not.
        hidden=0.0,
        kernels=(),
        busiest=(),
    )
    notes = [note for note in plan.notes if "estimates no cycles" not in note and "priced by the rules" not in note]
    notes.append("times are calibrated on this machine's cores, which all the virtual devices share")
    if plan.traffic and not rates.meet:
        notes.append(
            f"collectives are not in the time: they are measured on {plan.devices} devices, and this process started "
            f"with {jax.device_count()}; plan in a process of its own, or with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={plan.devices}"
        )
    return dataclasses.replace(plan, memory=memory, forecast=timed, notes=tuple(notes))
