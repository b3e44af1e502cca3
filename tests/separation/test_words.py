"""Sounds asked for in words."""

import csv
import json
import pathlib

import numpy as np
import pytest
import soundfile

from tests.models.bert import real_folder
from uss_jax.bundles.node_vectors import load_node_vectors
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.separation.words import find_texts, rank, rank_by_words

PHRASES = pathlib.Path(__file__).with_name("phrases.csv")


def _phrases():
    with PHRASES.open(encoding="utf-8", newline="") as file:
        return [(row["phrase"], row["node"]) for row in csv.DictReader(file)]


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
    ontology = load_ontology()
    names = [n.name for n in ontology.nodes.values() if ontology.class_indexes(n.mid)]
    names.remove("Silence")
    found = find_texts([name.upper() for name in names], None, None, 1)
    assert [one.asked[0].name for one in found] == names
    assert {one.asked[0].similarity for one in found} == {1.0}
    assert found[names.index("Human voice")].class_indexes == ontology.class_indexes("/m/09l8g")


def test_words_find_names_in_other_forms():
    """Measured: 27 of 60 phrases come first by their words, 33 among three."""
    ranked = [([m.name for m in rank_by_words(phrase)], node) for phrase, node in _phrases()]
    assert sum(names[:1] == [node] for names, node in ranked) >= 27
    assert sum(node in names[:3] for names, node in ranked) >= 33
    for text, node in (
        ("Cats meowing", "Meow"),
        ("police sirens", "Police car (siren)"),
        ("the sound of church bells", "Church bell"),
        ("someone was strumming", "Strum"),
    ):
        assert find_texts([text], None, None, 1)[0].asked[0].name == node


def test_everyday_phrases_find_their_node_by_meaning():
    """Measured: 39 of 60 come first, 48 among three. The phrases were written before."""
    phrases = [(phrase, node) for phrase, node in _phrases() if phrase != "achoo"]
    found = find_texts([phrase for phrase, _ in phrases], real_folder(), 0.4, 1)
    first = [one.asked[0].name == node for one, (_, node) in zip(found, phrases, strict=True)]
    three = [
        node in [match.name for match in one.matches[:3]]
        for one, (_, node) in zip(found, phrases, strict=True)
    ]
    assert sum(first) >= 38
    assert sum(three) >= 47


def test_several_nodes_can_be_asked_for_as_one_sound():
    (found,) = find_texts(["church bells"], None, None, 3)
    assert [match.name for match in found.asked] == ["Church bell", "Bell", "Jingle bell"]
    assert len(found.class_indexes) == 3
    assert str(found).startswith('"church bells" asks for "Church bell" 1.00, "Bell" 0.5')
    (strict,) = find_texts(["church bells"], None, 0.9, 3)
    assert [match.name for match in strict.asked] == ["Church bell"]
    assert '; next "Bell"' in str(strict)


@pytest.mark.parametrize("encoder", [None, real_folder])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", '--text "" has no words'),
        ("  \t", "has no words"),
        ("?! 42", "has no words"),
        ("silence", '"silence" is silence, which cannot be separated'),
        ("xyzzy plugh", r'nothing in the ontology is near "xyzzy plugh"; the nearest: '),
        ("ein Hund bellt laut", "nothing in the ontology is near"),
        ("aboiement de chien", "in English, or give --classes"),
        ("犬が吠える", "nothing in the ontology is near"),
        ("dog " * 10_000, "--text has 39,999 characters, more than 1,000; describe one sound"),
    ],
)
def test_what_names_no_sound_is_said(text, said, encoder):
    with pytest.raises(UserError, match=said) as raised:
        find_texts([text], encoder and encoder(), None, 1)
    assert len(str(raised.value)) < 400


def test_a_text_is_separated_as_its_node_is(bundle, recordings, tmp_path, capsys):
    words = ["separate", str(recordings / "a.wav"), "--model", bundle, "--threshold", "0", "--out"]
    assert main([*words, str(tmp_path / "class"), "--classes", "Dog"]) == 0
    capsys.readouterr()
    text = "my dogs / far away"
    assert main([*words, str(tmp_path / "text"), "--text", text]) == 0
    said = capsys.readouterr()
    assert 'dogs / far away" asks for "Dog" ' in said.out
    assert "compares words with the names of sounds; to compare meanings, get all-Mini" in said.err
    one, _ = soundfile.read(tmp_path / "text/a/my dogs   far away.wav")
    other, _ = soundfile.read(tmp_path / "class/a/Dog.wav")
    np.testing.assert_array_equal(one, other)
    facts = json.loads((tmp_path / "text/a/report.json").read_text())
    assert facts["settings"]["text"][0]["text"] == text
    assert list(facts["settings"]["text"][0]["nodes"]) == ["Dog"]
    # With what is left out, and a look at what is near without a recording.
    assert main([*words, str(tmp_path / "less"), "--text", "dogs", "--without", "Animal"]) == 1
    assert "--without Animal leaves nothing of dogs" in capsys.readouterr().err
    assert main(["separate", "--text", "piano", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith('"piano" asks for "Piano" 1.00; next "Electric piano"')
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "a", "--classes", "Dog"], "--text asks by itself; give it without --classes"),
        (["--text", "dog", "Dog", "dog"], '--text "dog" is given twice'),
        (["--classes", "Dog", "--nearest", "2"], "--nearest has no effect without --text"),
        (["--text", "dog", "--text-encoder", "nowhere"], "nowhere is not the folder of a sentence"),
    ],
)
def test_misused_options_of_texts_are_said(bundle, recordings, capsys, words, said):
    audio = str(recordings / "a.wav")
    assert main(["separate", audio, "--model", bundle, *words]) == 1
    assert said in capsys.readouterr().err
