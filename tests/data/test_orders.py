import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.data.toy import audioset_labels
from uss_jax.data.orders import BalancedOrder, UniformOrder
from uss_jax.errors import UserError

SEEDS = range(10)


def _csr(targets):
    """label_row and label_class of a 0/1 matrix [records, classes]."""
    targets = np.asarray(targets)
    return np.cumsum([0, *targets.sum(axis=1)]), np.nonzero(targets)[1]


def _random_targets(records=300, classes=30, seed=0):
    targets = np.random.default_rng(seed).random((records, classes)) < 0.1
    targets[:, 7] = targets[:, 20] = False
    return targets


@pytest.mark.parametrize("seed", SEEDS)
def test_every_class_once_a_round_and_rounds_differ(seed):
    targets = _random_targets(seed=seed)
    order = BalancedOrder(*_csr(targets), seed, classes=30)
    assert order.missing.tolist() == [7, 20]
    assert order.round_length == 28
    _, classes = order.draw(np.arange(28 * 50))
    rounds = classes.reshape(50, 28)
    expected = np.delete(np.arange(30), [7, 20])
    np.testing.assert_array_equal(np.sort(rounds, axis=1), np.tile(expected, (50, 1)))
    assert (rounds[1:] != rounds[:-1]).any(axis=1).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_clip_of_a_class_once_before_any_twice_and_epochs_differ(seed, weighted):
    targets = _random_targets(seed=seed)
    weights = np.random.default_rng(seed).integers(0, 4, 30) if weighted else None
    order = BalancedOrder(*_csr(targets), seed, weights, classes=30)
    records, classes = order.draw(np.arange(order.round_length * 200))
    for k in range(30):
        drawn, clips = records[classes == k], np.flatnonzero(targets[:, k])
        weight = 1 if weights is None else weights[k]
        assert len(drawn) == (200 * weight if len(clips) else 0)
        if not len(drawn):
            continue
        epochs = drawn[: len(drawn) // len(clips) * len(clips)].reshape(-1, len(clips))
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(clips, (len(epochs), 1)))
        if len(clips) > 15:  # 1 in 15! would be the same by chance
            assert (epochs[1:] != epochs[:-1]).any(axis=1).all()


def test_weights_are_places_a_round():
    weights = [0, 1, 5] + [1] * 27
    order = BalancedOrder(*_csr(_random_targets()), 0, weights, classes=30)
    _, classes = order.draw(np.arange(order.round_length * 10))
    assert np.bincount(classes, minlength=30)[:3].tolist() == [0, 10, 50]
    assert 0 not in order.missing


@settings(max_examples=10)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.integers(0, 2**32))
def test_any_position_can_be_computed_alone(positions, seed):
    label_row, label_class = _csr(_random_targets())
    for order in (
        BalancedOrder(label_row, label_class, seed, [1, 2, 3] * 10, classes=30),
        UniformOrder(label_row, label_class, seed),
    ):
        records, classes = order.draw(np.array(positions))
        for at, position in enumerate(positions):
            record, label = order.draw(np.array([position]))
            assert (record[0], label[0]) == (records[at], classes[at])


@pytest.mark.parametrize("seed", SEEDS)
def test_golden_samplers_properties_hold(golden, seed):
    stored = json.loads((golden / "sampler.json").read_text())
    targets, properties = np.array(stored["target"]), stored["properties"]
    order = BalancedOrder(*_csr(targets), seed, classes=targets.shape[1])
    records, classes = order.draw(np.arange(properties["draws"]))
    assert targets[records, classes].all()
    assert np.bincount(classes).tolist() == properties["class_counts"]
    for k, allowed in enumerate(properties["max_minus_min_uses_of_a_clip_within_a_class"]):
        uses = np.bincount(records[classes == k], minlength=len(targets))[targets[:, k] == 1]
        assert uses.max() - uses.min() == allowed


def test_no_place_in_a_round_prefers_a_class():
    order = BalancedOrder(*_csr(np.eye(10, dtype=int)), 5, classes=10)
    _, classes = order.draw(np.arange(10 * 5000))
    counts = np.zeros((10, 10))
    np.add.at(counts, (np.tile(np.arange(10), 5000), classes), 1)
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < stats.chi2.ppf(1 - 1e-4, 81)


def test_seeds_give_other_orders_and_the_same_seed_the_same():
    label_row, label_class = _csr(_random_targets())
    for kind in (BalancedOrder, UniformOrder):
        drawn = [kind(label_row, label_class, seed).draw(np.arange(500))[0] for seed in (1, 1, 2)]
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert (drawn[0] != drawn[2]).mean() > 0.9


def test_order_stays_what_it_is():
    # Changing the order breaks every run that resumes; these numbers are its definition.
    order = BalancedOrder(*_csr(_random_targets()), 1234, classes=30)
    records, classes = order.draw(np.array([0, 1, 2, 1000, 10**9, 10**15]))
    assert records.tolist() == [146, 142, 78, 254, 82, 270]
    assert classes.tolist() == [2, 25, 12, 5, 22, 28]


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_order_draws_every_labelled_clip_once_an_epoch(seed):
    targets = _random_targets(records=100, seed=seed)
    targets[5] = False
    order = UniformOrder(*_csr(targets), seed)
    labelled = np.flatnonzero(targets.any(axis=1))
    records, classes = order.draw(np.arange(20 * len(labelled)))
    assert targets[records, classes].all()
    epochs = records.reshape(20, -1)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(labelled, (20, 1)))
    # With 20 draws, a clip of several labels that always shows the same one: below 1e-5 each.
    several = np.flatnonzero(targets.sum(axis=1) > 1)
    assert all(len(set(classes[records == record])) > 1 for record in several)


def test_nothing_to_draw_is_an_error():
    for kind in (BalancedOrder, UniformOrder):
        with pytest.raises(UserError, match="no record has a label"):
            kind(np.zeros(5, np.int64), np.zeros(0, np.int64), 0)
    with pytest.raises(UserError, match="whole numbers from 0"):
        BalancedOrder(*_csr(np.eye(3, dtype=int)), 0, [1, -1, 1], classes=3)


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_rounds_draw_every_class_a_hundred_times(seed):
    label_row, label_class = audioset_labels()
    order = BalancedOrder(label_row, label_class, seed)
    records, classes = order.draw(np.arange(527 * 100))
    assert np.bincount(classes, minlength=527).tolist() == [100] * 527
    # Of a class with 100 clips or more, 100 draws are 100 clips.
    clips = np.bincount(label_class, minlength=527)
    for k in np.flatnonzero(clips >= 100):
        assert len(set(records[classes == k].tolist())) == 100
    rounds = classes.reshape(100, 527)
    assert (rounds[1:] != rounds[:-1]).any(axis=1).all()
