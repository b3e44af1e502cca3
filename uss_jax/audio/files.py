"""Audio file I/O and resampling: the only module that reads or writes audio.

Letters: c channels, t samples. Waveforms are float32 in [-1, 1].
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE, mended
from uss_jax.disk.atomic import replacing
from uss_jax.disk.opening import absence
from uss_jax.errors import UserError

# File name suffixes of formats read by libsndfile, and of formats decoded by ffmpeg.
_LIBSNDFILE = ".wav .wave .rf64 .w64 .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .voc"
_FFMPEG = ".m4a .mp4 .m4b .m4v .mov .webm .mkv .mka .aac .wma .3gp .amr .ac3 .eac3 .ape .wv .tta"
AUDIO_SUFFIXES = frozenset(f"{_LIBSNDFILE} {_FFMPEG}".split())
# Samples more than 20 dB above full scale are taken for integers mislabelled as floats.
PEAK_LIMIT = 10.0
# Ratio (-40 dB) of the mean's energy to that of the channels; below it, channels cancel out.
_CANCELLED = 1e-4
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
    systems create.
    """
    recordings, others = [], []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini"):
                continue
            is_recording = os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES
            (recordings if is_recording else others).append(pathlib.Path(where, name))
    return recordings, others


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
    path: str | os.PathLike, block_samples: int = 1 << 18, accept_truncated: bool = False
) -> Iterator[Float32[np.ndarray, "c t"]]:
    """Reads a recording block by block, with libsndfile or, if installed, ffmpeg.

    Args:
      path: the file.
      block_samples: samples per channel in a block; the last block may be shorter.
      accept_truncated: read a truncated FLAC file as far as it goes instead of raising.

    Raises:
      UserError: the file is not a readable recording, is empty, or has a sample that is NaN,
        infinite or far above full scale.
      CutOff: a FLAC file is truncated, and `accept_truncated` is false.
    """
    with _opened(path) as (file, _):
        done = 0
        while block := _read(path, file, block_samples, done, accept_truncated):
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
            raise _unreadable(path, _reason(error)) from error
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
) -> tuple[Float32[np.ndarray, "c t"], ...]:
    """Returns a tuple of the next block, channels first; empty at the end of the file."""
    try:
        block, error = mended.read_block(file, samples)
    except soundfile.SoundFileError as error:
        raise _unreadable(path, _reason(error)) from error
    if error and not accept_truncated:
        why = mended.cut_off(file, done + len(block)) or _reason(error)
        raise CutOff(f"{path} is cut off ({why}); copy or download it again")
    block = block.T
    if not np.isfinite(block).all():
        at = done + np.argmin(np.isfinite(block).all(axis=0))
        raise UserError(
            f"{path} has a sample that is NaN or infinite, at {at / file.samplerate:.3f} s; "
            "export the recording again"
        )
    try:
        check_scale(block)
    except ValueError as error:
        raise UserError(f"{path} {error}; export the recording again") from None
    return (np.ascontiguousarray(block),) if block.size else ()


def _unreadable(path: str | os.PathLike, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be read as audio ({reason}); give a recording such as a wav, flac, ogg or "
        "mp3 file"
    )


def decode_bytes(data: bytes) -> Float32[np.ndarray, "c t"]:
    """Decodes an audio file in memory; raises ValueError if it is damaged or not one."""
    with _opened_bytes(data) as file:
        waveform = file.read(dtype="float32", always_2d=True)
    check_scale(waveform)
    return np.ascontiguousarray(waveform.T)


def decode_pcm16(data: bytes | memoryview, begin_sample: int, out: Int16[np.ndarray, " t"]) -> bool:
    """Fills `out` with the 16-bit samples of a mono WAV or FLAC file in memory.

    Nothing before `begin_sample` is decoded.

    Returns:
      True; False, with `out` unchanged, for another format, sample type or channel count.

    Raises:
      ValueError: the bytes are not an audio file, or it ends too early.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            form = file.format in ("WAV", "WAVEX", "FLAC"), file.subtype, file.channels
            if form != (True, "PCM_16", 1):
                return False
            file.seek(begin_sample)
            found = len(file.read(dtype="int16", out=out))
    except soundfile.SoundFileError as error:
        raise ValueError(f"holds no readable audio file ({_reason(error)})") from error
    if found < len(out):
        raise ValueError(f"holds audio that ends at sample {begin_sample + found}")
    return True


def format_of_bytes(data: bytes) -> Format:
    """Reads the header of an audio file in memory; raises ValueError if damaged or not one."""
    with _opened_bytes(data) as file:
        return Format(file.samplerate, file.channels, file.frames)


def require_whole(data: bytes) -> Format:
    """Like `format_of_bytes`, but also raises ValueError if a FLAC file ends too early."""
    with _opened_bytes(data) as file:
        form = Format(file.samplerate, file.channels, file.frames)
        if file.format == "FLAC" and file.frames:  # for others the header tells
            try:
                file.seek(file.frames - 1)
                held = len(file.read(1))
            except soundfile.SoundFileError:
                held = 0
            if not held:
                raise ValueError("holds an audio file that is cut off")
        return form


def holds_floats(data: bytes) -> bool:
    """Tells whether an audio file in memory stores floats, which may be of any scale."""
    with _opened_bytes(data) as file:
        return file.subtype in ("FLOAT", "DOUBLE")


class _Memory(io.BytesIO):
    """Bytes as a file; clamps seeks, as libsndfile seeks before the start of some damaged files."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(max(offset, 0) if whence == os.SEEK_SET else offset, whence)


@contextlib.contextmanager
def _opened_bytes(data: bytes) -> Iterator[soundfile.SoundFile]:
    try:
        with soundfile.SoundFile(_Memory(mended.mended_bytes(data))) as file:
            if cut := mended.cut_off(file):
                raise ValueError(f"holds an audio file that is cut off ({cut})")
            yield file
    except soundfile.SoundFileError as error:
        raise ValueError(f"holds no readable audio file ({_reason(error)})") from error


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


def flac_bytes(samples: Int16[np.ndarray, " t"], sample_rate: int) -> bytes:
    """Encodes one channel as a FLAC file in memory."""
    memory = io.BytesIO()
    soundfile.write(memory, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return memory.getvalue()


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


def mono(waveform: Float32[np.ndarray, "c t"]) -> Float32[np.ndarray, " t"]:
    """Returns the mean of the channels, or the loudest channel if they cancel each other."""
    mean = waveform.mean(axis=0)
    energy = np.square(waveform).sum(axis=1)
    if np.square(mean).sum() < _CANCELLED * energy.mean():
        return waveform[np.argmax(energy)]
    return mean


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
                f"{path} could not be written ({_reason(error)}); choose a folder that exists, is "
                "writable and has free space"
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


def _reason(error: Exception) -> str:
    """Returns libsndfile's message in lower case, without the path and the full stop."""
    reason = getattr(error, "error_string", str(error)).strip().rstrip(".").lower()
    # libsndfile says so of .mp3 files without an MP3 frame; the path is known to exist.
    return "it contains no audio" if "does not exist" in reason else reason
