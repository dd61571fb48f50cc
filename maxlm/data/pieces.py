"""The two halves of making a store: units of a source become sorted runs of tokens, and runs become the store.

A run is two files: `NAME.index`, records of `INDEX` sorted by key, and `NAME.tokens`, those documents' tokens in that
order. A unit is done when its report `UNIT.json` is there. Every file is written beside its place, under a name of the
writing process's own, and renamed, so that processes which outlive a kill do no harm.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxlm.data.sources import Skip, Unit, read_unit
from maxlm.data.store import StoreWriter, token_dtype
from maxlm.data.tokenizers import Ends, Tokenizer, load_tokenizer
from maxlm.files import write_among_others

# The key is the SHA-256 of a document's bytes as four big-endian words, so that it sorts as the hex does.
INDEX = np.dtype([("key", "<u8", (4,)), ("start", "<i8"), ("stop", "<i8"), ("bytes", "<i8")])
# Text that a run holds at most, which is also about what a worker keeps in memory.
RUN_BYTES = 2**26
# Tokens' bytes that the merge keeps in memory at once.
BUCKET_BYTES = 2**29


class UnitReport(NamedTuple):
    """What came of a unit: its runs, and its documents counted."""

    runs: list[str]
    tokens: int
    text_bytes: int
    size: int  # bytes on disk, for progress
    skipped: dict[str, int]


class Sampled(NamedTuple):
    """Documents of a unit with the lowest SHA-256, as (digest, bytes), and the unit's size on disk."""

    documents: list[tuple[bytes, bytes]]
    size: int


def is_heldout(digest: bytes, permille: int) -> bool:
    """The split rule: the first 32 bits of the SHA-256 of a document's bytes, modulo 1000, are below `permille`."""
    return int.from_bytes(digest[:4], "big") % 1000 < permille


def sample_unit(unit: Unit, permille: int, limit: int, ceiling: bytes) -> Sampled:
    """The training documents of a unit with the lowest digests, up to the one that passes `limit` bytes.

    Args:
      unit: What to read.
      permille: The split rule's share; held-out documents are left out.
      limit: Bytes wanted at most; a document is cut to it.
      ceiling: Digests above this are not wanted any more; empty: none is.
    """
    found: dict[bytes, bytes] = {}
    held = 0
    for document in read_unit(unit):
        if isinstance(document, Skip):
            continue
        digest = hashlib.sha256(document).digest()
        if digest in found or is_heldout(digest, permille) or (ceiling and digest > ceiling):
            continue
        found[digest] = document[:limit]
        held += len(found[digest])
        if held > 2 * limit:  # a unit may be a packed file of any size, of which memory is to hold a part
            found = dict(lowest(found, limit))
            held, ceiling = sum(map(len, found.values())), max(found)
    return Sampled(lowest(found, limit), unit.size)


def lowest(documents: dict[bytes, bytes], limit: int) -> list[tuple[bytes, bytes]]:
    """The first documents in the order of their digests, up to and with the one at which `limit` bytes are reached."""
    kept, total = [], 0
    for digest in sorted(documents):
        if total >= limit:
            break
        kept.append((digest, documents[digest]))
        total += len(documents[digest])
    return kept


class TokenizerFile(NamedTuple):
    """What a process needs to load a tokenizer: `load_tokenizer`'s arguments."""

    kind: str
    path: str
    ends: Ends


def tokenise_unit(unit: Unit, file: TokenizerFile, folder: str, name: str) -> UnitReport:
    """Reads a unit, writes its runs and its report `folder/name.json`, and gives the report back."""
    tokenizer = _cached_tokenizer(file)
    skipped: Counter[str] = Counter()
    runs: list[str] = []
    token_count = text_bytes = 0
    for documents in _batches(unit, skipped):
        text_bytes += sum(map(len, documents.values()))
        index, tokens = _encode(documents, tokenizer, skipped)
        if not index.size:
            continue
        token_count += tokens.size
        runs.append(f"{name}-{len(runs):03d}")
        write_among_others(Path(folder) / f"{runs[-1]}.tokens", tokens.tobytes())
        write_among_others(Path(folder) / f"{runs[-1]}.index", index.tobytes())
    report = UnitReport(runs, token_count, text_bytes, unit.size, dict(skipped))
    write_among_others(Path(folder) / f"{name}.json", json.dumps(report._asdict()))
    return report


