"""Folders of sentence encoders, with one file changed."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.damage import check_words, damaged, fuzz
from tests.fuzz.test_asking import changed
from tests.models.bert import WORDS, published_config, tokenizer_json, write_published
from uss_jax.bundles import text_encoder
from uss_jax.bundles.text_encoder import FILES, TextEncoder, read_encoder
from uss_jax.errors import UserError, one_line
from uss_jax.models.minilm import MiniLM

SMALL = {"positions": 8, "layers": 1, "hidden_width": 1}
CONFIG = published_config(MiniLM(vocabulary=len(WORDS), **SMALL))
SENTENCE = "a dog barks, zzz [CLS] ä " + "x" * 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("encoder") / "published", **SMALL)[0]


@pytest.fixture(scope="module")
def good(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def _written(folder, good, name, data):
    for other in FILES:
        (folder / other).write_bytes(data if other == name else good[other])
    return folder


@fuzz
@given(data=changed(CONFIG) | st.binary(max_size=99))
def test_configs(folder, good, data):
    try:
        module = read_encoder(_written(folder, good, "config.json", data)).module
    except UserError as error:
        check_words(one_line(str(error)))
    else:
        assert module.width % module.heads == 0


@fuzz
@given(data=changed(tokenizer_json()))
def test_tokenizers(folder, good, data):
    pytest.importorskip("tokenizers")
    try:
        encoder = TextEncoder(_written(folder, good, "tokenizer.json", data))
        assert 2 < len(encoder._tokens(SENTENCE)) <= SMALL["positions"]
    except UserError as error:
        check_words(one_line(str(error)))


@fuzz
@given(data=st.data())
def test_tensors(folder, good, data):
    tensors = good["model.safetensors"]
    head = 8 + int.from_bytes(tensors[:8], "little")
    changed_head = data.draw(damaged(tensors[:head])) + tensors[head:]
    try:
        params = read_encoder(_written(folder, good, "model.safetensors", changed_head)).params
    except UserError as error:
        check_words(one_line(str(error)))
    else:
        assert np.isfinite(params["words"]["embedding"]).all()


@fuzz
@given(data=changed([{"type": "sentence_transformers.models.Pooling"}]))
def test_lists_of_modules(folder, good, data):
    (_written(folder, good, "", b"") / "modules.json").write_bytes(data)
    try:
        read_encoder(folder)
    except UserError as error:
        check_words(one_line(str(error)))
    finally:
        (folder / "modules.json").unlink()


def test_the_good_folder_is_taken(folder, good):
    read_encoder(_written(folder, good, "", b""))
    assert json.loads(good["config.json"]) == CONFIG
    assert CONFIG["hidden_size"] == text_encoder.WIDTH
