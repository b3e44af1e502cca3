import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from uss_jax.data.permutation import hash_key, permute


@settings(max_examples=100)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_and_inverse_undoes_it(size, key):
    index, key = np.arange(size), np.array([key], np.uint64)
    sent = permute(index, size, key)
    np.testing.assert_array_equal(np.sort(sent), index)
    np.testing.assert_array_equal(permute(sent, size, key, inverse=True), index)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 13])
def test_permute_sends_every_index_everywhere_equally_often(size):
    trials = 20000
    key = hash_key(0, np.repeat(np.arange(trials), size))
    sent = permute(np.tile(np.arange(size), trials), size, key)
    counts = np.zeros((size, size))
    np.add.at(counts, (np.tile(np.arange(size), trials), sent.astype(int)), 1)
    chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
    # Rows and columns have fixed sums. One in 10,000 fair permutations would fail here.
    assert chi_square < stats.chi2.ppf(1 - 1e-4, (size - 1) ** 2)


@pytest.mark.parametrize("size", [3, 4])
def test_all_permutations_are_equally_likely(size):
    trials = 24000
    key = hash_key(1, np.repeat(np.arange(trials), size))
    sent = permute(np.tile(np.arange(size), trials), size, key).reshape(trials, size)
    _, counts = np.unique(sent, axis=0, return_counts=True)
    assert len(counts) == {3: 6, 4: 24}[size]
    assert stats.chisquare(counts).pvalue > 1e-4  # fixed keys: passes or fails for ever


def test_permute_takes_a_size_and_key_for_each_index():
    sizes = np.array([5, 1, 1000003, 7])
    keys = hash_key(3, np.arange(4))
    index = np.array([4, 0, 999999, 6])
    together = permute(index, sizes, keys)
    for at in range(4):
        alone = permute(index[at : at + 1], int(sizes[at]), keys[at : at + 1])
        assert together[at] == alone[0]
    assert (together < sizes).all()
