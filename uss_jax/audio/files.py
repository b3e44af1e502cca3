"""Audio files in and out, and resampling: the only place that reads or writes audio.

Letters: c channels, t samples. Waveforms are float32 in [-1, 1].
"""

import contextlib
import dataclasses
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from uss_jax.atomic import replacing
from uss_jax.errors import UserError

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})
# Hz; beyond them soxr fails, and no audio is meant.
SAMPLE_RATES = (100, 10_000_000)
# Floats may go beyond full scale, but not by more than 36 dB: such samples are integers.
LARGEST_PEAK = 64.0
_LARGEST_WAV = 2**32 - 2**16  # bytes; a WAV file's sizes have 32 bits


@dataclasses.dataclass(frozen=True)
class Format:
    """What the header of an audio file says: Hz, channels, and samples of each."""

    sample_rate: int
    channels: int
    samples: int


def audio_format(path: str | os.PathLike) -> Format:
    """Reads a file's header."""
    with _opened(path) as file:
        return Format(file.samplerate, file.channels, file.frames)


def read_blocks(
    path: str | os.PathLike, block_samples: int = 1 << 18
) -> Iterator[Float32[np.ndarray, "c t"]]:
    """Reads a wav, flac, ogg or mp3 file, or any other that libsndfile knows, piece by piece.

    Args:
      path: the file.
      block_samples: samples of each channel in a piece; the last one is shorter.

    Raises:
      UserError: not such a file, no samples in it, or one that is not a number.
    """
    with _opened(path) as file:
        done = 0
        while block := _read(path, file, block_samples, done):
            yield block[0]
            done += block[0].shape[1]
    if not done:
        raise UserError(f"{path} holds no samples; give a recording that is not empty")


def read_audio(
    path: str | os.PathLike, seconds: float | None = None
) -> tuple[Float32[np.ndarray, "c t"], int]:
    """Reads a file, or no more than `seconds` from its beginning; see `read_blocks`.

    Returns:
      The waveform, [channels, samples], and its sample rate in Hz.
    """
    sample_rate = audio_format(path).sample_rate
    if seconds is None:
        return np.concatenate(list(read_blocks(path)), axis=1), sample_rate
    return next(read_blocks(path, max(round(seconds * sample_rate), 1))), sample_rate


def read_segment(
    path: str | os.PathLike, begin_sample: int, samples: int
) -> Float32[np.ndarray, "c t"]:
    """Reads so many samples from one on, fewer at the file's end, without what is before."""
    with _opened(path) as file:
        if not 0 <= begin_sample < file.frames:
            raise UserError(
                f"{path} has {file.frames} samples, so none at {begin_sample}; get it again"
            )
        file.seek(begin_sample)
        return _read(path, file, samples, begin_sample)[0]


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[soundfile.SoundFile]:
    _check_is_file(path)
    try:
        file = soundfile.SoundFile(os.fsencode(path))  # any bytes, not UTF-8 alone
    # soundfile raises TypeError for names ending in ".raw", whose rate it cannot know.
    except (soundfile.SoundFileError, TypeError) as error:
        raise _unreadable(path, error) from error
    with file:
        if not SAMPLE_RATES[0] <= file.samplerate <= SAMPLE_RATES[1]:
            raise UserError(
                f"{path} claims a sample rate of {file.samplerate:,} Hz, which is not from "
                f"{SAMPLE_RATES[0]:,} to {SAMPLE_RATES[1]:,}; give the recording again"
            )
        yield file


def _read(
    path: str | os.PathLike, file: soundfile.SoundFile, samples: int, done: int
) -> tuple[Float32[np.ndarray, "c t"], ...]:
    """The next block, if there is one."""
    try:
        block = file.read(samples, dtype="float32", always_2d=True).T
    except soundfile.SoundFileError as error:
        raise _unreadable(path, error) from error
    if not np.isfinite(block).all():
        at = done + np.argmin(np.isfinite(block).all(axis=0))
        raise UserError(
            f"{path} has a sample that is not a number, at {at / file.samplerate:.3f} s; "
            "export the recording again"
        )
    require_scale(float(np.abs(block).max(initial=0)), os.fspath(path))
    return (np.ascontiguousarray(block),) if block.size else ()


