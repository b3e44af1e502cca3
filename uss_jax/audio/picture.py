"""Plots spectrograms one above the other, on one scale.

Letters: `t` samples, `f` frequency bins, `n` frames.
"""

import os
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from uss_jax.audio.stft import hann_window
from uss_jax.disk.atomic import replacing

_WINDOW_SECONDS = 0.032
_RANGE_DB = 80.0


def spectrogram_db(waveform: Float[np.ndarray, " t"], sample_rate: int) -> Float[np.ndarray, "f n"]:
    """Power spectrogram in dBFS (a sine of amplitude 1 is 0): 32 ms windows, 8 ms hop."""
    n_fft = 2 * round(_WINDOW_SECONDS * sample_rate / 2)
    padded = np.pad(waveform, n_fft // 2)
    padded = np.pad(padded, (0, max(n_fft - len(padded), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[:: n_fft // 4]
    window = hann_window(n_fft)
    amplitude = np.abs(np.fft.rfft(frames * window)) / (window.sum() / 2)
    return 20 * np.log10(np.maximum(amplitude.T, 1e-10))


def write_picture(
    path: str | os.PathLike, panels: Mapping[str, Float[np.ndarray, " t"]], sample_rate: int
) -> None:
    """Writes a PNG of the spectrograms of waveforms of equal length, each under its title.

    The colours span the 80 dB below the peak of the first spectrogram.
    """
    spectrograms = {title: spectrogram_db(wave, sample_rate) for title, wave in panels.items()}
    first = next(iter(spectrograms.values()))
    top = max(float(first.max()), -160.0)
    seconds = len(next(iter(panels.values()))) / sample_rate
    figure = Figure(figsize=(9, 2.6 * len(panels) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, spectrogram) in zip(axes, spectrograms.items(), strict=True):
        image = axis.imshow(
            spectrogram,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=top - _RANGE_DB,
            vmax=top,
            extent=(0, seconds, 0, sample_rate / 2000),
        )
        axis.set_title(title, fontsize=11, parse_math=False)
        axis.set_ylabel("kHz")
    axes[-1].set_xlabel("s")
    figure.colorbar(image, ax=list(axes), label="dB of full scale", aspect=40)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
