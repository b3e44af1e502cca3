"""Changes the sampling rate and the number of channels of waveforms.

Letters: `c` channels, `t` and `u` samples. Waveforms are float32 in [-1, 1].
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import soxr
from jaxtyping import Float32

# Ratio (-40 dB) of the mean's energy to that of the channels; below it, channels cancel out.
_CANCELLED = 1e-4


def mono(waveform: Float32[np.ndarray, "c t"]) -> Float32[np.ndarray, " t"]:
    """Returns the mean of the channels, or the loudest channel if they cancel each other."""
    return mono_alike([waveform])[0]


def mono_alike(waveforms: Sequence[Float32[np.ndarray, "c _"]]) -> list[Float32[np.ndarray, "_"]]:
    """Returns the mean of the channels of each, or the same channel of each if any's cancel.

    That channel is the one in which the first waveform is loudest. They have equally many channels.
    """
    means = [waveform.mean(axis=0) for waveform in waveforms]
    energies = [np.square(waveform).sum(axis=1) for waveform in waveforms]
    for mean, energy in zip(means, energies, strict=True):
        if np.square(mean).sum() < _CANCELLED * energy.mean():
            return [waveform[np.argmax(energies[0])] for waveform in waveforms]
    return means


def resample(
    waveform: Float32[np.ndarray, "*c t"], from_rate: int, to_rate: int
) -> Float32[np.ndarray, "*c u"]:
    """Resamples the last axis (soxr, high quality).

    The result has u = t * to_rate / from_rate samples, rounded to nearest, halves up.
    """
    if from_rate == to_rate:
        return waveform
    rows = waveform.reshape(int(np.prod(waveform.shape[:-1])), waveform.shape[-1])
    out = np.concatenate(list(resample_blocks([rows], from_rate, to_rate)), axis=1)
    return out.reshape(*waveform.shape[:-1], out.shape[1])


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """Returns samples * to_rate / from_rate, rounded to nearest, halves up."""
    return (2 * samples * to_rate + from_rate) // (2 * from_rate)


def resample_blocks(
    blocks: Iterable[Float32[np.ndarray, "c _"]], from_rate: int, to_rate: int
) -> Iterator[Float32[np.ndarray, "c _"]]:
    """Resamples a waveform given in blocks; concatenated, the results equal `resample` of all."""
    if from_rate == to_rate:
        yield from blocks
        return
    stream, taken, given, channels = None, 0, 0, 0
    for block in blocks:
        channels = len(block)
        stream = stream or soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32")
        taken += block.shape[1]
        piece = stream.resample_chunk(np.ascontiguousarray(block.T))
        given += len(piece)
        yield np.ascontiguousarray(piece.T)
    if stream is None:
        return
    rest = stream.resample_chunk(np.zeros((0, channels), np.float32), last=True)
    # soxr rounds the length in the same way; this makes sure of it.
    wanted = max(resampled_length(taken, from_rate, to_rate) - given, 0)
    rest = rest[:wanted]
    yield np.pad(rest, ((0, wanted - len(rest)), (0, 0))).T.copy()
