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
}
