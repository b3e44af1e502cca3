"""Banks of vectors: found by their exact names, whatever file names would make of these."""

import numpy as np
import pytest
import soundfile

from tests import tiny
from uss_jax.audio.files import mono, read_mono
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.separation.queries import (
    Bank,
    Classes,
    Vectors,
    load_bank,
    name_of_examples,
    remove_silence,
    sounding,
    vector_of_recordings,
    write_bank,
)
from uss_jax.separation.separator import tag_segments


def bank(*names):
    return Bank(names, np.ones((len(names), 3), np.float32), "embedding", "hash")


@pytest.mark.parametrize(
    ("names", "asked", "row"),
    [
        (("狗", "猫"), "狗", 0),
        (("a b", "a_b"), "a b", 0),
        (("a b", "a_b"), "a_b", 1),
        (("Dog", "dog"), "dog", 1),
        (("Vacuum cleaner", "x"), "vacuum_cleaner", 0),
        (("Türklopfer", "x"), "tu\u0308rklopfer", 0),
    ],
)
def test_the_exact_name_comes_first(names, asked, row):
    assert bank(*names).select([asked], "b.npz") == [row]


@pytest.mark.parametrize(
    ("names", "asked", "said"),
    [
        (("狗", "猫"), ["☃"], 'no vector called "☃"; it has 狗, 猫'),
        (
            ("a b", "A_B"),
            ["a_B"],
            '"a_B" is ambiguous: it could be "a b" or "A_B" of b.npz; give the exact name',
        ),
        (("Dog", "Cat"), ["Dog", "dog"], '"Dog" is given twice'),
    ],
)
def test_a_name_that_means_no_single_vector_is_refused(names, asked, said):
    with pytest.raises(UserError) as error:
        bank(*names).select(asked, "b.npz")
    assert said in str(error.value)


def test_names_of_examples_are_whole(tmp_path, monkeypatch):
    for name in ("v1.2 barks", "site.A"):
        (tmp_path / name).mkdir()
    (tmp_path / "my.dog.wav").touch()
    (tmp_path / "link").symlink_to(tmp_path / "site.A")
    assert name_of_examples(tmp_path / "v1.2 barks") == "v1.2 barks"
    assert name_of_examples(f"{tmp_path}/site.A/") == "site.A"
    assert name_of_examples(tmp_path / "my.dog.wav") == "my.dog"
    assert name_of_examples(tmp_path / "link") == "link"
    monkeypatch.chdir(tmp_path / "site.A")
    assert name_of_examples(".") == "site.A"


def test_every_sound_of_a_bank_gets_a_file(tmp_path):
    """Names that an ASCII file name would merge."""
    model = str(tiny.write_separator(tmp_path / "model"))
    names = ["狗", "猫", "Türklopfer", "a b", "a_b", "v1.2 barks", "site.A", "site.B"]
    for seed, name in enumerate(names):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "x.wav", tiny.noise(seed, 0.5), tiny.RATE)
    folders = [str(tmp_path / name) for name in names]
    stored = str(tmp_path / "b.npz")
    assert main(["query", "make", stored, *folders, "--model", model]) == 0
    assert list(load_bank(stored).name) == names
    soundfile.write(tmp_path / "street.wav", tiny.noise(20, 0.5), tiny.RATE)
    words = ["separate", str(tmp_path / "street.wav"), "--model", model, "--query", stored]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert {p.stem for p in (tmp_path / "out/street").glob("*.wav")} == set(names)
    assert main([*words, "--out", str(tmp_path / "one"), "--classes", "狗"]) == 0
    assert [p.stem for p in (tmp_path / "one/street").glob("*.wav")] == ["狗"]


def examples():
    click = np.zeros(tiny.RATE, np.float32)
    click[100:500] = tiny.noise(0, 0.05, amplitude=0.3)
    quiet = np.concatenate([tiny.noise(1, 0.5, amplitude=1e-4), tiny.tone(900, 0.5, 0.018)])
    return {
        "quiet": quiet,  # below the reference's threshold of 0.02
        "short": tiny.noise(2, 0.05),
        "click": click,
        "click at the end": np.append(np.zeros(tiny.RATE, np.float32), tiny.noise(3, 0.05)),
        "offset": tiny.tone(500, 0.5) * np.repeat([0, 1], tiny.RATE // 4).astype("f4") + 0.4,
        "opposed": np.stack([tiny.noise(4, 0.5), -tiny.noise(4, 0.5)]),
    }


@pytest.mark.parametrize("name", examples())
def test_examples_of_every_level_and_length_are_heard(tmp_path, name):
    waveform = examples()[name]
    soundfile.write(tmp_path / "x.wav", waveform.T, tiny.RATE, subtype="FLOAT")
    heard = sounding(read_mono(tmp_path / "x.wav", tiny.RATE), tiny.RATE)
    assert heard.size
    assert np.abs(heard - heard.mean()).max() > 0.01
    if name in ("quiet", "offset"):  # the silent half is dropped
        assert heard.size == (4000 if name == "quiet" else 2400)  # whole frames of 800
        assert abs(heard.mean()) < 0.01


@pytest.mark.parametrize("level", [0.0, 0.5, -1.0])
def test_a_constant_is_silence(tmp_path, level):
    constant = np.full(tiny.RATE, level, np.float32)
    assert sounding(constant, tiny.RATE).size == 0
    soundfile.write(tmp_path / "x.wav", constant, tiny.RATE, subtype="FLOAT")
    model = Model(tiny.write_separator(tmp_path / "model"))
    with pytest.raises(UserError, match="nothing but silence"):
        vector_of_recordings(model, tmp_path / "x.wav")


def test_ordinary_examples_are_cut_as_the_reference_does():
    waveform = np.concatenate([tiny.noise(0, 0.5), tiny.noise(1, 0.5, amplitude=0.002)])
    np.testing.assert_array_equal(
        sounding(waveform, tiny.RATE), remove_silence(waveform, tiny.RATE)
    )


def test_channels_that_cancel_are_heard_by_the_tagging_net(tmp_path):
    model = Model(tiny.write_separator(tmp_path / "model"))
    one = tiny.noise(0, 0.5)[None]
    alone = tag_segments(model, iter([one]))
    np.testing.assert_array_equal(tag_segments(model, iter([np.concatenate([one, -one])])), alone)
    beside = np.concatenate([one, 0.5 * one])
    np.testing.assert_allclose(mono(beside), 0.75 * one[0], atol=1e-7)


def test_a_bank_with_a_name_twice_is_refused(tmp_path):
    write_bank(tmp_path / "b.npz", bank("a", "a"))
    with pytest.raises(UserError, match='two vectors called "a"'):
        load_bank(tmp_path / "b.npz")


def test_queries_that_no_model_takes(tmp_path):
    model = Model(tiny.write_separator(tmp_path / "model"))
    with pytest.raises(UserError, match="NaN or larger than 1e"):
        Vectors({"x": np.full(527, 3e38, np.float32)}).require_fit(model)
    with pytest.raises(UserError, match="from 0 to 526"):
        Classes({"x": [600]}).require_fit(model)
    with pytest.raises(UserError, match="from 0 to 526"):
        Classes({"x": []}).require_fit(model)
