import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models.bert import WORDS, random_tensors, real_folder, write_published
from tests.weights.variables import assert_same_tree
from uss_jax.bundles.text_encoder import read_encoder
from uss_jax.cli.inspection import inspect
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.models.minilm import MiniLM
from uss_jax.weights.minilm import convert_encoder

POOLER = {"pooler.dense.weight": np.ones((384, 384), "f4"), "pooler.dense.bias": np.ones(384, "f4")}
UNUSED = {**POOLER, "embeddings.position_ids": np.arange(24)[None]}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("encoder") / "published")


def run(*words):
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize("words", [(), ("--kind", "minilm")])
def test_a_published_folder_becomes_a_bundle(published, tmp_path, capsys, words):
    folder, tensors = published
    assert run(folder, tmp_path / "minilm", *words) == 0
    assert "a text_encoder bundle with 2 layers of width 384" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "minilm").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((tmp_path / "minilm" / "config.json").read_text())
    assert (config["kind"], config["format_version"]) == ("text_encoder", 1)
    assert config["licence"].startswith("unknown: see the source of model.safetensors (SHA-256 ")
    assert_same_tree(load_file(tmp_path / "minilm" / "model.safetensors"), tensors)

    before, after = read_encoder(folder), read_encoder(tmp_path / "minilm")
    assert_same_tree(after.params, before.params)
    assert (after.module, after.tokenizer, after.hash) == (
        before.module,
        before.tokenizer,
        before.hash,
    )
    assert after.is_bundle
    assert not before.is_bundle


@pytest.mark.parametrize("prefix", ["bert.", "0.auto_model."])
def test_names_may_have_a_prefix_and_a_pooler(published, tmp_path, prefix):
    folder, tensors = published
    other, _ = write_published(tmp_path / "other", prefix, {**tensors, **UNUSED})
    convert_encoder(other, tmp_path / "minilm")
    assert read_encoder(tmp_path / "minilm").hash == read_encoder(folder).hash
    assert load_file(tmp_path / "minilm" / "model.safetensors").keys() == tensors.keys()


def test_half_precision_is_read_as_float32(published, tmp_path):
    _, tensors = published
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    folder, _ = write_published(tmp_path / "half", tensors=half)
    kernel = read_encoder(folder).params["layer1"]["query"]["kernel"]
    wanted = half["encoder.layer.0.attention.self.query.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(kernel, wanted)
    assert kernel.dtype == np.float32


def changed(tensors, name, array):
    if array is None:
        return {key: value for key, value in tensors.items() if key != name}
    return {**tensors, name: array}


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        (QUERY, None, f"{QUERY} is missing"),
        (QUERY, np.zeros((384, 383), "f4"), r"query.weight has shape \[384, 383\] instead of"),
        (QUERY, np.zeros((384, 384), "i4"), "query.weight holds I32 instead of floats"),
        (QUERY, np.full((384, 384), np.nan, "f4"), "query.weight holds NaN or infinite values"),
        (QUERY, np.full((384, 384), 1e300), "query.weight holds NaN or infinite values"),
        (
            "encoder.layer.2.output.dense.bias",
            np.zeros(384, "f4"),
            "'bert.encoder.layer.2.*unexpected",
        ),
        ("cls.predictions.bias", np.zeros(3, "f4"), "'bert.cls.predictions.bias' is unexpected"),
        ("embeddings.word_embeddings.weight", None, "has 0 tensors called embeddings.word"),
    ],
)
def test_tensors_that_do_not_fit_are_named(published, tmp_path, name, array, words):
    folder, _ = write_published(tmp_path / "other", "bert.", changed(published[1], name, array))
    with pytest.raises(UserError, match=words) as raised:
        convert_encoder(folder, tmp_path / "minilm")
    assert len(str(raised.value)) < 600
    assert not (tmp_path / "minilm").exists()


def test_many_problems_are_counted(tmp_path):
    names = [f"x{i}" for i in range(1000)]
    tensors = random_tensors(MiniLM(vocabulary=len(WORDS), positions=24, layers=2, hidden_width=16))
    tensors |= dict.fromkeys(names, np.zeros(1, "f4"))
    folder, _ = write_published(tmp_path / "other", tensors=tensors)
    with pytest.raises(UserError, match="; and 997 more problems") as raised:
        read_encoder(folder)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 768, "is a sentence encoder of width 768, but vectors here are of width"),
        ("model_type", "roberta", "model_type is 'roberta', expected bert"),
        ("hidden_act", "relu", "hidden_act is 'relu', expected gelu"),
        ("position_embedding_type", "relative_key", "expected absolute"),
        ("num_attention_heads", 7, "7 heads do not divide the width 384"),
        ("num_hidden_layers", 3, "encoder.layer.2.* is missing"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, expected a whole number"),
        ("vocab_size", 15, r"word_embeddings.weight has shape \[14, 384\] instead of \[15, 384\]"),
        ("layer_norm_eps", -1, "layer_norm_eps is -1, expected a number"),
        ("layer_norm_eps", "1e-12", "layer_norm_eps is '1e-12', expected a number"),
    ],
)
def test_other_encoders_are_refused(published, tmp_path, capsys, key, value, words):
    folder, _ = write_published(tmp_path / "other", tensors=published[1], config={key: value})
    assert run(folder, tmp_path / "minilm") == 1
    with pytest.raises(UserError, match=words) as raised:
        read_encoder(folder)
    assert str(raised.value) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            "asks for another vector than the mean over tokens",
        ),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "has a module 'Dense'"),
        ("modules.json", {"type": 3}, "modules.json is not that of a sentence encoder"),
    ],
)
def test_other_ways_to_a_sentence_vector_are_refused(published, tmp_path, name, content, words):
    folder, _ = write_published(tmp_path / "other", tensors=published[1])
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_encoder(folder)


def test_what_cannot_be_converted_is_said(published, tmp_path, capsys):
    folder, _ = published
    out = tmp_path / "minilm"
    assert run(folder, out) == 0
    for words, said in [
        ((folder, out), "exists already; give a new folder"),
        ((out, tmp_path / "again"), "is a bundle already; use it as it is"),
        ((tmp_path, tmp_path / "other", "--kind", "minilm"), "it has no config.json"),
        ((tmp_path / "no", tmp_path / "other", "--kind", "minilm"), "it has no config.json"),
        ((folder, tmp_path / "other", "--kind", "cnn14"), "--kind has no effect with a bundle"),
        (
            (out / "config.json", tmp_path / "other", "--kind", "minilm"),
            "--kind minilm takes one folder as IN",
        ),
    ]:
        capsys.readouterr()
        assert run(*words) == 1
        assert said in capsys.readouterr().err


def test_inspect_describes_an_encoder(published, tmp_path):
    folder, _ = published
    convert_encoder(folder, tmp_path / "minilm")
    lines = inspect(tmp_path / "minilm")
    assert "text_encoder bundle, sentences to vectors of width 384" in lines[0]
    assert any(read_encoder(folder).hash in line for line in lines)


def test_the_published_encoder_is_known_by_its_hash(tmp_path):
    convert_encoder(real_folder(), tmp_path / "minilm")
    config = json.loads((tmp_path / "minilm" / "config.json").read_text())
    assert config["licence"] == "sentence-transformers/all-MiniLM-L6-v2: Apache-2.0"
    module = read_encoder(tmp_path / "minilm").module
    assert module == MiniLM()
    size = (tmp_path / "minilm" / "model.safetensors").stat().st_size
    assert size < (real_folder() / "model.safetensors").stat().st_size  # no pooler
