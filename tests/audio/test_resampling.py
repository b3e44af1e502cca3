import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from uss_jax.audio.resampling import resample


@settings(max_examples=50)
@given(
    st.integers(0, 5000), *[st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000])] * 2
)
def test_resampled_length_is_rounded_half_up(samples, from_rate, to_rate):
    out = resample(np.zeros((2, samples), np.float32), from_rate, to_rate)
    assert out.shape == (2, int(np.floor(samples * to_rate / from_rate + 0.5)))


def test_resample_treats_channels_alike():
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 3, 4410)).astype(np.float32)
    together = resample(waveform, 44100, 32000)
    alone = resample(waveform[1, 2], 44100, 32000)
    np.testing.assert_array_equal(together[1, 2], alone)
