import numpy as np
import pytest
import soundfile

from tests import tiny
from uss_jax.audio.files import read_mono
from uss_jax.errors import UserError
from uss_jax.separation.example_vectors import (
    name_of_examples,
    remove_silence,
    sounding,
    vector_of_recordings,
)


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
def test_a_constant_is_silence(model, tmp_path, level):
    constant = np.full(tiny.RATE, level, np.float32)
    assert sounding(constant, tiny.RATE).size == 0
    soundfile.write(tmp_path / "x.wav", constant, tiny.RATE, subtype="FLOAT")
    with pytest.raises(UserError, match="nothing but silence"):
        vector_of_recordings(model, tmp_path / "x.wav")


def test_ordinary_examples_are_cut_as_the_reference_does():
    waveform = np.concatenate([tiny.noise(0, 0.5), tiny.noise(1, 0.5, amplitude=0.002)])
    np.testing.assert_array_equal(
        sounding(waveform, tiny.RATE), remove_silence(waveform, tiny.RATE)
    )


def test_an_example_of_no_samples_has_no_vector():
    assert sounding(np.zeros(0, np.float32), 16000).size == 0
