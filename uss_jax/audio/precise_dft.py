"""Magnitudes of short-time spectra, more precise than a float32 FFT.

A float32 FFT, and the product with its window, leave noise 130 dB below the loudest partial of a
frame. That is far too much for the logarithm of a band that holds nothing else. Here, a DFT is a
sum of matrix products of numbers with 8 fractional bits, which float32 adds without rounding.

Letters: `b` batch, `t` samples, `n` frames, `f` bins, `h` half a window.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uss_jax.audio.stft import cut_frames, hann_window


def magnitudes(
    waveform: Float[Array, "b t"],
    *,
    window_samples: int,
    hop_samples: int,
    n_fft: int,
    bins: tuple[int, int],
) -> Float[Array, "b n f"]:
    """Computes the magnitudes of every whole frame; frame `i` begins at sample `i * hop_samples`.

    Args:
      waveform: float32 samples in [-1, 1], at least `window_samples`.
      window_samples: length of a frame and of its periodic Hann window; even.
      hop_samples: samples between frames.
      n_fft: length of the transform; frames are followed by zeros.
      bins: first bin, and bin after the last; others are not computed.

    Returns:
      float32 [b, (t - window_samples) // hop_samples + 1, bins[1] - bins[0]], within 1e-7 or a few
      roundings of the value itself, whatever else the frame holds.
    """
    parts = [_folded(part, window_samples, hop_samples) for part in _slices(waveform, jnp)]
    even, odd = zip(*parts, strict=True)
    cosine, sine = _matrices(window_samples, n_fft, bins)
    return jnp.sqrt(jnp.square(_product(even, cosine)) + jnp.square(_product(odd, sine)))


def _folded(
    waveform: Float[Array, "b t"], window_samples: int, hop_samples: int
) -> tuple[Float[Array, "b n h"], Float[Array, "b n h"]]:
    """Returns sums and differences of the samples at equal distance from each frame's centre.

    The sample at a distance of 0 is halved; that at half a window is zero in a Hann window.
    """
    half, frames = window_samples // 2, (waveform.shape[1] - window_samples) // hop_samples + 1
    framed = cut_frames(waveform, frames, window_samples, hop_samples)
    after, before = framed[..., half:], framed[..., 1 : half + 1][..., ::-1]
    return (after + before) * np.r_[0.5, np.ones(half - 1)].astype(np.float32), after - before


@functools.cache
def _matrices(
    window_samples: int, n_fft: int, bins: tuple[int, int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns cosines and sines with the window, [h, f], as three slices each."""
    half = window_samples // 2
    distance = np.arange(half)
    phase = 2 * np.pi * distance[:, None] * np.arange(*bins) / n_fft
    window = hann_window(window_samples)[half + distance][:, None]
    return _slices(window * np.cos(phase), np), _slices(window * np.sin(phase), np)


def _slices(x, numbers) -> list:
    """Returns x as a sum: of 8 fractional bits, of 8 more, and the rest; all float32."""
    first = numbers.round(x * 256) / 256
    second = numbers.round((x - first) * 65536) / 65536
    return [part.astype(np.float32) for part in (first, second, x - first - second)]


def _product(x: tuple[Float[Array, "b n h"], ...], y: list[np.ndarray]) -> Float[Array, "b n f"]:
    """Multiplies two sums of slices; the smallest products are added first."""
    (x1, x2, x3), (y1, y2, y3) = x, y
    pairs = ((x3, y1 + y2), (x1 + x2, y3), (x2, y2), (x2, y1), (x1, y2), (x1, y1))
    return sum(jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) for a, b in pairs)
