import csv
import pathlib

import numpy as np

from tests.models.bert import real_folder
from uss_jax.bundles.node_vectors import load_node_vectors
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.ontology import load_ontology
from uss_jax.separation.words import rank

PHRASES = pathlib.Path(__file__).with_name("phrases.csv")


def test_the_most_similar_comes_first():
    vectors = np.array([[0, 1], [3, 0], [1, 1], [-1, 0], [2, 0]], np.float32)
    order, similarity = rank(np.array([0.5, 0], np.float32), vectors)
    assert order.tolist() == [1, 4, 2, 0, 3]
    np.testing.assert_allclose(similarity, [1, 1, 0.5**0.5, 0, -1], atol=1e-6)


def test_zeros_have_no_similarity():
    order, similarity = rank(np.ones(2, np.float32), np.array([[0, 0], [1, 0]], np.float32))
    assert order.tolist() == [1, 0]
    assert similarity[1] == 0
    assert not rank(np.zeros(2, np.float32), np.ones((3, 2), np.float32))[1].any()


def test_every_node_finds_itself():
    vectors = load_node_vectors().vectors
    for row in range(0, len(vectors), 50):
        order, similarity = rank(vectors[row], vectors)
        assert order[0] == row
        np.testing.assert_allclose(similarity[0], 1, atol=1e-6)


def test_everyday_phrases_find_their_node():
    """Measured: 39 of 60 come first, 48 among three. The phrases were written before."""
    names = [node.name for node in load_ontology().nodes.values()]
    with PHRASES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    vectors = TextEncoder(real_folder()).encode([row["phrase"] for row in rows])
    nodes = load_node_vectors().vectors
    places = [
        rank(vector, nodes)[0].tolist().index(names.index(row["node"]))
        for row, vector in zip(rows, vectors, strict=True)
    ]
    assert len(places) == 60
    assert sum(place == 0 for place in places) >= 38
    assert sum(place < 3 for place in places) >= 47
