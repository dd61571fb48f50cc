import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data import packing
from maxlm.data.packing import PackRows, SplitRows, make_rows, plan_packing
from tests.data.memory_store import MemorySplit, targets_of

documents = st.lists(st.integers(1, 40), min_size=1, max_size=60)
lengths_of_rows = st.integers(1, 24)
both = pytest.mark.parametrize("kind", ["split", "pack"])


def cut(kind: str, split: MemorySplit, length: int, **options) -> packing.Rows:
    return make_rows(split, length, packing=kind, **{"cache": None, "fingerprint": "f" * 64} | options)


@both
@settings(deadline=None, max_examples=100)
@given(lengths=documents, length=lengths_of_rows)
def test_an_epoch_has_every_target_exactly_once(kind: str, lengths: list[int], length: int):
    split = MemorySplit(lengths)
    rows = cut(kind, split, length)
    batch = rows.batch(np.arange(rows.num_rows)) if rows.num_rows else None
    assert (targets_of([batch], split) if batch else []) == split.legitimate


@both
@settings(deadline=None, max_examples=100)
@given(lengths=documents, length=lengths_of_rows)
def test_rows_against_their_definition(kind: str, lengths: list[int], length: int):
    """Field by field in plain Python, from the ids, which tell where a token stands in the split."""
    split = MemorySplit(lengths)
    rows = cut(kind, split, length)
    if not rows.num_rows:
        return
    batch = rows.batch(np.arange(rows.num_rows))
    assert [field.dtype for field in batch] == [np.int32] * 4 + [np.float32]
    assert all(field.shape == (rows.num_rows, length) for field in batch)
    starts = set(split.offsets.tolist())
    for tokens, targets, segments, positions, weights in zip(*batch, strict=True):
        segment, position = 1, 0
        used = int((tokens > 0).sum())
        for i in range(length):
            if i >= used:
                assert (tokens[i], segments[i], positions[i], weights[i]) == (0, 0, 0, 0)
                continue
            token = tokens[i] - split.first_id
            if i and (token in starts or tokens[i] != tokens[i - 1] + 1):
                segment, position = segment + 1, 0
            assert (segments[i], positions[i]) == (segment, position)
            position += 1
            follows = token + 1 < split.num_tokens and token + 1 not in starts
            assert weights[i] == follows
            if follows:
                assert targets[i] == tokens[i] + 1
            elif i + 1 < length:
                assert targets[i] == tokens[i + 1]


@both
def test_a_row_does_not_depend_on_the_others_asked_for(kind: str):
    rows = cut(kind, MemorySplit([3, 1, 30, 7, 2, 12, 5]), 8)
    whole = rows.batch(np.arange(rows.num_rows))
    order = np.random.default_rng(0).permutation(rows.num_rows)
    for field, shuffled in zip(whole, rows.batch(order), strict=True):
        np.testing.assert_array_equal(field[order], shuffled)
    assert all(field.shape == (0, 8) for field in rows.batch(np.arange(0)))


def test_split_rows_join_documents_in_store_order():
    batch = SplitRows(MemorySplit([3, 4, 2]), 4).batch(np.arange(2))
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 3, 4], [5, 6, 7, 8]])
    np.testing.assert_array_equal(batch.targets, [[2, 3, 4, 5], [6, 7, 8, 9]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2], [1, 1, 1, 2]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0], [0, 1, 2, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 0, 1], [1, 1, 0, 1]])


def test_packed_rows_hold_whole_documents():
    lengths = [5, 8, 3, 2, 6]
    split = MemorySplit(lengths)
    rows = cut("pack", split, 8)
    assert rows.num_rows == 3 and rows.fill == 1.0
    batch = rows.batch(np.arange(3))
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        found += [tuple(tokens[segments == number].tolist()) for number in range(1, segments.max() + 1)]
    whole = [tuple(range(a + 1, b + 1)) for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)]
    assert sorted(found) == sorted(whole)


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 60), max_size=80), length=st.integers(2, 40))
def test_the_plan_is_best_fit_decreasing(lengths: list[int], length: int):
    """Against one piece after another: as many rows, equally full (which of two equally full ones is taken is free)."""
    split = MemorySplit(lengths)
    pieces = []
    for size in lengths:
        pieces += [min(length, size - first) for first in range(0, size - 1, length)]
    bins: list[list[int]] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [row for row in bins if sum(row) + piece <= length]
        if fitting:
            max(fitting, key=sum).append(piece)
        else:
            bins.append([piece])
    plan = plan_packing(split.offsets, length)
    rows = [plan.lengths[a:b].tolist() for a, b in zip(plan.row_offsets[:-1], plan.row_offsets[1:], strict=True)]
    assert sorted(map(sum, rows)) == sorted(map(sum, bins))
    assert sorted(sum(rows, [])) == sorted(pieces)


def test_fill_is_reported():
    assert cut("split", MemorySplit([4, 5]), 4).fill == 1.0
    assert cut("split", MemorySplit([4, 3]), 4).fill == 6 / 8
    assert cut("pack", MemorySplit([5, 5]), 8).fill == 10 / 16


@both
@pytest.mark.parametrize("lengths", [[], [1]])
def test_a_split_with_nothing_to_predict_has_no_rows(kind: str, lengths: list[int]):
    assert cut(kind, MemorySplit(lengths), 4).num_rows == 0


class TestCache:
    split = MemorySplit([5, 9, 3, 3, 2, 17])

    def rows(self, folder: Path) -> PackRows:
        return cut("pack", self.split, 8, cache=folder)

    def batch(self, folder: Path) -> list[list[int]]:
        rows = self.rows(folder)
        return rows.batch(np.arange(rows.num_rows)).tokens.tolist()

    def test_a_plan_is_made_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        expected = self.batch(tmp_path / "cache")
        assert [file.name for file in (tmp_path / "cache").iterdir()] == ["pack-v1-8-ffffffffffffffff.npz"]
        monkeypatch.setattr(packing, "plan_packing", lambda *_: pytest.fail("planned again"))
        assert self.batch(tmp_path / "cache") == expected

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
    def test_a_damaged_plan_is_made_again(self, tmp_path: Path, damage: str):
        expected = self.batch(tmp_path)
        (file,) = tmp_path.glob("*.npz")
        whole = file.read_bytes()
        begin = whole.index(self.rows(tmp_path)._plan.starts.tobytes())
        file.write_bytes(
            {
                "cut": whole[:-30],
                "flip": whole[:begin] + bytes([whole[begin] ^ 1]) + whole[begin + 1 :],
                "empty": b"",
                "other": b"not an archive",
            }[damage]
        )
        assert self.batch(tmp_path) == expected
        assert file.read_bytes() == whole

    def test_a_store_that_cannot_be_written_is_packed_in_memory(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        assert self.batch(tmp_path / "file" / "cache") == self.batch(tmp_path / "cache")

    def test_what_an_interrupted_write_left_is_removed(self, tmp_path: Path):
        old, young = tmp_path / "pack-a.npz.1.tmp", tmp_path / "pack-a.npz.2.tmp"
        old.write_text("")
        young.write_text("")
        os.utime(old, (0, 0))
        self.rows(tmp_path)
        assert not old.exists() and young.exists()  # the young one may be another process at work
