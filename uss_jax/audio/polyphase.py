"""Resamples waveforms on the device: a band-limited filter as one matrix product.

Letters: `b` batch, `t` and `u` samples.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uss_jax.audio.stft import cut_frames

# Half length of the filter in samples of the lower rate, and Kaiser's beta: together, 100 dB of
# attenuation and a transition band of 1/8 of the lower rate's band.
_REACH, _BETA = 52, 10.06
# A product computes blocks of at least this many input samples.
_LEAST_BLOCK = 256
# Rates that share no useful divisor would need a matrix of more values.
_MOST_VALUES = 1 << 22


def resample_on_device(
    waveform: Float[Array, "b t"], from_rate: int, to_rate: int
) -> Float[Array, "b u"]:
    """Resamples a batch; u = t * to_rate // from_rate, and sample 0 stays at time 0.

    The filter is flat to 1e-5 up to 15/16 of the lower rate's half. Frequencies above 17/16 of it
    are attenuated by 100 dB; aliases of those between stay above 15/16. The waveform counts as zero
    beyond its ends.

    Raises:
      ValueError: the rates are in no ratio of small whole numbers.
    """
    if from_rate == to_rate:
        return waveform
    block, out, reach = _plan(from_rate, to_rate)
    samples = waveform.shape[-1]
    blocks = -(-samples // block)
    padded = jnp.pad(waveform, ((0, 0), (reach, 0)))
    rows = cut_frames(padded, blocks, block + 2 * reach, block)
    matrix = _matrix(from_rate, to_rate).astype(waveform.dtype)
    result = jnp.matmul(rows, matrix, precision=jax.lax.Precision.HIGHEST)
    return result.reshape(result.shape[0], blocks * out)[:, : samples * to_rate // from_rate]


def _plan(from_rate: int, to_rate: int) -> tuple[int, int, int]:
    """Returns input samples and output samples of a block, and the filter's reach in input ones."""
    divisor = math.gcd(from_rate, to_rate)
    block = from_rate // divisor
    block *= -(-_LEAST_BLOCK // block)
    out = block * to_rate // from_rate
    reach = math.ceil(_REACH * from_rate / min(from_rate, to_rate))
    if (block + 2 * reach) * out > _MOST_VALUES:
        raise ValueError(
            f"a rate of {from_rate} Hz cannot be resampled to {to_rate} Hz on the device; use a "
            "rate that shares a larger divisor with it"
        )
    return block, out, reach


@functools.cache
def _matrix(from_rate: int, to_rate: int) -> np.ndarray:
    """Returns the filter of every output sample of a block, [block + 2 reach, out], float32."""
    block, out, reach = _plan(from_rate, to_rate)
    band = min(from_rate, to_rate) / from_rate  # of the lower rate, in units of the input's
    at = np.arange(out) * (from_rate / to_rate)
    distance = (np.arange(block + 2 * reach) - reach)[:, None] - at
    kaiser = np.i0(_BETA * np.sqrt(np.clip(1 - (distance / reach) ** 2, 0, 1))) / np.i0(_BETA)
    taps = band * np.sinc(band * distance) * np.where(np.abs(distance) <= reach, kaiser, 0)
    return (taps / taps.sum(axis=0)).astype(np.float32)
