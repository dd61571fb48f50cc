"""Compressors' bits per byte against the compressors themselves."""

import lzma
import random
import zlib

import pytest

from maxlm.eval.baselines import Text, compression_baselines


def text(seed: int, size: int) -> bytes:
    words = random.Random(0).choices([b"alpha", b"beta(", b"gamma\n", b" = ", b"def "], k=50)
    return b"".join(random.Random(seed).choices(words, k=size))


def held(documents: list[bytes]) -> Text:
    return Text(iter(documents), sum(map(len, documents)))


def test_sizes_are_those_of_the_command_line_tools():
    documents = [text(1, 4000), text(2, 30), b"x", text(3, 900), b""]
    joined = b"".join(documents)
    figures = compression_baselines([held(documents)])
    # preset=9 is `xz -9` itself, with its dictionary of 64 MiB.
    assert figures.xz == 8 * sum(len(lzma.compress(d, preset=9)) for d in documents) / len(joined)
    assert figures.xz_joined == 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    assert figures.zlib == 8 * sum(len(zlib.compress(d, 9)) for d in documents) / len(joined)
    assert figures.zlib_joined == 8 * len(zlib.compress(joined, 9)) / len(joined)
    assert (figures.documents, figures.bytes, figures.sampled) == (5, len(joined), False)
    assert figures.xz_joined < figures.xz


def test_xz_looks_back_over_all_documents():
    # Incompressible pieces, repeated at a distance that only a dictionary beyond the smallest one reaches.
    blocks = [random.Random(seed).randbytes(360_000) for seed in range(3)]
    figures = compression_baselines([held([*blocks, *blocks])])
    assert figures.xz_joined < 4.1 < 7.9 < figures.zlib_joined


def test_a_sample_is_the_first_documents_and_says_so():
    documents = [text(seed, 200) for seed in range(6)]
    cap = len(documents[0]) + len(documents[1])
    sample = compression_baselines([held(documents)], max_bytes=cap)
    assert sample == compression_baselines([held(documents[:2])])._replace(sampled=True)
    assert compression_baselines([held(documents[:2])], max_bytes=cap).sampled is False
    assert compression_baselines([held(documents)], max_bytes=1).documents == 1


def test_a_sample_has_of_each_store_what_its_size_asks_for():
    """Of a large store alone, its first documents would fill the sample."""
    one, other = [b"a" * 100] * 30, [bytes([seed]) * 100 for seed in range(10)]
    sample = compression_baselines([held(one), held(other)], max_bytes=2000)
    assert sample == compression_baselines([held([*one[:15], *other[:5]])])._replace(sampled=True)
    assert compression_baselines([held(one), held(other[:1])], max_bytes=100).documents == 2  # none is left out


@pytest.mark.parametrize("documents", [[], [b"", b""]])
def test_nothing_to_compress_is_said_plainly(documents):
    with pytest.raises(ValueError, match="heldout_permille"):
        compression_baselines([held(documents)])
