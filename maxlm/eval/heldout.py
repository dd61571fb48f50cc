"""Held-out quality in bits per byte, which does not depend on the tokenizer.

The figure is the nats of every token after the begin token of every held-out document, each document read alone,
over ln 2 and over the documents' bytes. No end token is counted.

A document with more tokens than fit into a window is cut into windows that overlap: the positions shared with the
window before serve as context only, so that every token is counted exactly once. Documents and windows shorter than a
row are put together in rows as segments that do not see each other; rotary positions that go by how long a text is
(longrope, dynamic) go by the window alone. The plan is pure NumPy and the same in every process; rows go through one
compiled program in batches of one shape.

Shapes: N windows, R rows, B rows of a batch, S positions of a row.
"""

from __future__ import annotations

import collections
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxlm.cluster import meet
from maxlm.config import Config
from maxlm.data.batch import Batch, empty_batch
from maxlm.data.loader import DataChanged
from maxlm.data.store import Split
from maxlm.model.decoder import document_lengths, merge
from maxlm.model.loss import token_nll
from maxlm.model.runtime import Runtime
from maxlm.parallel.sharding import named_sharding

if TYPE_CHECKING:
    from maxlm.data.prepare import Prepared
    from maxlm.train.setup import Setup


class Windows(NamedTuple):
    """The windows of some documents, in their order. A window predicts the tokens `start + 1 .. start + length`."""

    start: np.ndarray  # (N,) int64: global index of the first input token
    length: np.ndarray  # (N,) int64: input tokens, 1 to S
    context: np.ndarray  # (N,) int64: leading positions whose predictions the window before has counted


class Places(NamedTuple):
    """Where the windows lie in rows."""

    row: np.ndarray  # (N,) int64
    column: np.ndarray  # (N,) int64: the window's first position in its row
    rows: int


class HeldOut(NamedTuple):
    """The outcome of an evaluation over the held-out documents of a store."""

    bits_per_byte: float
    nats_per_token: float
    documents: int
    bytes: int
    tokens: int  # predicted: all but the begin tokens
    seconds: float


