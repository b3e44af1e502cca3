"""Records of a run, and the order in which they are drawn."""

import numpy as np
import pytest

from tests.data.toy import audioset_labels
from tests.tiny import CONFIGS, RATE, noise, write_place, write_records
from uss_jax.cli.config import load_config
from uss_jax.data.orders import BalancedOrder
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.training import records
from uss_jax.training.settings import tagger_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("train"))


def _open(directory, **data):
    config = load_config(str(CONFIGS / "tagger_cnn14.py"), [])
    config.sample_rate, config.seed = RATE, 3
    config.data.update(records=str(directory), split="train", **data)
    return records.open_records(tagger_settings(config))


def test_weights_of_classes_without_clips_are_reported(tmp_path, capsys):
    write_records(tmp_path, "train", [("a", noise(1, 0.9), [72, 3])])
    _open(tmp_path, class_weights={"Drum": 3, "72": 2})
    said = capsys.readouterr().out
    assert "config.data.class_weights['Drum'] has no effect: no clip of" in said
    assert said.count("has no effect") == 1


def test_a_share_of_the_clips_holds_those_of_a_smaller_one(place):
    drawn = []
    for share in (0.25, 0.5, 1.0):
        opened = _open(place / "records", order="uniform", share=share)
        drawn.append(set(opened.order.draw(np.arange(1000))[0].tolist()))
    assert drawn[0] < drawn[1] < drawn[2] == set(range(8))


def test_class_weights_are_places_a_round():
    dog = load_ontology().resolve("Dog")
    weights = records._class_weights({"Dog": 3, "/m/09x0r": 0})
    order = BalancedOrder(*audioset_labels(), 0, weights)
    _, classes = order.draw(np.arange(order.round_length * 7))
    counts = np.bincount(classes, minlength=527)
    assert (counts[dog], counts[0]) == (21, 0)
    assert set(np.delete(counts, [dog, 0]).tolist()) == {7}
    assert records._class_weights({}) is None


def test_a_weight_of_an_unknown_class_is_said():
    with pytest.raises(UserError, match='no sound class is called "Dgo"; did you mean'):
        records._class_weights({"Dgo": 1})
