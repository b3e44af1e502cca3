import itertools
import math
import statistics

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.inputs import make_signal
from uss_jax.evaluation.metrics import (
    average_precision,
    class_medians,
    d_prime,
    is_silent,
    per_class,
    roc_auc,
    sdr,
    separation_figures,
    si_sdr,
)


def _noise(seed, n=4000):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(n), jnp.float32)


@pytest.mark.golden
def test_sdr_is_the_reference_s(golden):
    stored = np.load(golden / "sdr.npz")
    n = int(stored["samples"])
    r = make_signal("dev/sdr/ref", n, silence=False)
    e = make_signal("dev/sdr/est", n, silence=False)
    zero = np.zeros_like(r)
    pairs = [(r, r), (r, e), (r, r / 2), (r, zero), (zero, e), (zero, zero), (r, r + 0.1 * e)]
    pairs.append((r, r * np.float32(1 + 1e-6)))
    reference, estimate = (jnp.stack(side).astype(np.float32) for side in zip(*pairs, strict=True))
    # 1e-3 dB: the reference's own float32 noise is 1.2e-5 dB.
    np.testing.assert_allclose(sdr(reference, estimate), stored["sdr"], atol=1e-3)


def test_si_sdr_is_the_ratio_that_was_mixed():
    s, n = _noise(1), _noise(2)
    n -= s * (s @ n) / (s @ s)  # no part of the noise lies along the signal
    n *= jnp.linalg.norm(s) / jnp.linalg.norm(n)
    for decibel in (-30, 0, 10, 40):
        estimate = s + n * np.float32(10 ** (-decibel / 20))
        # Float32 sums of 4000 samples.
        assert float(si_sdr(s, estimate)) == pytest.approx(decibel, abs=2e-3)


def test_si_sdr_does_not_depend_on_levels():
    s, estimate = _noise(1), _noise(1) + _noise(2)
    expected = float(si_sdr(s, estimate))
    for a, b in itertools.product((1e-6, -3.0), (1e-6, 1e6)):
        # Scaling rounds every sample once more.
        assert float(si_sdr(s * np.float32(a), estimate * np.float32(b))) == pytest.approx(
            expected, abs=1e-3
        )


def test_silence_gives_numbers():
    s, zero = _noise(1), jnp.zeros(4000, jnp.float32)
    assert float(si_sdr(s, zero)) == pytest.approx(-100)
    assert float(si_sdr(zero, s)) == pytest.approx(-100)
    assert float(si_sdr(zero, zero)) == pytest.approx(-100)
    assert float(si_sdr(s, s)) == pytest.approx(100)
    assert float(sdr(s, zero)) == 0


def test_a_silent_reference_has_no_figures():
    s, zero = _noise(1), jnp.zeros(4000, jnp.float32)
    batch = jnp.stack([zero, s, 1e-6 * s])
    figures = separation_figures(batch, jnp.stack([s] * 3), batch + _noise(2))
    for name, of in figures.items():
        assert np.isnan(of).tolist() == [True, False, True], name
    np.testing.assert_array_equal(is_silent(np.asarray(batch)), [True, False, True])


def test_half_the_mixture_of_equal_energies_gains_three_decibels():
    s, n = _noise(1, 100_000), _noise(2, 100_000)
    n -= s * (s @ n) / (s @ s)
    n *= jnp.linalg.norm(s) / jnp.linalg.norm(n)
    figures = separation_figures(s, (s + n) / 2, s + n)
    assert float(figures["sdri"]) == pytest.approx(10 * math.log10(2), abs=1e-3)
    assert float(figures["si_sdri"]) == pytest.approx(0, abs=1e-3)  # a scale is no separation


def test_figures_of_a_batch_are_those_of_its_items():
    reference, estimate, mixture = (
        jnp.stack([_noise(10 * i + j) for j in range(3)]) for i in (1, 2, 3)
    )
    together = separation_figures(reference, estimate, mixture)
    for i in range(3):
        alone = separation_figures(reference[i], estimate[i], mixture[i])
        for name in together:
            # The order of a float32 sum may differ.
            np.testing.assert_allclose(together[name][i], alone[name], atol=1e-4)
    assert together["sdr"].dtype == jnp.float32


def test_medians_are_within_classes():
    values, classes = np.array([1.0, 5.0, 3.0, 10.0, 20.0]), np.array([7, 7, 7, 2, 2])
    assert class_medians(values, classes) == {2: 15.0, 7: 3.0}


def test_average_precision_by_hand():
    positive = np.array([True, False, True, False, True])
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    assert average_precision(positive, score) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # Ties enter together: both items at 0.8 give recall 1/2 at precision 1/2.
    positive, score = np.array([True, False, True]), np.array([0.8, 0.8, 0.1])
    assert average_precision(positive, score) == pytest.approx(1 / 2 * 1 / 2 + 1 / 2 * 2 / 3)
    assert average_precision(np.array([True, False]), np.array([0.5, 0.5])) == pytest.approx(0.5)


_ITEMS = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30)


@settings(max_examples=200)
@given(_ITEMS)
def test_roc_auc_is_mann_whitney_s_u(items):
    positive = np.array([item[0] for item in items])
    score = np.array([item[1] for item in items], float)
    if positive.all() or not positive.any():
        assert roc_auc(positive, score) is None
        return
    expected = scipy.stats.mannwhitneyu(score[positive], score[~positive]).statistic
    assert roc_auc(positive, score) == pytest.approx(
        expected / (positive.sum() * (~positive).sum())
    )


@settings(max_examples=200)
@given(_ITEMS, st.randoms(use_true_random=False))
def test_average_precision_is_the_definition_and_ignores_the_order_of_items(items, random):
    positive = np.array([item[0] for item in items])
    score = np.array([item[1] for item in items], float)
    if not positive.any():
        assert average_precision(positive, score) is None
        return
    # The sum over thresholds, written out.
    expected, last_recall = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        taken = score >= threshold
        recall = (positive & taken).sum() / positive.sum()
        expected += (recall - last_recall) * (positive & taken).sum() / taken.sum()
        last_recall = recall
    assert average_precision(positive, score) == pytest.approx(expected)
    order = list(range(len(items)))
    random.shuffle(order)
    assert average_precision(positive[order], score[order]) == pytest.approx(expected)


def test_classes_without_positives_are_left_out():
    positive = np.array([[1, 0, 1], [0, 0, 1]], bool)
    score = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4]])
    assert per_class(average_precision, positive, score) == {0: 1.0, 2: 1.0}
    assert per_class(roc_auc, positive, score) == {0: 1.0}  # class 2 has no negative either


def test_d_prime_gives_its_auc_back():
    for distance in (0.0, 0.5, 2.5):
        auc = statistics.NormalDist().cdf(distance / 2**0.5)
        assert d_prime(auc) == pytest.approx(distance, abs=1e-9)
    assert math.isfinite(d_prime(1.0))