def plan_windows(offsets: np.ndarray, *, window: int, overlap: int) -> Windows:
    """Cuts documents into windows of at most `window` inputs, neighbours sharing `overlap` of them.

    Args:
      offsets: (documents + 1,) int64: where each document's tokens begin (its begin token first), and the end.
      window: positions S of a window.
      overlap: positions that a window shares with the one before, below `window`.

    Returns:
      The windows; a document without a token after its begin token has none.

    Raises:
      ValueError: when `overlap` leaves a window nothing to count.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap is {overlap}, but it has to be from 0 to {window - 1}, below the window of {window}")
    offsets = np.asarray(offsets, np.int64)
    predictions = np.maximum(np.diff(offsets) - 1, 0)
    stride = window - overlap
    # Every window but the first counts `stride` new predictions at most; a document without predictions has no window.
    counts = np.where(predictions > 0, 1 + np.maximum(-(-(predictions - window) // stride), 0), 0)
    document = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = index * stride
    return Windows(
        start=offsets[document] + begin,
        length=np.minimum(predictions[document] - begin, window),
        context=np.where(index > 0, overlap, 0),
    )


def place_windows(lengths: np.ndarray, *, window: int) -> Places:
    """Puts windows into as few rows as best-fit decreasing finds: the longest first, each where least room is left.

    Args:
      lengths: (N,) int64, each from 1 to `window`.
      window: positions S of a row.
    """
    row, column = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    room: list[list[int]] = [[] for _ in range(window + 1)]  # rows by positions left
    some = 0  # bit n is set when a row has n positions left, so that the best fit is found without a search
    rows = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = some >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            place = room[left].pop()
            if not room[left]:
                some ^= 1 << left
        else:
            left, place = window, rows
            rows += 1
        row[item], column[item] = place, window - left
        if left > length:
            room[left - length].append(place)
            some |= 1 << (left - length)
    return Places(row=row, column=column, rows=rows)


def batches(split: Split, windows: Windows, places: Places, *, batch_size: int, window: int) -> Iterator[Batch]:
    """The rows as NumPy batches (B, S) of one shape; the last is filled up with padding."""
    order = np.argsort(places.row, kind="stable")
    firsts = np.searchsorted(places.row[order], np.arange(0, places.rows + batch_size, batch_size))
    for number, (begin, end) in enumerate(zip(firsts[:-1], firsts[1:], strict=True)):
        batch = empty_batch(batch_size, window)
        tokens, targets, segments, positions, weights = (np.asarray(field) for field in batch)
        documents = np.zeros(batch_size, np.int32)
        for item in order[begin:end]:
            row, column = places.row[item] - number * batch_size, places.column[item]
            start, length = int(windows.start[item]), int(windows.length[item])
            piece = split.read(start, start + length + 1)
            span = slice(column, column + length)
            documents[row] += 1
            tokens[row, span], targets[row, span] = piece[:-1], piece[1:]
            segments[row, span], positions[row, span] = documents[row], np.arange(length)
            weights[row, column + windows.context[item] : column + length] = 1.0
        yield batch


class Sums(NamedTuple):
    """Sums over a batch, () float32 each."""

    nll: jax.Array  # nats
    weight: jax.Array  # tokens counted


@functools.partial(jax.jit, static_argnames=("graphdef", "runtime", "chunk", "softcap"))
def batch_sums(params: Any, batch: Batch, *, graphdef: Any, runtime: Runtime, chunk: int, softcap: float) -> Sums:
    """Nats and tokens of a batch (B, S); over a mesh these are sums over the whole of it, alike in every process."""
    model = merge(graphdef, params)
    batch = jax.tree.map(jnp.asarray, batch)
    batch, lengths = runtime.arrange((batch, document_lengths(batch.positions, batch.segments)))
    tokens, targets, segments, positions, weights = batch
    out = model.hidden(
        tokens,
        positions_BS=positions,
        segments_BS=segments,
        real_BS=segments > 0,
        runtime=runtime,
        longest=lengths,
    )
    nll = token_nll(
        out.hidden_BSD,
        model.head_matrix(),
        targets,
        chunk=chunk,
        softcap=softcap,
        spread=runtime.spread_loss,
    )
    return Sums(nll=(nll * weights).sum(), weight=weights.sum())


def place_whole(mesh: Mesh, batch: Batch) -> Batch:
    """A batch that every process holds whole, rows spread over the mesh."""
    sharding = named_sharding(mesh, ("batch", "seq"))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


def evaluate(
    params: Any,
    split: Split,
    *,
    config: Config,
    graphdef: Any,
    runtime: Runtime,
    put: Callable[[Batch], Batch],
    documents: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """Bits per byte of a store's held-out documents.

    Args:
      params: the model's parameters, a nested dict of arrays.
      split: the held-out documents.
      config: its `eval` section gives window, overlap and rows of a batch.
      graphdef: the model's structure, from `split_model`.
      runtime: how the model is run; its attention has to honour segments.
      put: places a NumPy batch (all rows of the whole mesh, the same in every process) on the devices.
      documents: how many documents to use, the first in the store's order, which is by hash; 0: all.
      progress: called with (batches done, batches in all) as results arrive.

    Raises:
      ValueError: when there is no token to evaluate.
      RuntimeError: when the devices counted other tokens than were planned, so that the figure would be wrong.
    """
    begun = time.perf_counter()
    window, rows = config.eval.sequence_length or config.data.sequence_length, config.eval.batch_size
    used = min(documents or split.num_documents, split.num_documents)
    windows = plan_windows(split.offsets[: used + 1], window=window, overlap=config.eval.overlap)
    tokens = int((windows.length - windows.context).sum())
    if not tokens:
        raise ValueError(
            f"none of the {used} held-out documents has a token to evaluate; raise the store's heldout_permille, or "
            "leave the store out of eval.stores"
        )
    places = place_windows(windows.length, window=window)
    total = -(-places.rows // rows)
    # Results are fetched one batch late, so that the host fills a batch while the devices work on the one before.
    pending: collections.deque[Sums] = collections.deque()
    nats, counted = 0.0, 0.0
    static = {
        "graphdef": graphdef,
        "runtime": runtime,
        "chunk": config.train.loss_chunk,
        "softcap": config.model.logits_softcap,
    }
    for sent, batch in enumerate(batches(split, windows, places, batch_size=rows, window=window), start=1):
        placed = put(batch)
        if sent == 1:
            batch_sums.lower(params, placed, **static).compile()  # which the calls find again, as it stays in memory
            meet("evaluation")
        pending.append(batch_sums(params, placed, **static))
        while len(pending) > (1 if sent < total else 0):
            sums = jax.device_get(pending.popleft())
            nats, counted = nats + float(sums.nll), counted + float(sums.weight)
            if progress is not None:
                progress(sent - len(pending), total)
    if counted != tokens:
        raise RuntimeError(f"the devices counted {counted:.0f} tokens of {tokens}; does `put` place every row once?")
    num_bytes = int(split.byte_lengths[:used].sum())
    return HeldOut(
        bits_per_byte=nats / math.log(2) / num_bytes,
        nats_per_token=nats / tokens,
        documents=used,
        bytes=num_bytes,
        tokens=tokens,
        seconds=time.perf_counter() - begun,
    )


def evaluate_stores(
    setup: Setup,
    params: Any,
    data: Prepared,
    *,
    final: bool,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, HeldOut]:
    """Held-out quality by name of store (`evaluated_names`).

    Args:
      params: sharded as `setup` says.
      final: uses every held-out document, whatever `eval.documents` says of evaluations during training.
      progress: called with (store, batches done, batches in all).
    """
    config = setup.config
    return {
        name: evaluate(
            params,
            data.stores[name].split("heldout"),
            config=config,
            graphdef=setup.parts.graphdef,
            runtime=setup.eval_runtime,
            put=functools.partial(place_whole, setup.mesh),
            documents=0 if final else config.eval.documents,
            progress=functools.partial(progress, name) if progress is not None else None,
        )
        for name in evaluated_names(config, data)
    }


def evaluated_names(config: Config, data: Prepared) -> list[str]:
    """The stores that are evaluated: `eval.stores`, or every store that holds documents out."""
    holding = [name for name, store in data.stores.items() if store.split("heldout").num_documents]
    return list(config.eval.stores) or holding


def evaluated_records(config: Config, data: Prepared) -> dict[str, str]:
    """The fingerprint of each store that is evaluated; for checkpoints (see `check_evaluated`)."""
    return {name: data.stores[name].fingerprint for name in evaluated_names(config, data)}


def check_evaluated(old: Mapping[str, str], new: Mapping[str, str], *, step: int) -> None:
    """Lets a run go on only with the held-out text that it has been judged by; other stores may come and go.

    What is trained on `check_records` looks at. A store that is only evaluated changes no step, but its figures before
    and after could not be compared, and by them the best checkpoints are kept.

    Args:
      old: `evaluated_records` as the checkpoint has it; {} of one from before that was recorded.
      new: that of the run that is to go on at `step`.

    Raises:
      DataChanged: Names every store that differs.
    """
    others = [name for name, fingerprint in old.items() if new.get(name, fingerprint) != fingerprint]
    if others:
        said = "; ".join(f"the store {name!r} was {old[name][:12]} and is {new[name][:12]}" for name in others)
        raise DataChanged(
            f"the run cannot go on at step {step} and be evaluated on other text under the same name: {said}. Bring "
            "the text back, give the new one a name of its own in data.stores, or use a new workdir"
        )
