import jax.numpy as jnp
import numpy as np
import pytest

from uss_jax.audio.precise_dft import magnitudes
from uss_jax.audio.stft import hann_window

SETTINGS = dict(window_samples=400, hop_samples=160, n_fft=512, bins=(4, 241))


def precise(waveform):
    return np.asarray(magnitudes(jnp.asarray(waveform)[None], **SETTINGS))[0]


def exact(waveform):
    frames = np.lib.stride_tricks.sliding_window_view(waveform.astype(np.float64), 400)[::160]
    return np.abs(np.fft.rfft(frames * hann_window(400), 512))[:, 4:241]


def loud_tone(samples=8000):
    return np.sin(2 * np.pi * 1000 * np.arange(samples) / 16000).astype(np.float32)


@pytest.mark.parametrize("salt", range(3))
def test_bins_beside_a_loud_tone_are_exact(salt):
    quiet = 1e-5 * np.random.default_rng(salt).standard_normal(8000)
    waveform = loud_tone() + quiet.astype(np.float32)
    found = precise(waveform)
    wanted = exact(waveform)
    quiet_bins = wanted < 1e-2
    assert quiet_bins.mean() > 0.5
    np.testing.assert_allclose(found[quiet_bins], wanted[quiet_bins], atol=1e-7)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_a_float32_fft_is_not():
    """Why there is a module of its own."""
    frames = np.lib.stride_tricks.sliding_window_view(loud_tone(), 400)[::160]
    fft = jnp.fft.rfft(frames * hann_window(400).astype(np.float32), 512)
    wanted = exact(loud_tone())
    error = np.abs(np.abs(fft)[:, 4:241] - wanted)[wanted < 1e-2]
    ours = precise(loud_tone())
    assert error.max() > 5 * np.abs(ours - wanted)[wanted < 1e-2].max()


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 1000, 12345])
def test_every_whole_frame_is_there(samples):
    waveform = np.random.default_rng(samples).uniform(-1, 1, samples).astype(np.float32)
    found = precise(waveform)
    wanted = exact(waveform)
    assert found.shape == wanted.shape == ((samples - 400) // 160 + 1, 237)
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-6)


def test_samples_beyond_full_scale_stay_as_exact_as_float32():
    waveform = 30 * np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    found = precise(waveform)
    np.testing.assert_allclose(found, exact(waveform), rtol=1e-4, atol=1e-2)
