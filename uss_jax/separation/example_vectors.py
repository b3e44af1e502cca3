"""Condition vectors from example recordings of the wanted sound, as bytedance/uss computes them.

Letters: `t` samples of a recording, `d` condition width.
"""

import os
import pathlib

import numpy as np
from jaxtyping import Float32

from uss_jax.audio.files import find_recordings, read_mono
from uss_jax.bundles.model import Model
from uss_jax.devices.batching import in_batches
from uss_jax.errors import UserError

# As in bytedance/uss: a frame of 0.1 s is silent if no sample's magnitude exceeds this.
_SILENT_PEAK = 0.02
# A recording whose peak is below this, -80 dBFS, is wholly silent.
_NOTHING = 1e-4
_FRAMES_A_SECOND = 10
_BATCH_SIZE = 8
# How the vector of a sound is made, for banks and reports.
AVERAGED = "averaged over example recordings without their silence"


def remove_silence(
    waveform: Float32[np.ndarray, " t"], sample_rate: int, silent_peak: float = _SILENT_PEAK
) -> Float32[np.ndarray, "_"]:
    """Drops silent frames of 0.1 s, and the samples after the last whole frame."""
    frame = sample_rate // _FRAMES_A_SECOND
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame)
    return frames[np.abs(frames).max(axis=1) > silent_peak].reshape(-1)


def sounding(waveform: Float32[np.ndarray, " t"], sample_rate: int) -> Float32[np.ndarray, "_"]:
    """Returns an example without its silence; handles quiet and short recordings too.

    In a quiet recording the silence threshold is 20 dB below the peak. A recording without a whole
    sounding frame is returned whole; one with a peak below -80 dBFS yields no samples. A DC offset
    is removed first.
    """
    if not waveform.size:
        return waveform
    if abs(offset := waveform.mean()) > _SILENT_PEAK / 2:
        waveform = waveform - offset
    peak = float(np.abs(waveform).max())
    if peak < _NOTHING:
        return waveform[:0]
    heard = remove_silence(waveform, sample_rate, min(_SILENT_PEAK, peak / 10))
    return heard if heard.size else waveform


def recording_vector(
    model: Model, waveform: Float32[np.ndarray, " t"]
) -> Float32[np.ndarray, " d"]:
    """Returns the mean condition of a recording's segments.

    A short last segment is repeated to full length.

    Args:
      model: model whose query net computes the condition.
      waveform: at least one sample, at the model's sample rate.
    """
    length = model.segment_samples
    segments = [waveform[begin : begin + length] for begin in range(0, len(waveform), length)]
    segments = [np.resize(segment, length) for segment in segments]
    classes = np.zeros(_BATCH_SIZE, np.int32)  # unused: one_hot takes no recordings
    vectors = []
    for some, rows in in_batches(segments, _BATCH_SIZE):
        vectors.append(np.asarray(model.condition(np.stack(some), classes))[:rows])
    return np.concatenate(vectors).mean(axis=0)


def name_of_examples(path: str | os.PathLike) -> str:
    """Returns the name of examples: the folder's full name, or the file's without suffix."""
    path = pathlib.Path(os.path.abspath(path))
    return path.name if path.is_dir() else path.stem


def vector_of_recordings(
    model: Model, path: str | os.PathLike, remedy: str | None = None
) -> Float32[np.ndarray, " d"]:
    """Averages `recording_vector` over recordings without silence, as bytedance/uss queries.

    Args:
      model: model whose condition is computed from recordings.
      path: a recording or a folder of them; silent recordings are skipped.
      remedy: what to give if the model takes none, for the message; None: what `separate` offers.

    Raises:
      UserError: the model's condition is one-hot, or nothing sounds in the recordings.
    """
    takes = model.query.module.takes
    if not takes.recordings:
        remedy = remedy or f"give --classes{' or --text' if takes.texts else ''} instead of --query"
        raise UserError(
            f"{model.path} takes classes{' and texts' if takes.texts else ''}, not recordings; "
            f"{remedy}"
        )
    vectors = []
    for file in _recordings(pathlib.Path(path)):
        waveform = sounding(read_mono(file, model.sample_rate), model.sample_rate)
        if waveform.size:
            vectors.append(recording_vector(model, waveform))
    if not vectors:
        raise UserError(f"{path} holds nothing but silence; give recordings of the sound you want")
    return np.mean(vectors, axis=0)


def _recordings(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    found, _ = find_recordings(path)
    if not found:
        raise UserError(f"{path} holds no recordings; add some of the sound you want")
    return found
