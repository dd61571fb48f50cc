import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data.mixture import Mixture

weights_of = st.dictionaries(
    st.sampled_from("abcdefghijkl"),
    st.floats(1e-4, 1e4, allow_nan=False, allow_infinity=False),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=100)
@given(weights=weights_of, rows=st.integers(1, 3000))
def test_rows_counts_and_numbers_agree(weights: dict[str, float], rows: int):
    mixture = Mixture(weights)
    stores, numbers = mixture.assign(np.arange(rows))
    counts = mixture.counts(rows)
    assert sum(counts.values()) == rows
    for store, name in enumerate(mixture.names):
        # A store's rows are numbered without gap or repetition, in the order of the run.
        np.testing.assert_array_equal(numbers[stores == store], np.arange(counts[name]))


@settings(deadline=None, max_examples=100)
@given(weights=weights_of)
def test_weights_are_kept_at_every_prefix(weights: dict[str, float]):
    mixture = Mixture(weights)
    stores = mixture.assign(np.arange(2000)).stores
    taken = np.cumsum(stores[:, None] == np.arange(len(mixture.names)), axis=0)
    due = np.arange(1, 2001)[:, None] * np.array(mixture.weights)
    # Rounding errs by half a row at each of the nodes above a store, damped by the shares below it.
    assert np.abs(taken - due).max() < 2.0


def test_two_equal_stores_alternate_and_the_halves_of_a_batch_are_alike():
    stores = Mixture({"a": 1, "b": 1}).assign(np.arange(64)).stores
    assert [stores[i : i + 2].sum() for i in range(0, 64, 2)] == [1] * 32


@settings(deadline=None)
@given(weights=weights_of, start=st.integers(0, 2**55))
def test_far_rows_are_exact_and_need_no_walk(weights: dict[str, float], start: int):
    mixture = Mixture(weights)
    stores, numbers = mixture.assign(start + np.arange(50))
    before, after = mixture.counts(start), mixture.counts(start + 50)
    for store, name in enumerate(mixture.names):
        np.testing.assert_array_equal(numbers[stores == store], np.arange(before[name], after[name]))
        # Shares are multiples of 2**-31 at each of at most 11 nodes.
        assert abs(before[name] - start * mixture.weights[store]) <= 2 + start * 11 * 2**-31


def test_order_and_scale_of_the_weights_do_not_matter():
    one, other = Mixture({"a": 3, "b": 1, "c": 2}), Mixture({"c": 20, "b": 10, "a": 30})
    assert one.names == other.names
    np.testing.assert_array_equal(one.assign(np.arange(500)).stores, other.assign(np.arange(500)).stores)


def test_shares_written_back_are_the_same_to_the_bit():
    mixture = Mixture({"a": 1 / 3, "b": 0.1, "c": 7.7, "d": 1e-3})
    again = Mixture(dict(zip(mixture.names, mixture.weights, strict=True)))
    assert again.weights == mixture.weights


def test_a_store_without_weight_gets_nothing_and_a_tiny_one_something():
    assert Mixture({"a": 1.0, "b": 0.0}).names == ("a",)
    assert Mixture({"a": 1.0, "b": 1e-12}).counts(2**32)["b"] >= 1


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float]):
    with pytest.raises(ValueError, match="needs weights"):
        Mixture(weights)


def test_the_pattern_stays_as_released():
    """Runs in progress rely on it: whoever changes this raises loader.ORDER_VERSION."""
    mixture = Mixture({"a": 0.5, "b": 0.3, "c": 0.2})
    assert "".join(mixture.names[store] for store in mixture.assign(np.arange(20)).stores) == "abacabacababacabacab"
