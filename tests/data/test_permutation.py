import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data.permutation import permute, round_keys


def test_it_is_a_bijection_for_every_small_size():
    keys = round_keys(0, "store", 0)
    for size in range(1, 300):
        assert sorted(permute(np.arange(size), size, keys=keys).tolist()) == list(range(size))


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 20_000), seed=st.integers(0, 2**63))
def test_it_is_a_bijection_for_any_seed(size: int, seed: int):
    assert np.array_equal(np.sort(permute(np.arange(size), size, keys=round_keys(seed))), np.arange(size))


@settings(deadline=None, max_examples=50)
@given(size=st.integers(2**20, 2**62 - 1), seed=st.integers(0, 2**63), data=st.data())
def test_it_never_maps_two_indexes_of_a_large_range_to_one(size: int, seed: int, data: st.DataObject):
    start = data.draw(st.integers(0, size - 2**12))
    near = start + np.arange(2**12)
    spread = np.linspace(0, size - 1, 2**12).astype(np.int64).clip(0, size - 1)
    index = np.unique(np.concatenate([near, spread]))
    out = permute(index, size, keys=round_keys(seed))
    assert out.min() >= 0 and out.max() < size and np.unique(out).size == index.size


def test_each_index_may_have_keys_of_its_own():
    index = np.array([3, 3, 9, 0])
    keys = np.stack([round_keys(epoch) for epoch in range(4)])
    together = permute(index, 10, keys=keys)
    alone = [permute(index[i : i + 1], 10, keys=keys[i])[0] for i in range(4)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 30])
def test_an_index_goes_anywhere_with_the_same_chance(size: int):
    trials = 4000
    index = np.tile(np.arange(size), trials)
    keys = np.repeat(np.stack([round_keys("uniform", trial) for trial in range(trials)]), size, axis=0)
    orders = permute(index, size, keys=keys).reshape(trials, size)
    counts = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    chi_square = float(((counts - trials / size) ** 2).sum()) / (trials / size)
    # Chi-square over a table with fixed rows and columns: its mean is (size-1)^2. Five standard deviations above that
    # is one in a million.
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)
    if size <= 5:
        assert len(set(map(tuple, orders.tolist()))) == math.factorial(size)


def test_neighbours_and_epochs_are_unrelated():
    size = 100_000
    first, second = (permute(np.arange(size), size, keys=round_keys(0, "store", epoch)) for epoch in (0, 1))
    for a, b in [(first, np.arange(size)), (first[1:], first[:-1]), (first, second)]:
        # A correlation of independent samples has the standard deviation 1/sqrt(size) = 0.0032.
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.016


def test_keys_depend_on_every_part_and_not_on_how_parts_join():
    assert not np.array_equal(round_keys(1, "a", 0), round_keys(1, "a", 1))
    assert not np.array_equal(round_keys(1, "12"), round_keys(11, "2"))


def test_the_order_stays_as_released():
    """Runs in progress rely on it: whoever changes this raises loader.ORDER_VERSION."""
    out = permute(np.arange(10), 1000, keys=round_keys(0, "store", 0))
    assert out.tolist() == [568, 592, 748, 165, 100, 983, 600, 176, 766, 436]
