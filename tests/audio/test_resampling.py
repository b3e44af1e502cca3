import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from uss_jax.audio.resampling import mono_alike, resample


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


def test_the_same_channel_is_taken_of_all_if_any_cancels():
    one, other = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 100)).astype(np.float32)
    source = np.stack([-0.5 * one, 0.5 * one])
    mixture = source + np.stack([other, 0.9 * other])
    kept = mono_alike([source, mixture])
    np.testing.assert_array_equal(kept, [source[0], mixture[0]])
    louder = np.stack([0.9 * other, other])
    kept = mono_alike([louder, np.stack([one, -one])])
    np.testing.assert_array_equal(kept, [louder[1], -one])
    kept = mono_alike([mixture, louder])
    np.testing.assert_array_equal(kept, [mixture.mean(axis=0), louder.mean(axis=0)])
