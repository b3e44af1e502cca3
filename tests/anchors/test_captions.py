"""Captions, from the label file to the batch."""

import json
import pickle
import shutil

import numpy as np
import pytest
import soundfile

from tests.models.bert import real_folder
from tests.tiny import RATE, noise
from uss_jax.anchors.captions import open_captions
from uss_jax.bundles.node_vectors import load_node_vectors
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.cli.main import main
from uss_jax.data.index import load_index
from uss_jax.data.tf_example import caption_of, parse, serialise
from uss_jax.errors import UserError
from uss_jax.training.texts import load_texts, with_captions

SAID = ["a dog  barks, then whines", "", "a car passes", "a car passes"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Four clips; the second has no caption, the last two have the same."""
    place = tmp_path_factory.mktemp("captions")
    (place / "audio").mkdir()
    lines = ["file,labels,caption"]
    for number, caption in enumerate(SAID):
        soundfile.write(place / "audio" / f"{number}.wav", noise(number, 0.5), RATE)
        lines.append(f'{number}.wav,Dog,"{caption}"')
    (place / "labels.csv").write_text("\n".join(lines) + "\n")
    words = ["prepare", "--audio", str(place / "audio"), "--labels", str(place / "labels.csv")]
    words += ["--out", str(place), "--name", "said", "--sample-rate", str(RATE)]
    words += ["--version", "1.0.0", "--split", "train", "--clip-seconds", "1", "--shards", "2"]
    assert main(words) == 0
    return place / "said" / "1.0.0"


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(real_folder())


@pytest.fixture(scope="module")
def captions(records):
    folder = records / "train.captions"
    words = ["captions", str(records), "--text-encoder", str(real_folder()), "--out", str(folder)]
    assert main(words) == 0
    return folder


def test_a_record_keeps_its_caption_and_one_without_is_as_before():
    samples = np.arange(9, dtype=np.int16)
    assert caption_of(serialise(b"a", samples, [1], "été")) == "été"
    assert caption_of(serialise(b"a", samples, [1])) == ""
    assert serialise(b"a", samples, [1], "") == serialise(b"a", samples, [1])
    clip = parse(serialise(b"a", samples, [1], "a dog"))
    assert clip == parse(serialise(b"a", samples, [1]))
    with pytest.raises(ValueError, match="not UTF-8"):
        caption_of(serialise(b"a", samples, [1], "\udcff"))


def test_clips_are_asked_with_their_captions(records, captions, encoder):
    index = load_index(records, "train")
    texts = with_captions(load_texts("", 1.0), str(captions), index)
    order = [int(id.decode()[0]) for id in index.ids]
    found = texts.draw(0, np.arange(4), np.arange(4), np.full(4, 7))["text"]
    wanted = encoder.encode(["a dog barks, then whines", "a car passes"])
    by_record = dict(zip(order, found, strict=True))
    np.testing.assert_allclose(by_record[0], wanted[0], atol=5e-4)
    np.testing.assert_allclose(by_record[3], wanted[1], atol=5e-4)
    np.testing.assert_array_equal(by_record[1], load_node_vectors().of_classes()[7])
    assert json.loads((captions / "header.json").read_text())["captions"] == 2
    assert texts.digest != load_texts("", 1.0).digest


def test_captions_encoded_later_are_not_read_under_the_earlier_header(
    records, captions, encoder, tmp_path
):
    """As by a process of a run that begins to read after that."""
    index = load_index(records, "train")
    shutil.copytree(captions, tmp_path / "earlier")
    shutil.copytree(captions, tmp_path / "later")
    table = open_captions(tmp_path / "earlier", index, encoder.hash)
    there, _ = pickle.loads(pickle.dumps(table)).read(np.arange(4))
    assert there.sum() == 3
    shutil.rmtree(tmp_path / "earlier")
    (tmp_path / "later").rename(tmp_path / "earlier")
    with pytest.raises(UserError, match=r"earlier was replaced while it was being read; put back"):
        pickle.loads(pickle.dumps(table)).read(np.arange(4))


def test_inspect_tells_of_captions(captions, capsys):
    assert main(["inspect", str(captions)]) == 0
    assert "2 captions of clips" in capsys.readouterr().out


def test_captions_of_others_are_refused(records, captions, encoder, tmp_path, capsys):
    index = load_index(records, "train")
    with pytest.raises(UserError, match="another sentence encoder"):
        open_captions(captions, index, "0" * 64)
    header = json.loads((captions / "header.json").read_text())
    (tmp_path / "other").mkdir()
    for file in captions.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "header.json").write_text(json.dumps({**header, "index_digest": "0"}))
    with pytest.raises(UserError, match="captions of other records"):
        open_captions(tmp_path / "other", index, encoder.hash)
    words = ["captions", str(records), "--text-encoder", str(real_folder())]
    assert main([*words, "--out", str(captions)]) == 1
    assert "give --overwrite to replace it" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "c"), "--feature", "sentence"]) == 1
    assert "has a caption in 'sentence'" in capsys.readouterr().err
    assert main([*words, "--out", str(records), "--overwrite"]) == 1
    assert "is not a folder of captions" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "c"), "--feature", "labels"]) == 1
    assert "has no text in feature 'labels'" in capsys.readouterr().err
