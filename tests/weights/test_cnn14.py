import jax
import jax.numpy as jnp
import pytest

from tests.golden.weights import layout_tensors
from tests.weights.variables import (
    TAGGER_FIELDS,
    assert_same_tree,
    empty_arrays,
    leaf_count,
    shapes,
    tagger_variables,
)
from uss_jax.models.cnn14 import Cnn14, Cnn14DecisionLevelMax
from uss_jax.weights.cnn14 import convert_cnn14
from uss_jax.weights.torch import state_dict_of


@pytest.mark.parametrize("module", [Cnn14, Cnn14DecisionLevelMax])
@pytest.mark.parametrize("layout", ["cnn14", "cnn14_decision_level_max"])
def test_golden_tagger_fills_every_leaf(layout, module):
    rows = layout_tensors(layout)
    converted = convert_cnn14(empty_arrays(rows))
    module = module(**converted.fields)
    assert module == type(module)()
    expected = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32000)))
    assert shapes(converted.variables) == shapes(expected)
    assert len(converted.foreign) + leaf_count(expected) == len(rows)


def test_tagger_of_another_shape_goes_out_and_back_unchanged():
    converted = convert_cnn14(state_dict_of("query", TAGGER_FIELDS, tagger_variables()))
    assert converted.fields == TAGGER_FIELDS
    assert_same_tree(converted.variables, tagger_variables())
