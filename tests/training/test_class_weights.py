import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data.toy import audioset_labels
from uss_jax.data.orders import BalancedOrder
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.training.run import _class_weights


def test_class_weights_of_a_config_are_places_a_round():
    dog = load_ontology().resolve("Dog")
    weights = _class_weights(ConfigDict({"Dog": 3, "/m/09x0r": 0}))
    order = BalancedOrder(*audioset_labels(), 0, weights)
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
