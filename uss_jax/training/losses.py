"""Losses of an estimate against its target, one value an item.

Letters: `b` batch, `a` audio channels, `t` samples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uss_jax.audio.stft import stft

# Front end and floor of the reference's spectral term, whatever the separator's own.
_N_FFT, _HOP_SAMPLES, _POWER_FLOOR = 2048, 320, 1e-8
# Mean square, -80 dBFS, that is silence to the losses in dB: a silent target has a finite one.
_SILENCE = 1e-8
# Thirty dB below the target: what errors are added to before their logarithm is taken.
_SNR_SHARE = 1e-3


def l1_waveform(
    estimate: Float[Array, "b a t"], target: Float[Array, "b a t"]
) -> Float[Array, "b"]:
    """Mean absolute error of the samples (the published loss)."""
    return jnp.mean(_absolute(estimate - target), axis=(1, 2))


def l1_waveform_spectrogram(
    estimate: Float[Array, "b a t"], target: Float[Array, "b a t"]
) -> Float[Array, "b"]:
    """`l1_waveform` plus the mean absolute error of STFT magnitudes."""

    def magnitude(waveform: Array) -> Array:
        spectrum = stft(waveform, _N_FFT, _HOP_SAMPLES)
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        return jnp.sqrt(jnp.maximum(power, _POWER_FLOOR))

    difference = _absolute(magnitude(estimate) - magnitude(target))
    return l1_waveform(estimate, target) + jnp.mean(difference, axis=(1, 2, 3))


def si_sdr(estimate: Float[Array, "b a t"], target: Float[Array, "b a t"]) -> Float[Array, "b"]:
    """The scale-invariant SDR in dB (arXiv:1811.02508), negative; all channels share the scale.

    The level of the estimate is left free, unless the target is silent: then the loss is how many
    dB the estimate is above silence, -80 dBFS.
    """
    power = _mean_square(target)
    scale = jnp.mean(estimate * target, axis=(1, 2)) / (power + _SILENCE)
    error = _mean_square(scale[:, None, None] * target - estimate)
    return _decibel((error + _SILENCE) / (jnp.square(scale) * power + _SILENCE))


def snr_threshold(
    estimate: Float[Array, "b a t"], target: Float[Array, "b a t"]
) -> Float[Array, "b"]:
    """The SNR in dB, negative, with a soft threshold at 30 dB (arXiv:2006.12701).

    Beyond it a better estimate gains nothing. Of a silent target it is how many dB the estimate is
    above silence, -80 dBFS.
    """
    power = _mean_square(target)
    error = _mean_square(estimate - target)
    return _decibel((error + _SNR_SHARE * power + _SILENCE) / (power + _SILENCE))


def _mean_square(x: Float[Array, "b a t"]) -> Float[Array, "b"]:
    return jnp.mean(jnp.square(x), axis=(1, 2))


def _decibel(ratio: Float[Array, "b"]) -> Float[Array, "b"]:
    return 10 * jnp.log10(ratio)


def binary_cross_entropy(
    probability: Float[Array, "b k"], target: Float[Array, "b k"]
) -> Float[Array, "b"]:
    """Mean over classes, for targets in [0, 1] (PANNs' tagging loss).

    Probabilities are kept 1e-7 away from 0 and 1, where float32 would give infinity.
    """
    p = jnp.clip(probability, 1e-7, 1 - 1e-7)
    return -jnp.mean(target * jnp.log(p) + (1 - target) * jnp.log1p(-p), axis=1)


def _absolute(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """|x| with the gradient 0 at 0, as in torch; `jnp.abs` has 1 there."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "l1_wav": l1_waveform,
    "l1_wav_l1_sp": l1_waveform_spectrogram,
    "si_sdr": si_sdr,
    "snr_threshold": snr_threshold,
}
