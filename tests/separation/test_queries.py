import types

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


def test_classes_that_the_tagging_net_lacks_are_said(model, monkeypatch):
    net = tiny.TINY_YAMNET.clone(unknown_classes=(1, 2))
    monkeypatch.setattr(model, "tagger", types.SimpleNamespace(module=net))
    named = Classes({"x": [0, 1], "y": [74]}).unheard_of(model)
    assert 'no output for "Male speech, man speaking" (below Speech): their' in named
    assert named.endswith("so nothing is separated as one of them")
    assert Classes({"y": [74]}).unheard_of(model) == ""
    # A level asks for what is heard: only a node of nothing else is worth a word.
    level = Classes({"Human voice": [0, 1], "Women": [2]}, only_active=True).unheard_of(model)
    assert "Female speech" in level
    assert "Male speech" not in level


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


@pytest.mark.parametrize("kind", ["soft", "class_vectors"])
def test_a_class_is_asked_for_with_the_mean_that_the_model_has_of_it(tmp_path, kind):
    means = tiny.class_means(3, 5)
    model = Model(tiny.write_separator(tmp_path / "model", kind, means=means))
    without = Model(tiny.write_separator(tmp_path / "without", kind))
    np.testing.assert_array_equal(model.means, means)
    assert without.means is None
    assert model.query_hash == without.query_hash  # banks are of either
    heard = np.full((2, 527), 0.01, np.float32)
    heard[0, 3], heard[1, 5], heard[1, 7] = 0.6, 0.2, 0.3

    def of(*classes, segment):
        alone = np.zeros((1, 527), np.float32)
        alone[0, list(classes)] = heard[segment, list(classes)]
        return model.adapt(alone)[0]

    of_means = model.adapt(means)
    sets = {"known": [3], "both": [3, 5], "unknown": [7], "mixed": [5, 7, 8], "silent": [9]}
    found = {target.name: target for target in Classes(sets).targets(model, heard)}
    wanted = {
        "known": of_means[[3]],
        "both": [
            (0.6 * of_means[3] + 0.01 * of_means[5]) / 0.61,
            (0.01 * of_means[3] + 0.2 * of_means[5]) / 0.21,
        ],
        "unknown": [of(7, segment=1)],
        "mixed": [(0.2 * of_means[5] + 0.31 * of(7, 8, segment=1)) / 0.51],
        "silent": [of(9, segment=0)],
    }
    for name, conditions in wanted.items():
        largest = np.abs(conditions).max()
        np.testing.assert_allclose(found[name].conditions, conditions, atol=2e-4 * largest)
    faint = np.zeros((1, 527), np.float32)
    faint[0, 3] = 1e-30  # whatever its probability, it is the mean
    np.testing.assert_allclose(
        model.of_probabilities(faint), of_means[[3]], atol=2e-4 * np.abs(of_means[3]).max()
    )
    nothing = model.of_probabilities(np.zeros((1, 527), np.float32))
    np.testing.assert_array_equal(nothing, model.adapt(np.zeros((1, 527), np.float32)))


def test_means_that_do_not_fit_are_said(tmp_path):
    means = tiny.class_means(3)
    means[3, 4] = np.nan
    for broken, said in ((means, "NaN or infinite"), (means[:, :5], "means")):
        model = Model(tiny.write_separator(tmp_path / str(broken.shape[1]), means=broken))
        with pytest.raises(UserError, match=said):
            Classes({"x": [3]}).targets(model, np.full((1, 527), 0.5, np.float32))


def _directions(model):
    """Centred class vectors of norm 1."""
    vectors = np.asarray(model.tagger(method="class_vectors"))
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_vector_of_the_wrong_width(model):
    query = Vectors({"x": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="has 3 values"):
        Separator(model).separate(tiny.noise(0, 1), tiny.RATE, query)