def finished_unit(folder: Path, name: str) -> UnitReport | None:
    """The report of a unit that is done already."""
    try:
        return UnitReport(**json.loads((folder / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None


def merge_runs(
    folder: Path, reports: Sequence[UnitReport], *, writer: StoreWriter, vocab_size: int, permille: int
) -> int:
    """Adds every run's documents to a store in the order of their digests, each once; gives the number of duplicates.

    The digests' range is cut into equal buckets, which hold about equally much since digests are uniform; a run is
    sorted, so its part of a bucket is one slice. Memory holds one bucket.
    """
    dtype = token_dtype(vocab_size)
    runs = [run for report in reports for run in report.runs]
    buckets = 1 + sum(report.tokens for report in reports) * dtype.itemsize // BUCKET_BYTES
    duplicates = 0
    for bucket in range(buckets):
        low, high = (edge * 2**64 // buckets for edge in (bucket, bucket + 1))
        parts = [_slice_run(folder / run, dtype, low, high) for run in runs]
        index = np.concatenate([np.zeros(0, INDEX), *(part.rows for part in parts)])
        documents = [document for part in parts for document in part.documents]
        key = index["key"]
        order = np.lexsort((key[:, 3], key[:, 2], key[:, 1], key[:, 0]))
        same = np.zeros(order.size, bool)
        same[1:] = (key[order[1:]] == key[order[:-1]]).all(axis=1)
        duplicates += int(same.sum())
        order = order[~same]
        heldout = (key[order, 0] >> np.uint64(32)) % np.uint64(1000) < permille
        for split, chosen in (("train", order[~heldout]), ("heldout", order[heldout])):
            tokens = np.concatenate([np.zeros(0, dtype), *(documents[i] for i in chosen)])
            rows = index[chosen]
            writer.add(split, tokens, lengths=rows["stop"] - rows["start"], byte_lengths=rows["bytes"])
    return duplicates


class _RunSlice(NamedTuple):
    rows: np.ndarray  # (n,) INDEX
    documents: list[np.ndarray]  # their tokens


def _slice_run(run: Path, dtype: np.dtype, low: int, high: int) -> _RunSlice:
    """The documents of a run whose keys' first words lie in [low, high)."""
    everything = np.memmap(run.with_name(f"{run.name}.index"), INDEX, mode="r")
    first = everything["key"][:, 0]
    begin = int(np.searchsorted(first, np.uint64(low)))
    end = first.size if high >= 2**64 else int(np.searchsorted(first, np.uint64(high)))
    rows = np.array(everything[begin:end])
    if not rows.size:
        return _RunSlice(rows, [])
    base, count = int(rows["start"][0]), int(rows["stop"][-1] - rows["start"][0])
    # Read, not mapped: a map keeps its file open, and there may be more runs than a process may open.
    tokens = np.fromfile(run.with_name(f"{run.name}.tokens"), dtype, count, offset=base * dtype.itemsize)
    return _RunSlice(
        rows, [tokens[start - base : stop - base] for start, stop in zip(rows["start"], rows["stop"], strict=True)]
    )


def _batches(unit: Unit, skipped: Counter[str]) -> Iterator[dict[bytes, bytes]]:
    """The documents of a unit by digest, `RUN_BYTES` at a time; duplicates in a batch are counted and dropped."""
    batch: dict[bytes, bytes] = {}
    size = 0
    for document in read_unit(unit):
        if isinstance(document, Skip):
            skipped[document.reason] += 1
            continue
        digest = hashlib.sha256(document).digest()
        if digest in batch:
            skipped["duplicate"] += 1
            continue
        batch[digest] = document
        size += len(document)
        if size >= RUN_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _encode(
    documents: dict[bytes, bytes], tokenizer: Tokenizer, skipped: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The index and the tokens of a run; what a tokenizer cannot give back exactly is counted and left out."""
    dtype = token_dtype(tokenizer.vocab_size)
    digests = sorted(documents)
    texts = [documents[digest].decode() for digest in digests]
    pieces, kept = [np.zeros(0, dtype)], []
    begin = np.array([tokenizer.bos_id], dtype)
    lengths = []
    for digest, text, ids in zip(digests, texts, tokenizer.encode_batch(texts), strict=True):
        if tokenizer.decode(ids.tolist()) != text:
            skipped["changed_by_tokenizer"] += 1
            continue
        pieces += [begin, ids.astype(dtype)]
        lengths.append(1 + ids.size)
        kept.append(digest)
    index = np.zeros(len(kept), INDEX)
    index["key"] = np.frombuffer(b"".join(kept), ">u8").reshape(-1, 4)
    index["stop"] = np.cumsum(np.array(lengths, np.int64))
    index["start"] = index["stop"] - lengths
    index["bytes"] = [len(documents[digest]) for digest in kept]
    return index, np.concatenate(pieces)


@functools.lru_cache(maxsize=1)
def _cached_tokenizer(file: TokenizerFile) -> Tokenizer:
    return load_tokenizer(file.kind, file.path, ends=file.ends)
