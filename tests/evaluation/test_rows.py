import numpy as np
import pytest
import soundfile

from tests.evaluation.tones import BARK, DOG, PIANO, SOURCES, SPEECH, sdr
from tests.tiny import RATE, class_means, noise, write_separator
from uss_jax.audio.files import write_wav
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.evaluation import rows as rows_module
from uss_jax.evaluation.rows import CLASS, MEAN, SHUFFLED, left_out, unrelated_items
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suites.pairs import find_pairs

QUICK_COMPILATION = True


def test_a_class_vector_is_the_probability_of_the_class_in_the_mixture(place):
    model, pairs = Model(place / "soft"), find_pairs(place / "pairs")
    figures, rows = score(model, pairs)
    mixture, _ = soundfile.read(pairs[0].mixture, dtype="float32")
    condition = np.zeros(527, np.float32)
    label = pairs[0].class_index
    condition[label] = model.tagger(mixture[None])["clipwise"][0, label]
    np.testing.assert_allclose(rows[CLASS].conditions[0], condition, atol=1e-6)
    source, _ = soundfile.read(pairs[0].source, dtype="float32")
    estimate = np.asarray(model.separate(mixture[None], condition[None]))[0]
    assert figures[CLASS]["sdr"][0] == pytest.approx(sdr(source, estimate), abs=1e-3)


def test_a_class_is_also_asked_for_with_the_mean_that_the_model_has(place, tmp_path, monkeypatch):
    pairs = find_pairs(place / "pairs")
    label = pairs[0].class_index
    model = Model(write_separator(tmp_path / "model", means=class_means(label)))
    figures, rows = score(model, pairs)
    assert list(rows) == ["oracle", "class by its mean", "class alone", "shuffled oracle"]
    np.testing.assert_allclose(rows[MEAN].conditions[0], model.means[label], atol=1e-6)
    others = [at for at, pair in enumerate(pairs) if pair.class_index != label]
    np.testing.assert_allclose(
        rows[MEAN].conditions[others], rows[CLASS].conditions[others], atol=1e-6
    )
    assert figures[MEAN]["sdr"][0] != figures[CLASS]["sdr"][0]
    # Rows are computed in parts.
    monkeypatch.setattr(rows_module, "_ROWS_AT_A_TIME", 2)
    _, parts = score(model, pairs)
    np.testing.assert_allclose(parts[MEAN].conditions, rows[MEAN].conditions, atol=1e-6)


def test_a_class_that_the_tagging_net_lacks_is_not_asked_for(place, tmp_path, monkeypatch):
    """As with YAMNet, whose probability of six classes is always 0: `separate` refuses them."""
    pairs = find_pairs(place / "pairs")
    lacking = pairs[0].class_index
    heard_classes = rows_module._heard_classes

    def without_it(*arguments):
        found, exists = heard_classes(*arguments)
        found[:, lacking] = 0.0
        return found, exists

    monkeypatch.setattr(rows_module, "_heard_classes", without_it)
    model = Model(write_separator(tmp_path / "model", means=class_means(lacking)))
    _, rows = score(model, pairs)
    known = [pair.class_index != lacking for pair in pairs]
    assert rows[CLASS].exists.tolist() == rows[MEAN].exists.tolist() == known
    number = known.count(False)
    said = left_out(rows, len(pairs))
    assert said.startswith(f"the rows by class leave out {number} item")
    assert said.endswith(
        "of no class of AudioSet, or of one that the tagging net has no output for"
    )


def test_items_too_short_for_the_query_net_are_said(tmp_path):
    folder = tmp_path / "pairs" / "class_id=3"
    folder.mkdir(parents=True)
    for side in ("source", "mixture"):
        write_wav(folder / f"0_{side}.wav", noise(0, 0.02)[None], RATE)
    model = Model(write_separator(tmp_path / "model", "soft"))
    with pytest.raises(
        UserError, match=r"0_mixture.wav lasts 0.02 s, too short for the query net of"
    ):
        score(model, find_pairs(tmp_path / "pairs"))


def test_shuffled_queries_are_of_unrelated_classes(place):
    pairs = find_pairs(place / "pairs")
    _, rows = score(Model(place / "one_hot"), pairs)
    asked = rows[SHUFFLED].conditions.argmax(axis=1)
    for pair, label in zip(pairs, asked.tolist(), strict=True):
        assert label in set(SOURCES) - {pair.class_index}


def test_a_query_of_the_same_sound_is_no_shuffled_one():
    # The first and third source are one clip with two labels; Bark is below Dog.
    classes, digests = [SPEECH, SPEECH, PIANO, DOG, BARK], ["x", "y", "x", "z", "w"]
    for _ in range(2):
        chosen = unrelated_items(classes, digests)
        assert {classes[at] for at in chosen[:3]} <= {DOG, BARK}
        assert {classes[at] for at in chosen[3:]} <= {SPEECH, PIANO}
    assert unrelated_items([DOG, BARK], ["x", "y"]).tolist() == [-1, -1]


def test_a_shuffled_query_asks_for_nothing_that_is_in_the_mixture():
    classes, digests = [SPEECH, DOG, PIANO], ["x", "y", "z"]
    assert unrelated_items(classes, digests, [BARK, None, DOG]).tolist()[::2] == [2, 0]
    assert unrelated_items(["bass", "drums", "bass"], digests).tolist()[::2] == [1, 1]
