"""Sounds asked for in words."""

import csv
import json
import pathlib
import re

import numpy as np
import pytest
import soundfile

from tests.models.bert import real_folder
from tests.tiny import write_separator
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.separation.ranking import Match, rank, rank_by_words
from uss_jax.separation.words import find_texts

QUICK_COMPILATION = True

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


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(real_folder())


@pytest.fixture(params=["words", "meanings"])
def either(request):
    """No encoder, or the real one."""
    return None if request.param == "words" else request.getfixturevalue("encoder")


def test_every_name_finds_its_node_or_that_it_has_no_class(either):
    ontology = load_ontology()
    nodes = [node for node in ontology.nodes.values() if node.name != "Silence"]
    asked = [node for node in nodes if ontology.class_indexes(node.mid)]
    for node, found in zip(
        asked, find_texts([node.name.upper() for node in asked], either), strict=True
    ):
        assert found.asked[0] == Match(node.mid, 1.0)
    for node in nodes:
        if node not in asked:
            with pytest.raises(UserError, match="which is no class and has none below it; the ne"):
                find_texts([node.name], either)
    (found,) = find_texts(["Human voice"], either)
    assert found.class_indexes == ontology.class_indexes("/m/09l8g")


def _places(either):
    """Of the phrases that find something, whether their node is first, and among three."""
    first = three = 0
    for phrase, node in _phrases():
        try:
            (found,) = find_texts([phrase], either)
        except UserError:
            continue
        first += found.asked[0].name == node
        three += node in [match.name for match in found.matches[:3]]
    return first, three


def test_everyday_phrases_find_their_node(either):
    """The 60 phrases were written before any ranking; README tells these figures."""
    first, three = _places(either)
    least_first, least_three = (26, 32) if either is None else (36, 43)
    assert first >= least_first
    assert three >= least_three


def test_words_find_names_in_other_forms():
    for text, node in (
        ("Cats meowing", "Meow"),
        ("police sirens", "Police car (siren)"),
        ("the sound of church bells", "Church bell"),
        ("someone was strumming", "Strum"),
        ("bees", "Bee, wasp, etc."),
    ):
        assert find_texts([text], None)[0].asked[0].name == node
    # Another form is less than the word itself.
    assert rank_by_words("bell")[0] == Match(rank_by_words("bells")[0].mid, 1.0)
    assert 0.7 < rank_by_words("bells")[0].similarity < 0.9
    assert rank_by_words("belly")[0].similarity < 0.9


def test_several_nodes_can_be_asked_for_as_one_sound():
    (found,) = find_texts(["church bells"], None, most=3)
    assert [match.name for match in found.asked] == ["Church bell", "Bell", "Tubular bells"]
    assert len(found.class_indexes) == 3
    assert str(found).startswith('"church bells" asks for "Church bell" 0.93, "Bell" 0.46')
    (strict,) = find_texts(["church bell"], None, least=0.9, most=3)
    assert [match.name for match in strict.asked] == ["Church bell"]
    assert '; near too: "Bell"' in str(strict)


def test_silence_is_no_part_of_a_sound():
    (found,) = find_texts(["church bell in the silence"], None, most=2)
    names = [match.name for match in found.asked]
    assert names[0] == "Church bell"
    assert len(names) == 2
    assert "Silence" not in names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", '--text "" has no words that tell of a sound'),
        ("  \t", "has no words that tell of a sound"),
        ("?! 42", "has no words that tell of a sound"),
        ("a sound of it", "has no words that tell of a sound"),
        ("silence", '"silence" is silence, which cannot be separated'),
        ("xyzzy plugh", '"xyzzy plugh"'),
        ("ein Hund bellt laut", "in English, or give --classes"),
        ("aboiement de chien", "in English, or give --classes"),
        ("犬が吠える", "in English, or give --classes"),
        ("dog " * 10_000, "--text has 39,999 characters, more than 1,000; describe one sound"),
    ],
)
def test_what_names_no_sound_is_said(text, said, either):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        find_texts([text], either)
    assert len(str(raised.value)) < 400


def test_recordings_after_text_are_noticed(capsys):
    assert main(["separate", "--text", "a dog", __file__]) == 1
    assert "is a file; give recordings before --text" in capsys.readouterr().err


def test_classes_that_a_model_cannot_tell_are_passed_over(either):
    ontology = load_ontology()
    male = ontology.resolve("Male speech, man speaking")
    assert find_texts(["male speech"], either)[0].class_indexes == (male,)
    (found,) = find_texts(["male speech"], either, least=0.3, unknown=(male,))
    assert male not in found.class_indexes
    assert "Male speech, man speaking" in [match.name for match in found.matches]


def test_a_node_counts_as_trained_on_for_what_it_asks_for_alone(either):
    """ "Animal" asks for the class of that name, not for the pets below it."""
    ontology = load_ontology()
    pets = (ontology.resolve("Domestic animals, pets"), ontology.resolve("Dog"))
    (found,) = find_texts(["animals"], either, least=0.3)
    assert found.class_indexes == (ontology.resolve("Animal"),)
    (found,) = find_texts(["animals"], either, least=0.3, trained=pets)
    assert set(found.class_indexes) <= set(pets)


