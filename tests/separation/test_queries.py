import numpy as np
import pytest

from tests import tiny
from uss_jax.bundles.model import Model
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


def test_a_condition_of_class_vectors_is_asked_with_the_probabilities_of_a_set(tmp_path):
    model = Model(tiny.write_separator(tmp_path / "model", "class_vectors"))
    heard = np.full((2, 527), 0.01, np.float32)
    heard[0, 3], heard[1, 5] = 0.5, 0.3
    first, second = Classes({"x": [3], "y": [3, 5]}).targets(model, heard)
    vectors = _directions(model)
    weights = np.log1p(heard * 100) / np.log(101)
    np.testing.assert_allclose(first.conditions, weights[:1, [3]] @ vectors[[3]], atol=2e-4)
    np.testing.assert_allclose(second.conditions, weights[:, [3, 5]] @ vectors[[3, 5]], atol=2e-4)
    assert first.active.tolist() == [True, False]
    assert second.active.tolist() == [True, True]


def _directions(model):
    """Centred class vectors of norm 1."""
    vectors = np.asarray(model.tagger(method="class_vectors"))
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_vector_of_the_wrong_width(model):
    query = Vectors({"x": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="has 3 values"):
        Separator(model).separate(tiny.noise(0, 1), tiny.RATE, query)
