import json
import shutil
import sys

import numpy as np
import pytest

from tests.models.bert import (
    GOLDEN,
    GOLDEN_VALUES,
    SENTENCES,
    WORDS,
    real_folder,
    tokenizer_json,
    torch_vectors,
    write_published,
)
from uss_jax.bundles import text_encoder
from uss_jax.bundles.text_encoder import TextEncoder, read_encoder
from uss_jax.errors import UserError
from uss_jax.weights.minilm import convert_encoder

PHRASES = [
    "a dog barks",
    "A CAT, far away",
    "rain",
    "loud rain loud rain loud rain loud",
    "Ünknown",
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("encoder") / "published")[0]


@pytest.fixture(scope="module")
def bundle(published):
    folder = published.with_name("bundle")
    convert_encoder(published, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(bundle):
    return TextEncoder(bundle)


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("tokenizers")  # golden tests run on machines without the extra `test`
    return TextEncoder(real_folder())


def test_sentences_equal_those_of_torch(published, encoder):
    pytest.importorskip("torch")
    wanted = torch_vectors(published, PHRASES)
    np.testing.assert_allclose(encoder.encode(PHRASES), wanted, atol=1e-5)


def test_a_published_folder_needs_no_conversion(published, encoder):
    opened = TextEncoder(published)
    assert opened.hash == encoder.hash
    np.testing.assert_array_equal(opened.encode(PHRASES), encoder.encode(PHRASES))


def test_vectors_are_float32_of_unit_norm(encoder):
    vectors = encoder.encode(PHRASES)
    assert vectors.shape == (len(PHRASES), encoder.width)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.width)


def test_a_sentence_has_one_vector_in_whatever_company(encoder):
    alone = np.concatenate([encoder.encode([phrase]) for phrase in PHRASES])
    np.testing.assert_allclose(encoder.encode(PHRASES), alone, atol=1e-6)
    many = encoder.encode(PHRASES * 9)
    np.testing.assert_allclose(many, np.tile(alone, (9, 1)), atol=1e-6)


def test_what_is_beyond_the_limit_is_left_out(encoder):
    # 24 positions less two special tokens.
    whole, longer = encoder.encode(["dog " * 22, "dog " * 10_000])
    np.testing.assert_allclose(longer, whole, atol=1e-6)
    assert np.abs(whole - encoder.encode(["dog " * 21])).max() > 1e-3


def test_few_programs_compile():
    lengths = np.random.default_rng(0).integers(3, 257, 1000).tolist()
    batches = list(text_encoder._batches(lengths, 256))
    assert {(len(rows), length) for rows, length in batches} <= {
        (size, length) for size in (1, 32) for length in (16, 32, 64, 128, 256)
    }
    assert {row for rows, _ in batches for row in rows} == set(range(1000))
    assert all(lengths[row] <= length for rows, length in batches for row in rows)


@pytest.mark.parametrize("sentence", ["", " ", "\n\t ", "\u200b", "\x00", "\u3000"])
def test_a_sentence_without_words_is_refused(encoder, sentence):
    with pytest.raises(UserError, match="has no words; say what the sound is"):
        encoder.encode(["a dog", sentence])


def test_what_is_no_text_is_refused(encoder):
    with pytest.raises(UserError, match="cannot be split into tokens"):
        encoder.encode(["a dog \ud800"])
    with pytest.raises(TypeError, match="a list of sentences"):
        encoder.encode("a dog")


def test_the_library_that_is_missing_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'uss-jax\[text\]'"):
        TextEncoder(bundle)