def require_scale(peak: float, what: str) -> None:
    """Raises a UserError where no samples in [-1, 1], nor any that clip, can have such a peak."""
    if peak > LARGEST_PEAK:
        raise UserError(
            f"{what} peaks at {peak:,.6g}; full scale is 1, and no more than {LARGEST_PEAK:g} is "
            "taken. Its samples are probably integers in a float file: divide them by 32768 "
            "(ffmpeg -i IN -af volume=1/32768 -c:a pcm_f32le OUT.wav)"
        )


def _unreadable(path: str | os.PathLike, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read as audio ({_reason(error)}); give a wav, flac, ogg or mp3 file"
    )


def decode_bytes(data: bytes) -> Float32[np.ndarray, "c t"]:
    """The samples of an audio file that is in memory; a ValueError when it is none."""
    try:
        waveform, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"holds no readable audio file ({_reason(error)})") from error
    return np.ascontiguousarray(waveform.T)


def format_of_bytes(data: bytes) -> Format:
    """What the header of an audio file in memory says; a ValueError when it is none."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return Format(file.samplerate, file.channels, file.frames)
    except soundfile.SoundFileError as error:
        raise ValueError(f"holds no readable audio file ({_reason(error)})") from error


def flac_bytes(samples: Int16[np.ndarray, " t"], sample_rate: int) -> bytes:
    """One channel as a FLAC file in memory."""
    memory = io.BytesIO()
    soundfile.write(memory, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return memory.getvalue()


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
    rows = waveform.reshape(int(np.prod(waveform.shape[:-1])), waveform.shape[-1])
    out = np.concatenate(list(resample_blocks([rows], from_rate, to_rate)), axis=1)
    return out.reshape(*waveform.shape[:-1], out.shape[1])


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """samples * to_rate / from_rate, rounded to the nearest, halves up."""
    return (2 * samples * to_rate + from_rate) // (2 * from_rate)


def resample_blocks(
    blocks: Iterable[Float32[np.ndarray, "c _"]], from_rate: int, to_rate: int
) -> Iterator[Float32[np.ndarray, "c _"]]:
    """Resamples a waveform that comes in pieces; the pieces together are `resample` of it all."""
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
    # soxr keeps the same rule of length; this holds it to it.
    wanted = max(resampled_length(taken, from_rate, to_rate) - given, 0)
    rest = rest[:wanted]
    yield np.pad(rest, ((0, wanted - len(rest)), (0, 0))).T.copy()


def write_wav(
    path: str | os.PathLike, waveform: Float32[np.ndarray, "c t"], sample_rate: int
) -> None:
    """Writes a float32 WAV file, whole or not at all; samples beyond 1 are kept as they are."""
    with writing_audio(path, Format(sample_rate, *waveform.shape)) as write:
        write(waveform)


@contextlib.contextmanager
def writing_audio(
    path: str | os.PathLike, form: Format, subtype: str = "FLOAT"
) -> Iterator[Callable[[Float32[np.ndarray, "c _"]], int]]:
    """Yields a function that writes the next samples; the file appears whole or not at all.

    The function returns how many of the samples lie beyond full scale and were clipped; of floats
    none are.

    Args:
      path: the file, WAV or, if its name says so, FLAC.
      form: of what will be written.
      subtype: libsndfile's name of the samples' form: FLOAT, PCM_24 or PCM_16.
    """
    kind = "FLAC" if os.fspath(path).lower().endswith(".flac") else "WAV"
    if kind == "WAV" and form.samples * form.channels * 4 >= _LARGEST_WAV:
        kind = "RF64"  # the same with 64-bit sizes
    with replacing(path) as temporary:
        try:
            with soundfile.SoundFile(
                os.fsencode(temporary), "w", form.sample_rate, form.channels, subtype, format=kind
            ) as file:

                def write(block: Float32[np.ndarray, "c _"]) -> int:
                    file.write(block.T)
                    return 0 if subtype == "FLOAT" else int((np.abs(block) > 1).sum())

                yield write
        except soundfile.SoundFileError as error:
            raise UserError(
                f"{path} could not be written ({_reason(error)}); choose a folder that exists, may "
                "be written to and has space left"
            ) from error


def _check_is_file(path: str | os.PathLike) -> None:
    try:
        # Opening a pipe or a device could wait for ever.
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{path} is not a regular file; give an audio file")
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
