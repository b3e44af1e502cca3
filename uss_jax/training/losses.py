"""Losses between estimates and targets, one value per item.

Letters: `b` batch, `a` audio channels, `t` samples, `k` classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uss_jax.audio.stft import stft

# STFT and power floor of the reference's spectral loss, independent of the separator's STFT.
_N_FFT, _HOP_SAMPLES, _POWER_FLOOR = 2048, 320, 1e-8
# Mean square (-80 dBFS) added in the losses in dB, to keep them finite for silent targets.
_SILENCE = 1e-8
# Share of the target's energy, -30 dB, added to the error before taking the logarithm.
_SNR_SHARE = 1e-3


def l1_waveform(
    estimate: Float[Array, "b a t"], target: Float[Array, "b a t"]
) -> Float[Array, "b"]:
    """Returns the mean absolute error of the samples (the published loss)."""
    return jnp.mean(_absolute(estimate - target), axis=(1, 2))


def l1_waveform_spectrogram(
    estimate: Float[Array, "b a t"], target: Float[Array, "b a t"]
) -> Float[Array, "b"]:
    """Returns `l1_waveform` plus the mean absolute error of STFT magnitudes."""

    def magnitude(waveform: Array) -> Array:
        spectrum = stft(waveform, _N_FFT, _HOP_SAMPLES)
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        return jnp.sqrt(jnp.maximum(power, _POWER_FLOOR))

    difference = _absolute(magnitude(estimate) - magnitude(target))
    return l1_waveform(estimate, target) + jnp.mean(difference, axis=(1, 2, 3))


def si_sdr(estimate: Float[Array, "b a t"], target: Float[Array, "b a t"]) -> Float[Array, "b"]:
    """Returns the negative scale-invariant SDR in dB (arXiv:1811.02508), one scale per item.

    The level of the estimate does not matter, unless the target is silent: then the loss is the
    level of the estimate in dB above silence (-80 dBFS).
    """
    power = _mean_square(target)
    scale = jnp.mean(estimate * target, axis=(1, 2)) / (power + _SILENCE)
    error = _mean_square(scale[:, None, None] * target - estimate)
    return _decibel((error + _SILENCE) / (jnp.square(scale) * power + _SILENCE))


def snr_threshold(
    estimate: Float[Array, "b a t"], target: Float[Array, "b a t"]
) -> Float[Array, "b"]:
    """Returns the negative SNR in dB, with a soft threshold at 30 dB (arXiv:2006.12701).

    Above it, a better estimate gains at most 3 dB. For a silent target, the loss is the level of
    the estimate in dB above silence (-80 dBFS).
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
    """Returns the mean cross-entropy over classes, targets in [0, 1] (PANNs' tagging loss).

    Probabilities are clipped to 1e-7 from 0 and 1, where float32 would give infinity.
    """
    p = jnp.clip(probability, 1e-7, 1 - 1e-7)
    return -jnp.mean(target * jnp.log(p) + (1 - target) * jnp.log1p(-p), axis=1)


def _absolute(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns |x| with gradient 0 at 0, as in torch; that of `jnp.abs` is 1."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "l1_wav": l1_waveform,
    "l1_wav_l1_sp": l1_waveform_spectrogram,
    "si_sdr": si_sdr,
    "snr_threshold": snr_threshold,
}
