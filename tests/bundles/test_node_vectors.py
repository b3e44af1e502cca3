import hashlib
import pathlib

import numpy as np
import pytest

from tests.models.bert import real_folder
from uss_jax.bundles.node_vectors import (
    NODES_FILE,
    load_node_vectors,
    node_texts,
    spoken,
    write_node_vectors,
)
from uss_jax.bundles.text_encoder import WIDTH, TextEncoder
from uss_jax.ontology import load_ontology
from uss_jax.weights.minilm import encode_nodes

ROOT = pathlib.Path(__file__).parents[2]


def test_every_node_has_a_vector_of_unit_norm():
    nodes = load_node_vectors()
    assert nodes.mids == tuple(load_ontology().nodes)
    assert nodes.vectors.shape == (632, WIDTH)
    assert nodes.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(nodes.vectors, axis=1), 1, atol=2e-4)


def test_names_are_in_lower_case_except_acronyms():
    assert spoken("Telephone dialing, DTMF") == "telephone dialing, DTMF"
    assert spoken("UK garage") == "UK garage"
    assert spoken("MP3") == "MP3"
    assert spoken("A capella") == "a capella"
    assert len(set(node_texts())) == 632
    assert node_texts("the sound of {name}")[1] == "the sound of human voice"


def test_the_file_is_small_and_notice_tells_licence_origin_and_checksum():
    assert NODES_FILE.stat().st_size <= 5e5
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    about = notice.partition("uss_jax/assets/text/\n")[2].partition("\n\n")[0]
    assert hashlib.sha256(NODES_FILE.read_bytes()).hexdigest() in about
    assert load_node_vectors().encoder in about
    assert "sentence-transformers/all-MiniLM-L6-v2" in about
    assert "Apache-2.0" in about


def test_vectors_are_written_as_they_are_read(tmp_path):
    write_node_vectors(tmp_path / "nodes.npz", load_node_vectors())
    written, stored = np.load(tmp_path / "nodes.npz"), np.load(NODES_FILE)
    assert written.files == stored.files
    for name in stored.files:
        np.testing.assert_array_equal(written[name], stored[name])


@pytest.mark.long
def test_the_published_encoder_gives_the_vectors_in_the_package():
    made, nodes = encode_nodes(TextEncoder(real_folder())), load_node_vectors()
    assert (made.mids, made.template, made.encoder) == (nodes.mids, nodes.template, nodes.encoder)
    np.testing.assert_allclose(made.vectors, nodes.vectors, atol=2e-4)  # float16 near 0.25
