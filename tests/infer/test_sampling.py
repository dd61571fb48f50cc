"""Sampling filters against NumPy, the draws' frequencies, and their keys."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maxlm.infer.sampling import Sampling, filtered, keep_min_p, keep_top_k, keep_top_p, sample

# Values on a grid of 1/8, exact in float32, so that ties happen and thresholds are not a matter of rounding.
LOGITS = hnp.arrays(np.int32, (3, 8), elements=st.integers(-40, 40)).map(lambda x: (x / 8).astype(np.float32))


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def keys_of(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def check_kept(logits, filtered_logits, kept):
    filtered_logits = np.asarray(filtered_logits)
    np.testing.assert_array_equal(np.isfinite(filtered_logits), kept)
    np.testing.assert_array_equal(filtered_logits[kept], logits[kept])


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.sampled_from([1, 2, 5, 8, 11]))
def test_top_k_keeps_the_highest_and_their_ties(logits, k):
    kept = np.array([row >= sorted(row)[::-1][min(k, len(row)) - 1] for row in logits])
    check_kept(logits, keep_top_k(logits, k), kept)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.sampled_from([0.05, 0.3, 0.6, 0.9, 0.99]))
def test_top_p_keeps_the_smallest_nucleus(logits, p):
    kept = []
    for row in logits:
        probabilities, lowest, total = softmax(row), np.inf, 0.0
        for index in np.argsort(-row, kind="stable"):
            # A sum within float32 rounding of p could fall on either side; hypothesis may look for other examples.
            if abs(total - p) < 1e-5:
                return
            if total >= p:
                break
            lowest, total = row[index], total + probabilities[index]
        kept.append(row >= lowest)
    check_kept(logits, keep_top_p(logits, p), np.array(kept))


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.sampled_from([0.01, 0.1, 0.4, 1.0]))
def test_min_p_is_relative_to_the_likeliest(logits, p):
    probabilities = np.array([softmax(row) for row in logits])
    ratio = probabilities / probabilities.max(axis=1, keepdims=True)
    if np.any(np.abs(ratio - p) < 1e-5) and p < 1.0:
        return
    check_kept(logits, keep_min_p(logits, p), ratio >= (p if p < 1.0 else 1.0 - 1e-9))


def test_top_p_keeps_one_token_however_small_p_is():
    kept = np.isfinite(np.asarray(keep_top_p(np.array([[0.0, 5.0, 1.0]], np.float32), 1e-6)))
    np.testing.assert_array_equal(kept, [[False, True, False]])


def test_filters_work_on_the_tempered_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    # p^(1/2), normalised: 0.378, 0.293, 0.207, 0.120; two tokens reach 0.6 at temperature 2, at temperature 1 as well
    # two; 0.75 needs two at temperature 1 but three at 2.
    warm = filtered(logits, settings=Sampling(temperature=2.0, top_p=0.75))
    cool = filtered(logits, settings=Sampling(temperature=1.0, top_p=0.75))
    assert np.isfinite(np.asarray(warm)).sum() == 3
    assert np.isfinite(np.asarray(cool)).sum() == 2
    np.testing.assert_allclose(np.asarray(warm)[0, :3], logits[0, :3] / 2.0, rtol=1e-6)


def test_temperature_zero_takes_the_likeliest_and_needs_no_luck():
    logits = np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], np.float32)
    for seed in range(3):
        drawn = sample(logits, keys_of(2, seed), settings=Sampling(temperature=0.0, top_k=2))
        np.testing.assert_array_equal(np.asarray(drawn), [1, 0])


def test_draws_have_the_distribution_of_the_filtered_logits():
    logits = np.array([1.0, 0.0, -1.0, -4.0, 0.5], np.float32)
    draws = 4000
    rule = Sampling(temperature=0.7, top_k=3)
    drawn = np.asarray(sample(np.tile(logits, (draws, 1)), keys_of(draws), settings=rule))
    expected = np.where(logits >= 0.0, np.exp(logits / 0.7), 0.0)
    expected /= expected.sum()
    frequencies = np.bincount(drawn, minlength=5) / draws
    assert set(drawn) == {0, 1, 4}
    # Four standard deviations of a frequency out of 4000 draws are at most 0.032.
    np.testing.assert_allclose(frequencies, expected, atol=0.032)


def test_a_row_draws_by_its_own_key_alone():
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    keys, rule = keys_of(6), Sampling(temperature=1.0)
    together = np.asarray(sample(logits, keys, settings=rule))
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], settings=rule)[0]) for i in range(6)]
    np.testing.assert_array_equal(together, alone)
    assert len(set(np.asarray(sample(np.tile(logits[:1], (6, 1)), keys, settings=rule)).tolist())) > 1


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5}]
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**{"temperature": 1.0, **wrong})
