"""Audio files in and out, and resampling: the only place that reads or writes audio.

Letters: c channels, t samples. Waveforms are float32 in [-1, 1].
"""

import os

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32

from uss_jax.atomic import replacing
from uss_jax.errors import UserError


def read_audio(
    path: str | os.PathLike, seconds: float | None = None
) -> tuple[Float32[np.ndarray, "c t"], int]:
    """Reads a wav, flac, ogg or mp3 file, or any other that libsndfile knows.

    Args:
      path: the file.
      seconds: read no more than this from the beginning.

    Returns:
      The waveform, [channels, samples], and its sample rate in Hz.
    """
    _check_is_file(path)
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            sample_rate = file.samplerate
            samples = -1 if seconds is None else round(seconds * sample_rate)
            waveform = file.read(samples, dtype="float32", always_2d=True).T
    # soundfile raises TypeError for names ending in ".raw", whose rate it cannot know.
    except (soundfile.SoundFileError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as audio ({_reason(error)}); give a wav, flac, ogg or mp3 file"
        ) from error
    if waveform.shape[1] == 0:
        raise UserError(f"{path} holds no samples; give a recording that is not empty")
    if not np.isfinite(waveform).all():
        at = np.argmin(np.isfinite(waveform).all(axis=0))
        raise UserError(
            f"{path} has a sample that is not a number, at {at / sample_rate:.3f} s; "
            "export the recording again"
        )
    return np.ascontiguousarray(waveform), sample_rate


def read_mono(
    path: str | os.PathLike, sample_rate: int, seconds: float | None = None
) -> Float32[np.ndarray, " t"]:
    """Reads a file as the mean of its channels at the given rate in Hz; see `read_audio`."""
    waveform, file_rate = read_audio(path, seconds)
    return resample(waveform.mean(axis=0), file_rate, sample_rate)


def resample(
    waveform: Float32[np.ndarray, "*c t"], from_rate: int, to_rate: int
) -> Float32[np.ndarray, "*c u"]:
    """Resamples the last axis (soxr, high quality).

    Of t samples it makes u = t * to_rate / from_rate, rounded to the nearest, halves up.
    """
    if from_rate == to_rate:
        return waveform
    samples = (2 * waveform.shape[-1] * to_rate + from_rate) // (2 * from_rate)
    rows = waveform.reshape(-1, waveform.shape[-1])
    out = np.zeros((len(rows), samples), np.float32)
    if rows.size:
        resampled = soxr.resample(rows.T, from_rate, to_rate).T[:, :samples]
        out[:, : resampled.shape[1]] = resampled  # soxr keeps the same rule; this holds it to it
    return out.reshape(*waveform.shape[:-1], samples)


def write_wav(
    path: str | os.PathLike, waveform: Float32[np.ndarray, "c t"], sample_rate: int
) -> None:
    """Writes a float32 WAV file, whole or not at all; samples beyond 1 are kept as they are."""
    with replacing(path) as temporary:
        try:
            soundfile.write(temporary, waveform.T, sample_rate, format="WAV", subtype="FLOAT")
        except soundfile.SoundFileError as error:
            raise UserError(
                f"{path} could not be written ({_reason(error)}); choose a folder that exists, may "
                "be written to and has space left"
            ) from error


def _check_is_file(path: str | os.PathLike) -> None:
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the name of the audio file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give an audio file") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be opened ({error}); give an audio file that may be read"
        ) from error
    if empty:
        raise UserError(f"{path} is empty (0 bytes); copy or download it again")


def _reason(error: Exception) -> str:
    """libsndfile's own words, without the path and the full stop."""
    return getattr(error, "error_string", str(error)).strip().rstrip(".").lower()