@pytest.mark.parametrize("kind", ["one_hot", "soft"])
def test_classes_that_a_model_was_not_trained_on_are_told_and_come_last(
    kind, recordings, tmp_path, capsys
):
    path = write_separator(tmp_path / "bundle", kind)
    ontology = load_ontology()
    dog, cat = (int(ontology.resolve(name)) for name in ("Dog", "Cat"))
    config = json.loads((path / "config.json").read_text())
    config["query"]["trained"] = [dog, cat]
    (path / "config.json").write_text(json.dumps(config))

    words = ["separate", str(recordings / "a.wav"), "--model", str(path), "--threshold", "0"]
    out = ["--out", str(tmp_path / "out")]
    assert main([*words, *out, "--text", "dogs bark"]) == 0
    said = capsys.readouterr()
    assert '"dogs bark" asks for "Dog"' in said.out
    assert "was not trained on" not in said.err
    assert main([*words, *out, "--text", "a car passes by"]) == 0  # nothing that it knows is near
    assert 'was not trained on "a car passes by"' in capsys.readouterr().err
    assert main([*words, *out, "--classes", "Bark", "Cat", "Bark+Dog"]) == 0
    said = capsys.readouterr().err
    assert 'was not trained on "Bark": its estimates are guesses' in said
    assert main(["inspect", str(path)]) == 0
    assert "trained on: 2 classes" in capsys.readouterr().out


def test_a_text_is_separated_as_its_node_is(bundle, recordings, tmp_path, capsys):
    words = ["separate", str(recordings / "a.wav"), "--model", bundle, "--threshold", "0", "--out"]
    assert main([*words, str(tmp_path / "class"), "--classes", "Dog"]) == 0
    capsys.readouterr()
    text = "my dogs / far away"
    assert main([*words, str(tmp_path / "text"), "--text", text]) == 0
    said = capsys.readouterr()
    assert 'dogs / far away" asks for "Dog" ' in said.out
    assert "--text compares words with the names of sounds; to compare meanings, give" in said.err
    one, _ = soundfile.read(tmp_path / "text/a/my dogs   far away.wav")
    other, _ = soundfile.read(tmp_path / "class/a/Dog.wav")
    np.testing.assert_array_equal(one, other)
    facts = json.loads((tmp_path / "text/a/report.json").read_text())
    assert facts["settings"]["text"][0]["text"] == text
    assert list(facts["settings"]["text"][0]["nodes"]) == ["Dog"]
    assert facts["settings"]["text_encoder"] is None
    assert facts["sounds"][0]["classes"] == ["Dog"]
    assert main([*words, str(tmp_path / "text"), "--text", text]) == 0
    assert "done earlier" in capsys.readouterr().out
    # With what is left out, and a look at what is near without a recording.
    assert main([*words, str(tmp_path / "less"), "--text", "dogs", "--without", "Animal"]) == 1
    assert "--without Animal leaves nothing of dogs" in capsys.readouterr().err
    assert main(["separate", "--text", "piano", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith('"piano" asks for "Piano" 1.00; near too: "Electric piano"')
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "a", "--classes", "Dog"], "--text asks by itself; give it without --classes"),
        (["--text", "dog", "Dog", "dog"], '--text "dog" is given twice'),
        (["--classes", "Dog", "--nearest", "2"], "--nearest has no effect without --text"),
        (["--text", "dog", "--text-encoder", "nowhere"], "nowhere is not the folder of a sentence"),
        (["--text", "dog\x1b bark", "--text", "nothing but xyzzy"], "nothing in the ontology is n"),
    ],
)
def test_misused_options_of_texts_are_said(bundle, recordings, capsys, words, said):
    audio = str(recordings / "a.wav")
    assert main(["separate", audio, "--model", bundle, *words]) == 1
    assert said in capsys.readouterr().err


def test_a_dry_run_says_what_the_model_would_be_asked(tmp_path, capsys):
    path = write_separator(tmp_path / "bundle", "soft")
    config = json.loads((path / "config.json").read_text())
    config["query"]["trained"] = [int(load_ontology().resolve("Growling"))]
    (path / "config.json").write_text(json.dumps(config))
    words = ["separate", "--dry-run", "--text", "a dog growls"]
    assert main([*words, "--model", str(path)]) == 0
    said = capsys.readouterr().out
    assert '"a dog growls" asks for "Growling"' in said
    assert said.endswith("asked with the classes of these nodes\n")
    config["query"]["trained"] = [int(load_ontology().resolve("Dog"))]
    (path / "config.json").write_text(json.dumps(config))
    assert main([*words, "--model", str(path)]) == 0
    assert '"a dog growls" asks for "Dog"' in capsys.readouterr().out
    assert main([*words, "--model", str(write_separator(tmp_path / "of_sounds", "embedding"))]) == 1
    assert "takes embeddings of example recordings, not classes" in capsys.readouterr().err
    assert main([*words, "--model", "yamnet"]) == 0


def test_a_dry_run_says_that_a_model_of_texts_is_asked_with_their_vectors(tmp_path, capsys):
    path = write_separator(tmp_path / "bundle", "text")
    words = ["separate", "--dry-run", "--model", str(path), "--text", "a puppy whines"]
    words += ["--text-encoder", str(real_folder())]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith('"a puppy whines" is nearest to ')
    assert said.endswith("asked with sentence vectors of texts\n")
    assert main([*words, "--nearest", "2"]) == 1
    assert "--nearest has no effect with a text's own vector" in capsys.readouterr().err
