import numpy as np
import pytest

from tests.weights.variables import (
    SEPARATOR_FIELDS,
    TAGGER_FIELDS,
    assert_same_tree,
    separator_variables,
    tagger_variables,
)
from uss_jax.errors import UserError
from uss_jax.weights.lightning import LIGHTNING_PREFIXES, convert_lightning
from uss_jax.weights.torch import state_dict_of


@pytest.fixture
def lightning():
    return {
        **state_dict_of("separator", SEPARATOR_FIELDS, separator_variables(), "ss_model."),
        **state_dict_of("sed", TAGGER_FIELDS, tagger_variables(seed=1), LIGHTNING_PREFIXES["sed"]),
        "anchor_segment_detector.anchor_segment_scorer.smooth_filter": np.ones((1, 1, 201)) / 201,
        **state_dict_of(
            "query", TAGGER_FIELDS, tagger_variables(seed=2), LIGHTNING_PREFIXES["query"]
        ),
    }


def test_whole_checkpoint_goes_in_and_back_with_all_its_tensors(lightning):
    lightning["ss_model.base.bn0.num_batches_tracked"] = np.array(7)
    lightning["query_net.base.conv_block1.bn1.num_batches_tracked"] = np.array(8)
    parts = convert_lightning(lightning)
    assert_same_tree(parts["sed"].variables, tagger_variables(seed=1))
    assert_same_tree(parts["query"].variables, tagger_variables(seed=2))
    back = {}
    for part, converted in parts.items():
        prefix = LIGHTNING_PREFIXES[part]
        back |= state_dict_of(part, converted.fields, converted.variables, prefix)
        back |= converted.foreign
    assert back.keys() == lightning.keys()
    for name, tensor in lightning.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name, strict=True)


def test_error_of_a_whole_checkpoint_names_tensors_in_full(lightning):
    lightning.pop("query_net.base.fc1.bias")
    lightning["anchor_segment_detector.sed_model.fc1.bias"] = np.zeros(7, np.float32)
    lightning["loss_weights"] = np.zeros(1, np.float32)
    with pytest.raises(UserError) as error:
        convert_lightning(lightning)
    text = str(error.value)
    assert "query_net.base.fc1.bias is missing" in text
    assert "anchor_segment_detector.sed_model.fc1.bias has shape (7,) instead of (6,)" in text
    assert "loss_weights is unexpected" in text


def test_checkpoint_without_tagging_nets_gives_a_separator_alone(lightning):
    only = {name: t for name, t in lightning.items() if name.startswith("ss_model.")}
    assert convert_lightning(only).keys() == {"separator"}
