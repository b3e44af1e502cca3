"""The order over AudioSet's own balanced labels (22,160 clips, 52,882 labels; see NOTICE)."""

import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from uss_jax.data.grouping import GroupedOrder
from uss_jax.data.orders import BalancedOrder
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.training.run import _class_weights


@pytest.fixture(scope="module")
def labels():
    with np.load(pathlib.Path(__file__).with_name("audioset_balanced_labels.npz")) as stored:
        return np.cumsum([0, *stored["labels"].tolist()]), stored["label_class"]


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_rounds_draw_every_class_a_hundred_times(labels, seed):
    label_row, label_class = labels
    order = BalancedOrder(label_row, label_class, seed)
    records, classes = order.draw(np.arange(527 * 100))
    assert np.bincount(classes, minlength=527).tolist() == [100] * 527
    # Of a class with 100 clips or more, 100 draws are 100 clips.
    clips = np.bincount(label_class, minlength=527)
    for k in np.flatnonzero(clips >= 100):
        assert len(set(records[classes == k].tolist())) == 100
    rounds = classes.reshape(100, 527)
    assert (rounds[1:] != rounds[:-1]).any(axis=1).all()


def test_mixtures_that_hold_a_sound_twice_become_rare(labels):
    share = {}
    for conflict_free in (False, True):
        grouped = GroupedOrder(
            BalancedOrder(*labels, 0),
            *labels,
            0,
            group_size=16,
            sources=2,
            conflict_free=conflict_free,
        )
        share[conflict_free] = grouped.draw_marked(np.arange(16 * 100))[2].mean()
    assert share[False] > 0.2
    assert share[True] < 0.02


def test_class_weights_of_a_config_are_places_a_round(labels):
    dog = load_ontology().resolve("Dog")
    weights = _class_weights(ConfigDict({"Dog": 3, "/m/09x0r": 0}))
    order = BalancedOrder(*labels, 0, weights)
    _, classes = order.draw(np.arange(order.round_length * 7))
    counts = np.bincount(classes, minlength=527)
    assert (counts[dog], counts[0]) == (21, 0)
    assert set(np.delete(counts, [dog, 0]).tolist()) == {7}
    assert _class_weights(ConfigDict()) is None


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"Dgo": 1}, 'no sound class is called "Dgo"; did you mean'),
        ({"Dog": 0.5}, r"class_weights\['Dog'\] is 0.5, expected a whole number"),
        ({"Dog": -1}, "is -1, expected a whole number"),
    ],
)
def test_class_weights_that_make_no_sense_are_said(weights, said):
    with pytest.raises(UserError, match=said):
        _class_weights(ConfigDict(weights))
