"""Reads and writes audio files.

Letters: `c` channels, `t` samples. Waveforms are float32 in [-1, 1].
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import soundfile
from jaxtyping import Float32

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE, mended
from uss_jax.audio.resampling import mono, mono_alike, resample
from uss_jax.disk.atomic import replacing
from uss_jax.disk.opening import absence
from uss_jax.errors import UserError, one_line

# File name suffixes of formats read by libsndfile, and of formats decoded by ffmpeg.
_LIBSNDFILE = ".wav .wave .rf64 .w64 .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .voc"
_FFMPEG = ".m4a .mp4 .m4b .m4v .mov .webm .mkv .mka .aac .wma .3gp .amr .ac3 .eac3 .ape .wv .tta"
AUDIO_SUFFIXES = frozenset(f"{_LIBSNDFILE} {_FFMPEG}".split())
# Samples more than 20 dB above full scale are taken for integers mislabelled as floats.
PEAK_LIMIT = 10.0
_LARGEST_WAV = 2**32 - 2**16  # bytes; a WAV file's sizes have 32 bits


@dataclasses.dataclass(frozen=True)
class Format:
    """Header of an audio file: sampling rate in Hz, channels, and samples per channel."""

    sample_rate: int
    channels: int
    samples: int


def audio_format(path: str | os.PathLike) -> Format:
    """Reads a file's header."""
    with _opened(path) as (file, _):
        return Format(file.samplerate, file.channels, file.frames)