def other_tokenizer(**parts):
    return {**tokenizer_json(), **parts}


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (tokenizer_json([*WORDS, "meow"]), "of different encoders"),
        (other_tokenizer(model={"type": "Unigram", "vocab": []}), "model.type is 'Unigram'"),
        (other_tokenizer(normalizer={"type": "Lowercase"}), "expected BertNormalizer"),
        (other_tokenizer(pre_tokenizer=None), "pre_tokenizer is None, expected an object"),
        (other_tokenizer(post_processor={"type": "TemplateProcessing"}), "is not a tokenizer"),
        ({"model": {}}, "has no key"),
        ([], "expected an object"),
    ],
)
def test_tokenizers_of_other_encoders_are_refused(published, tmp_path, tokenizer, words):
    shutil.copytree(published, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=words):
        TextEncoder(tmp_path / "other").encode(["meow"])


def test_an_inconsistent_template_of_special_tokens_does_no_harm(published, tmp_path, encoder):
    tokenizer = tokenizer_json()
    tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"] = "[GONE]"
    shutil.copytree(published, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = TextEncoder(tmp_path / "other").encode(PHRASES)
    np.testing.assert_array_equal(found, encoder.encode(PHRASES))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_files_are_refused(bundle, published, tmp_path, name):
    for folder in (bundle, published):
        good = (folder / name).read_bytes()
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        many = b'{"a": [' + b"1," * (1 << 24) + b"1]}"
        for content in (b"", good[: len(good) // 2], b"\xff" + good, many, b"[" * 100_000):
            (copy / name).write_bytes(content)
            with pytest.raises(UserError, match=name) as raised:
                TextEncoder(copy)
            assert len(str(raised.value)) < 600
        (copy / name).unlink()
        with pytest.raises(UserError, match=f"it has no {name}"):
            TextEncoder(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_changed_file_of_a_bundle_is_refused(bundle, tmp_path, name):
    shutil.copytree(bundle, tmp_path / "copy")
    content = (bundle / name).read_bytes()
    at = len(content) - 1 if name == "model.safetensors" else content.index(b"barks")
    changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    (tmp_path / "copy" / name).write_bytes(changed)
    with pytest.raises(UserError, match=f"{name} does not match the hash of"):
        read_encoder(tmp_path / "copy")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kind", "tagger", "kind is 'tagger', expected text_encoder"),
        ("format_version", 99, "format_version is 99"),
        ("hashes", {}, "has no key 'hashes.encoder'"),
        ("encoder", {"width": 384}, "has no key 'encoder.vocabulary'"),
    ],
)
def test_a_bundle_with_another_config_is_refused(bundle, tmp_path, key, value, words):
    shutil.copytree(bundle, tmp_path / "copy")
    config = json.loads((bundle / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=words):
        read_encoder(tmp_path / "copy")


def test_weights_that_overflow_are_refused(tmp_path):
    folder, tensors = write_published(tmp_path / "huge")
    huge = {n: np.full_like(a, 3e38) if "dense" in n else a for n, a in tensors.items()}
    folder, _ = write_published(tmp_path / "other", tensors=huge)
    with pytest.raises(UserError, match="gives NaN or infinite vectors"):
        TextEncoder(folder).encode(["a dog"])


@pytest.mark.long
def test_the_published_encoder_equals_torch_on_everyday_sentences(real):
    pytest.importorskip("torch")
    assert len(SENTENCES) == 50
    odd = ["ALL CAPITALS", "naïve 🐶 日本語 12:30", "word " * 300, "supercalifragilistic" * 9, "?"]
    sentences = SENTENCES + odd
    wanted = torch_vectors(real_folder(), sentences)
    np.testing.assert_allclose(real.encode(sentences), wanted, atol=1e-5)


@pytest.mark.golden
def test_the_published_encoder_equals_the_golden_numbers(real):
    stored = np.load(GOLDEN)
    found = real.encode(stored["sentences"].tolist())[:, :GOLDEN_VALUES]
    np.testing.assert_allclose(found, stored["values"], atol=1e-5)


def test_similar_sentences_have_similar_vectors(real):
    vectors = real.encode(["a puppy whines", "a young dog whimpers", "a plane takes off"])
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5 > similarity[0, 2]
