"""What general-purpose compressors reach on the held-out documents, for a reader to set the model's figure against.

Each compressor is given the documents twice: every document alone, as `xz -9 FILE` and `zlib -9` would be run on each
file, and all of them joined, where the compressor may look back over whole files (64 MiB for xz, 32 KiB for zlib).
Containers and headers are counted, as they are on disk.
"""

from __future__ import annotations

import concurrent.futures
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

LEVEL = 9
MIN_DICTIONARY, MAX_DICTIONARY = 1 << 20, 1 << 26  # bytes; the upper one is that of xz's level 9
# About fifteen seconds on two cores. A store's documents are in the order of their hash, so that the first ones of each
# are a fair sample.
MAX_BYTES = 16_000_000


class Text(NamedTuple):
    """Held-out documents of a store, in an order that has nothing to do with their content, and their bytes in all."""

    documents: Iterable[bytes]
    bytes: int


class Baselines(NamedTuple):
    """Compressed size in bits per byte of text."""

    xz: float  # xz -9, every document alone
    xz_joined: float  # xz -9, all documents as one stream
    zlib: float
    zlib_joined: float
    documents: int  # documents that the figures are of
    bytes: int  # their bytes
    sampled: bool  # whether documents were left out because of `max_bytes`


def compression_baselines(texts: Sequence[Text], *, max_bytes: int = MAX_BYTES) -> Baselines:
    """Compresses documents with xz and zlib at level 9, alone and joined.

    Args:
      texts: of each store.
      max_bytes: of all documents used. Each store gives its first ones, in proportion to its bytes, but always at least
        one; `sampled` says whether any was left out.

    Raises:
      ValueError: when there is no byte to compress.
    """
    whole = sum(text.bytes for text in texts)
    share = min(max_bytes / whole, 1.0) if whole else 1.0
    chosen = [document for text in texts for document in _first(text.documents, share * text.bytes)]
    total = sum(map(len, chosen))
    if not total:
        raise ValueError("no held-out bytes to compress; raise heldout_permille of the store, or skip the baselines")

    joined = b"".join(chosen)
    # Both libraries release the interpreter's lock while they compress, so threads are enough to use the cores.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        xz_joined = pool.submit(_xz_size, joined)
        zlib_joined = pool.submit(_zlib_size, joined)
        xz, alone = (sum(pool.map(size, chosen)) for size in (_xz_size, _zlib_size))
    bits = 8 / total
    return Baselines(
        xz=bits * xz,
        xz_joined=bits * xz_joined.result(),
        zlib=bits * alone,
        zlib_joined=bits * zlib_joined.result(),
        documents=len(chosen),
        bytes=total,
        sampled=total < whole,
    )


def _first(documents: Iterable[bytes], most: float) -> Iterator[bytes]:
    """The first documents up to so many bytes, but always one."""
    taken = 0
    for document in documents:
        if taken and taken + len(document) > most:
            return
        taken += len(document)
        yield document


def _xz_size(data: bytes) -> int:
    """Bytes of the .xz file that `xz -9` makes.

    Level 9 asks for a dictionary of 64 MiB, and preparing one takes longer than compressing a small file. One as large
    as the data finds the same matches.
    """
    reach = min(max(1 << (len(data) - 1).bit_length(), MIN_DICTIONARY), MAX_DICTIONARY) if data else MIN_DICTIONARY
    filters = [{"id": lzma.FILTER_LZMA2, "preset": LEVEL, "dict_size": reach}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def _zlib_size(data: bytes) -> int:
    """Bytes of the zlib stream."""
    return len(zlib.compress(data, LEVEL))