def find_recordings(
    folder: str | os.PathLike,
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Lists (recordings, other files) in a folder, recursively, by file name suffix.

    Neither list has hidden files and folders (including `._x.mp3` of macOS) or files that operating
    systems create. Links to folders elsewhere are followed, each place once. Folders that cannot be
    read are named on standard error.
    """
    recordings, others = [], []
    root, entered = os.path.realpath(folder), set()

    def enters(where: str, name: str) -> bool:
        if name.startswith("."):
            return False
        inner = os.path.join(where, name)
        real = os.path.realpath(inner)
        if os.path.islink(inner):
            below = pathlib.Path(os.path.relpath(real, root)).parts
            # What is below the folder is found there, unless a hidden folder or ".." leads to it.
            found = not any(part.startswith(".") for part in below)
            if found or pathlib.Path(root).is_relative_to(real):
                return False
        # Below a link too: its folders may be linked to by themselves.
        if real in entered:
            return False
        entered.add(real)
        return True

    for where, folders, names in os.walk(folder, followlinks=True, onerror=_say_unreadable):
        folders[:] = [name for name in sorted(folders) if enters(where, name)]
        for name in sorted(names):
            if name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini"):
                continue
            is_recording = os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES
            (recordings if is_recording else others).append(pathlib.Path(where, name))
    return recordings, others


def _say_unreadable(error: OSError) -> None:
    what = one_line(os.fspath(error.filename))
    print(f"passed over {what}: it cannot be read ({error.strerror})", file=sys.stderr)


class CutOff(UserError):
    """Raised for a recording whose end is missing."""


def truncation(path: str | os.PathLike, decode: bool = True) -> str | None:
    """Returns the evidence that a recording's end is missing; None if there is none.

    Args:
      path: the file.
      decode: decode FLAC files to the end, the only way to tell; reading one in full tells too.
    """
    with _opened(path) as (file, cut):
        if file.format != "FLAC" or not decode:
            return cut
        done = 0
        while len(block := mended.read_block(file, 1 << 16)[0]):
            done += len(block)
        return mended.cut_off(file, done)


def read_blocks(
    path: str | os.PathLike,
    block_samples: int = 1 << 18,
    accept_truncated: bool = False,
    any_scale: bool = False,
) -> Iterator[Float32[np.ndarray, "c t"]]:
    """Reads a recording block by block, with libsndfile or, if installed, ffmpeg.

    Args:
      path: the file.
      block_samples: samples per channel in a block; the last block may be shorter.
      accept_truncated: read a truncated FLAC file as far as it goes instead of raising.
      any_scale: accept samples far above full scale, as in sounds that we wrote.

    Raises:
      UserError: the file is not a readable recording, is empty, or has a sample that is NaN,
        infinite or far above full scale.
      CutOff: a FLAC file is truncated, and `accept_truncated` is false.
    """
    with _opened(path) as (file, _):
        done = 0
        while block := _read(path, file, block_samples, done, accept_truncated, any_scale):
            yield block[0]
            done += block[0].shape[1]
    if not done:
        raise UserError(f"{path} holds no samples; give a recording that is not empty")


def read_audio(
    path: str | os.PathLike,
    seconds: float | None = None,
    begin_seconds: float = 0.0,
    accept_truncated: bool = False,
) -> tuple[Float32[np.ndarray, "c t"], int]:
    """Reads a file from `begin_seconds` on, at most `seconds` of it; see `read_blocks`.

    Returns:
      The waveform, [channels, samples], and its sampling rate in Hz.
    """
    form = audio_format(path)
    begin = round(begin_seconds * form.sample_rate)
    most = None if seconds is None else max(round(seconds * form.sample_rate), 1)
    blocks = []
    done = 0  # samples before the block
    for block in read_blocks(path, min(most or 1 << 18, 1 << 18), accept_truncated):
        wanted = block[:, max(begin - done, 0) : None if most is None else begin + most - done]
        done += block.shape[1]
        blocks.append(wanted)
        if most is not None and done >= begin + most:
            break
    return np.concatenate(blocks, axis=1), form.sample_rate


def read_segment(
    path: str | os.PathLike, begin_sample: int, samples: int
) -> Float32[np.ndarray, "c t"]:
    """Reads up to `samples` samples from `begin_sample`, skipping everything before."""
    with _opened(path) as (file, _):
        if not 0 <= begin_sample < file.frames:
            raise UserError(
                f"{path} has {file.frames} samples, so none at {begin_sample}; copy it again"
            )
        file.seek(begin_sample)
        return _read(path, file, samples, begin_sample)[0]


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[mended.Opened]:
    _check_is_file(path)
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(mended.opened(path))
        except soundfile.SoundFileError as error:
            raise _unreadable(path, mended.reason(error)) from error
        except mended.FfmpegNeeded:
            raise UserError(
                f"{path} is of a format that only ffmpeg decodes (m4a, mp4, webm, ...) or is "
                "not an audio file; install ffmpeg, or give a wav, flac, ogg or mp3 file"
            ) from None
        except mended.FfmpegFailed as error:
            raise _unreadable(path, str(error)) from error
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}); copy it again"
            ) from error
        if not LOWEST_SAMPLE_RATE <= opened.file.samplerate <= HIGHEST_SAMPLE_RATE:
            raise UserError(
                f"{path} states a sample rate of {opened.file.samplerate} Hz, expected "
                f"{LOWEST_SAMPLE_RATE} to {HIGHEST_SAMPLE_RATE}; export the recording again"
            )
        yield opened


def _read(
    path: str | os.PathLike,
    file: soundfile.SoundFile,
    samples: int,
    done: int,
    accept_truncated: bool = False,
    any_scale: bool = False,
) -> tuple[Float32[np.ndarray, "c t"], ...]:
    """Returns a tuple of the next block, channels first; empty at the end of the file."""
    try:
        block, error = mended.read_block(file, samples)
    except soundfile.SoundFileError as error:
        raise _unreadable(path, mended.reason(error)) from error
    if error and not accept_truncated:
        why = mended.cut_off(file, done + len(block)) or mended.reason(error)
        raise CutOff(f"{path} is cut off ({why}); copy or download it again")
    block = block.T
    if not np.isfinite(block).all():
        at = done + np.argmin(np.isfinite(block).all(axis=0))
        raise UserError(
            f"{path} has a sample that is NaN or infinite, at {at / file.samplerate:.3f} s; "
            "export the recording again"
        )
    try:
        if not any_scale:
            check_scale(block)
    except ValueError as error:
        raise UserError(f"{path} {error}; export the recording again") from None
    return (np.ascontiguousarray(block),) if block.size else ()


def _unreadable(path: str | os.PathLike, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be read as audio ({reason}); give a recording such as a wav, flac, ogg or "
        "mp3 file"
    )


def check_scale(waveform: Float32[np.ndarray, "*t"]) -> None:
    """Raises ValueError if a sample is NaN, infinite or far above full scale."""
    if not np.isfinite(waveform).all():
        raise ValueError("has a sample that is NaN or infinite")
    peak = max(waveform.max(initial=0), -waveform.min(initial=0))
    if peak > PEAK_LIMIT:
        raise ValueError(
            f"has samples of {peak:g}, {20 * np.log10(peak):.0f} dB above full scale (1.0): "
            "integers stored as floats, which must be divided by 32768"
        )


def read_mono(
    path: str | os.PathLike,
    sample_rate: int,
    seconds: float | None = None,
    begin_seconds: float = 0.0,
    accept_truncated: bool = False,
) -> Float32[np.ndarray, " t"]:
    """Reads a file as mono at the given sampling rate in Hz; see `mono` and `read_audio`."""
    waveform, file_rate = read_audio(path, seconds, begin_seconds, accept_truncated)
    return resample(mono(waveform), file_rate, sample_rate)


def read_alike(
    paths: Sequence[str | os.PathLike], sample_rate: int
) -> list[Float32[np.ndarray, " _"]]:
    """Reads recordings of the same sounds as mono, at a sampling rate in Hz.

    All are reduced by one choice, see `mono_alike`, unless their numbers of channels differ.
    """
    read = [read_audio(path) for path in paths]
    waveforms = [waveform for waveform, _ in read]
    alike = len({len(waveform) for waveform in waveforms}) == 1
    ones = mono_alike(waveforms) if alike else map(mono, waveforms)
    return [resample(one, rate, sample_rate) for one, (_, rate) in zip(ones, read, strict=True)]


def write_wav(
    path: str | os.PathLike, waveform: Float32[np.ndarray, "c t"], sample_rate: int
) -> None:
    """Writes a float32 WAV file atomically; samples beyond [-1, 1] are kept."""
    with writing_audio(path, Format(sample_rate, *waveform.shape)) as write:
        write(waveform)


class AudioWriter:
    """Callable that appends samples to a file.

    Attributes:
      clipped: number of samples clipped to [-1, 1] so far; always 0 for float files.
    """

    def __init__(self, file: soundfile.SoundFile):
        self._file = file
        self.clipped = 0

    def __call__(self, block: Float32[np.ndarray, "c _"]) -> None:
        if self._file.subtype != "FLOAT":
            self.clipped += int(np.count_nonzero((block > 1) | (block < -1)))
        self._file.write(block.T)


@contextlib.contextmanager
def writing_audio(
    path: str | os.PathLike, form: Format, subtype: str = "FLOAT"
) -> Iterator[AudioWriter]:
    """Yields a writer of blocks; the file appears whole or not at all.

    Args:
      path: the file, FLAC if its name ends in ".flac", otherwise WAV.
      form: format of the samples that will be written.
      subtype: libsndfile's name of the sample type: FLOAT, PCM_24 or PCM_16.
    """
    kind = "FLAC" if os.fspath(path).lower().endswith(".flac") else "WAV"
    if kind == "WAV" and form.samples * form.channels * 4 >= _LARGEST_WAV:
        kind = "RF64"  # WAV with 64-bit sizes
    with replacing(path) as temporary:
        try:
            with soundfile.SoundFile(
                os.fsencode(temporary), "w", form.sample_rate, form.channels, subtype, format=kind
            ) as file:
                yield AudioWriter(file)
        except soundfile.SoundFileError as error:
            raise UserError(
                f"{path} could not be written ({mended.reason(error)}); choose a folder that "
                "exists, is writable and has free space"
            ) from error


def _check_is_file(path: str | os.PathLike) -> None:
    try:
        # Opening a pipe would block until something writes to it.
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path} is a folder; give an audio file")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file (a pipe or device); give an audio file")
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"{path} {absence(path)}; check the name of the audio file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be opened ({error}); give a readable audio file") from error
    if not status.st_size:
        raise UserError(f"{path} is empty (0 bytes); copy or download it again")
