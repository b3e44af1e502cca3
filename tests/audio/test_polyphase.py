import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uss_jax.audio.polyphase import resample_on_device
from uss_jax.audio.resampling import resample


def on_device(waveform, from_rate, to_rate):
    return np.asarray(resample_on_device(jnp.asarray(waveform), from_rate, to_rate))


RATES = [(32000, 16000), (44100, 16000), (48000, 16000), (22050, 16000), (8000, 16000)]


def sine(hertz, rate, seconds=1.0):
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_a_sine_in_the_pass_band_stays_itself(from_rate, to_rate):
    lower = min(from_rate, to_rate)
    for hertz in (50, 1000, 0.4 * lower, 15 / 32 * lower):
        found = on_device(sine(hertz, from_rate)[None], from_rate, to_rate)[0]
        wanted = sine(hertz, to_rate)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found[800:-800], wanted[800:-800], atol=2e-5)


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES[:4])
def test_what_the_lower_rate_cannot_hold_is_gone(from_rate, to_rate):
    for hertz in (17 / 32 * to_rate, 0.6 * to_rate):
        found = on_device(sine(hertz, from_rate)[None], from_rate, to_rate)[0]
        assert np.abs(found[800:-800]).max() < 2e-5


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_it_keeps_time_as_the_host_s_resampling_does(from_rate, to_rate):
    rng = np.random.default_rng(0)
    low = resample(0.1 * rng.standard_normal((2, 4000)).astype(np.float32), 4000, from_rate)
    found = on_device(low, from_rate, to_rate)
    wanted = resample(low, from_rate, to_rate)
    length = min(found.shape[1], wanted.shape[1])
    assert wanted.shape[1] - length <= 1
    np.testing.assert_allclose(
        found[:, 800 : length - 800], wanted[:, 800 : length - 800], atol=1e-4
    )


def test_its_gradient_is_its_transpose():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 300)), jnp.float32)
    y = jnp.asarray(np.random.default_rng(1).standard_normal((1, 150)), jnp.float32)
    apply = lambda x: resample_on_device(x, 32000, 16000)  # noqa: E731
    (transposed,) = jax.vjp(apply, x)[1](y)
    np.testing.assert_allclose(jnp.vdot(apply(x), y), jnp.vdot(x, transposed), rtol=1e-5)


def test_an_equal_rate_changes_nothing():
    x = jnp.ones((1, 10))
    assert resample_on_device(x, 16000, 16000) is x


def test_rates_in_no_small_ratio_are_refused():
    with pytest.raises(ValueError, match="16001 Hz cannot be resampled to 16000 Hz"):
        on_device(np.zeros((1, 100), np.float32), 16001, 16000)
