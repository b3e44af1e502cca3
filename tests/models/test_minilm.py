import jax
import numpy as np
import pytest

from tests.models.bert import random_params, random_tensors, torch_encode
from uss_jax.models.minilm import MiniLM

NET = MiniLM(
    vocabulary=50, positions=20, token_types=3, width=24, layers=3, heads=4, hidden_width=20
)


def padded(sentences, length, padding=0):
    tokens = np.full((len(sentences), length), padding, np.int32)
    present = np.zeros((len(sentences), length), bool)
    for row, ids in enumerate(sentences):
        tokens[row, : len(ids)], present[row, : len(ids)] = ids, True
    return tokens, present


@pytest.fixture(scope="module")
def sentences():
    rng = np.random.default_rng(1)
    return [rng.integers(0, NET.vocabulary, length).tolist() for length in (1, 2, 7, 20)]


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda *arrays: NET.apply({"params": random_params(NET)}, *arrays))


def test_vectors_equal_those_of_torch(apply, sentences):
    pytest.importorskip("torch")
    tensors = random_tensors(NET)
    wanted = np.stack([torch_encode(tensors, NET.heads, ids, NET.epsilon) for ids in sentences])
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(apply(*padded(sentences, 20)), wanted, atol=1e-5)


def test_vectors_have_unit_norm_and_no_two_are_equal(apply, sentences):
    vectors = np.asarray(apply(*padded(sentences, 20)))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = vectors @ vectors.T
    assert np.max(cosines - np.eye(len(cosines))) < 0.99
    assert vectors.dtype == np.float32


def test_padding_changes_nothing(apply, sentences):
    short = sentences[:3]
    wanted = apply(*padded(short, 7))
    np.testing.assert_allclose(apply(*padded(short, 20, padding=9)), wanted, atol=1e-6)


def test_the_order_of_words_matters(apply):
    one, other = apply(*padded([[1, 2, 3, 4], [1, 3, 2, 4]], 4))
    assert np.abs(one - other).max() > 1e-3
