import numpy as np
import pytest

from tests import tiny
from uss_jax.errors import UserError
from uss_jax.separation.queries import Classes, Vectors
from uss_jax.separation.recordings import Separator


def test_queries_that_no_model_takes(model):
    with pytest.raises(UserError, match="NaN or larger than 1e"):
        Vectors({"x": np.full(527, 3e38, np.float32)}).require_fit(model)
    with pytest.raises(UserError, match="from 0 to 526"):
        Classes({"x": [600]}).require_fit(model)
    with pytest.raises(UserError, match="from 0 to 526"):
        Classes({"x": []}).require_fit(model)


def test_a_vector_of_the_wrong_width(model):
    query = Vectors({"x": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="has 3 values"):
        Separator(model).separate(tiny.noise(0, 1), tiny.RATE, query)
