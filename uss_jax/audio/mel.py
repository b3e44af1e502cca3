"""Log-mel spectrogram as in PANNs (Slaney mel scale and normalisation, power, decibels).

YAMNet's filters are on the HTK mel scale and not normalised: `htk_mel_matrix`.

Letters: `b` batch, `t` samples, `n` frames, `m` mel bands.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uss_jax.audio.stft import stft

# Slaney's scale is linear up to 1 kHz (15 mel of 200/3 Hz each), then logarithmic: 27 mel per
# factor of 6.4.
_LINEAR_HZ = 200.0 / 3.0
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ
_LOG_STEP = np.log(6.4) / 27.0


def hz_to_mel(hz: float | np.ndarray) -> np.ndarray:
    """Converts frequencies in Hz to Slaney mel."""
    hz = np.asarray(hz, np.float64)
    above = _BREAK_MEL + np.log(np.maximum(hz, 1.0) / _BREAK_HZ) / _LOG_STEP
    return np.where(hz < _BREAK_HZ, hz / _LINEAR_HZ, above)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Converts Slaney mel to frequencies in Hz."""
    mel = np.asarray(mel, np.float64)
    return np.where(
        mel < _BREAK_MEL, mel * _LINEAR_HZ, _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
    )


def mel_matrix(
    sample_rate: int, n_fft: int, mel_bins: int, f_min: float, f_max: float
) -> np.ndarray:
    """Returns triangular filters of unit area in Hz, float64 [n_fft // 2 + 1, mel_bins]."""
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    edges = mel_to_hz(np.linspace(hz_to_mel(f_min), hz_to_mel(f_max), mel_bins + 2))
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - low) / (peak - low)
    falling = (high - bins[:, None]) / (high - peak)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


def htk_mel_matrix(
    sample_rate: int, n_fft: int, mel_bins: int, f_min: float, f_max: float
) -> np.ndarray:
    """Returns filters that are triangles of height 1 on the HTK mel scale, shaped as `mel_matrix`.

    The bin at 0 Hz is in no filter.
    """
    to_mel = lambda hz: 1127.0 * np.log1p(np.asarray(hz) / 700.0)  # noqa: E731
    bins = to_mel(np.arange(n_fft // 2 + 1) * (sample_rate / n_fft))[:, None]
    edges = np.linspace(to_mel(f_min), to_mel(f_max), mel_bins + 2)
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    filters = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak))
    filters[0] = 0
    return np.maximum(0.0, filters)


def log_mel(
    waveform: Float[Array, "b t"],
    *,
    sample_rate: int,
    n_fft: int,
    hop_samples: int,
    mel_bins: int,
    f_min: float,
    f_max: float,
) -> Float[Array, "b n m"]:
    """Computes mel power in dB, floored at -100 dB; float32 whatever the net's compute dtype.

    Args:
      waveform: samples in [-1, 1].
      sample_rate: sampling rate in Hz.
      n_fft: window length in samples.
      hop_samples: samples between frames.
      mel_bins: number of bands.
      f_min: lower edge of the lowest band in Hz.
      f_max: upper edge of the highest band in Hz, at most half the sampling rate.
    """
    spectrum = stft(waveform, n_fft, hop_samples)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    weights = mel_matrix(sample_rate, n_fft, mel_bins, f_min, f_max).astype(power.dtype)
    mel = jnp.matmul(power, weights, precision=jax.lax.Precision.HIGHEST)
    return 10.0 * jnp.log10(jnp.maximum(mel, 1e-10))
