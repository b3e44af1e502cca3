import numpy as np
import pytest
from matplotlib.image import imread

from uss_jax.audio.picture import spectrogram_db, write_picture


def test_a_full_scale_sine_is_zero_decibels_at_its_frequency():
    rate = 16000
    t = np.arange(rate) / rate
    spectrogram = spectrogram_db(np.sin(2 * np.pi * 2000 * t), rate)
    middle = spectrogram[:, spectrogram.shape[1] // 2]
    assert middle.argmax() * rate / (2 * (len(middle) - 1)) == 2000
    assert middle.max() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("samples", [1, 100, 16000])
def test_any_length_and_silence_make_a_picture(tmp_path, samples):
    panels = {"mixture": np.zeros(samples), "target": np.zeros(samples)}
    write_picture(tmp_path / "p.png", panels, 16000)
    assert imread(tmp_path / "p.png").shape[2] == 4
