import pytest

from tests.weights.variables import SEPARATOR_FIELDS, separator_variables
from uss_jax.errors import UserError
from uss_jax.weights.torch import state_dict_of


def test_net_that_torch_has_no_names_for_is_not_written():
    fields = dict(SEPARATOR_FIELDS, film_gain=True)
    with pytest.raises(UserError, match=r"no tensor for .*film1/gain/kernel"):
        state_dict_of("separator", fields, separator_variables(fields))
