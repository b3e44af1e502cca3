"""Opens recordings that libsndfile alone would not read, or not to their end.

If the header of an MP3 or WAV file misstates the length, a corrected one replaces it. Concatenated
files are decoded one after the other. Formats unknown to libsndfile (m4a, mp4, webm, ...) are
decoded by ffmpeg if it is installed. The last two use a temporary file of float samples.
"""

import contextlib
import functools
import io
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soundfile
from jaxtyping import Float32

from uss_jax.audio import containers
from uss_jax.disk.atomic import until_exit

# Allowlist for ffmpeg: a playlist, for instance, could name other files on this machine.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,asf,avi,flv,mpegts,mpeg,amr,ac3,eac3,ape,wv,tta,"
    "mp3,ogg,flac,wav,w64,aiff,au,caf,dsf,mpc,mpc8"
)
_BLOCK_SAMPLES = 1 << 16
_KEPT_FILES = 4
_UNKNOWN = 2**40  # libsndfile reports more samples than this if the header leaves their number open


class FfmpegNeeded(Exception):
    """Raised for a file that only ffmpeg could decode if ffmpeg is not installed."""


class FfmpegFailed(Exception):
    """Raised if a file cannot be decoded by ffmpeg; the message is the reason."""


class _Temporary:
    """A temporary CAF file of float samples, deleted with this object.

    Not W64: libsndfile reads the floats of ffmpeg's W64 files as integers.
    """

    def __init__(self):
        descriptor, self.name = tempfile.mkstemp(prefix="uss-jax-", suffix=".caf")
        os.close(descriptor)
        weakref.finalize(self, until_exit(self.name))


class Opened(NamedTuple):
    """An open recording.

    Attributes:
      file: the recording as opened by libsndfile.
      truncation: evidence that its end is missing; None if there is none.
    """

    file: soundfile.SoundFile
    truncation: str | None


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Opened]:
    """Opens a recording.

    Raises:
      soundfile.SoundFileError: libsndfile knows the format, but the file is damaged or joins
        recordings of different sampling rates or channels.
      FfmpegNeeded, FfmpegFailed: libsndfile does not know the format.
    """
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(_mapped(path))
        source, truncation = _source(path, data)
        try:
            file = _open(source)
        # soundfile raises TypeError for names ending in ".raw", whose rate it cannot know.
        except TypeError:
            raise FfmpegFailed("its extension is that of raw audio without a header") from None
        except soundfile.LibsndfileError as error:
            if error.code != 1:  # "format not recognised"
                raise
            source, truncation = _kept(os.fspath(path), _stamp(path), by_ffmpeg=True)
            file = _open(source)
        file = stack.enter_context(file)
        yield Opened(file, truncation or cut_off(file))


def _open(source: bytes | io.RawIOBase | _Temporary) -> soundfile.SoundFile:
    return soundfile.SoundFile(getattr(source, "name", source))


def mended_bytes(data: bytes) -> bytes:
    """Returns an audio file in memory with its header corrected if it misstates the length.

    Raises:
      ValueError: the file is truncated, or there are several files.
    """
    if len(containers.read_parts(data)) > 1:
        raise ValueError("holds several audio files, one after the other")
    head, begin, cut = _right_head(data)
    if cut:
        raise ValueError(f"holds an audio file that is cut off ({cut})")
    return head + data[begin:]


def _source(
    path: str | os.PathLike, data: mmap.mmap
) -> tuple[bytes | io.RawIOBase | _Temporary, str | None]:
    """Returns the source for libsndfile to open, and evidence of truncation or None."""
    path = os.fspath(path)
    if len(containers.read_parts(data)) > 1 or containers.flac_samples(data) == 0:
        return _kept(path, _stamp(path))
    head, begin, cut = _right_head(data)
    # libsndfile 1.2 fails amid some good Opus files.
    if containers.is_opus(data) and not _is_decodable(path, _stamp(path)):
        if shutil.which("ffmpeg") is None:
            raise FfmpegFailed("libsndfile cannot decode this Opus file, ffmpeg may; install it")
        return _kept(path, _stamp(path), by_ffmpeg=True)[0], cut
    # As bytes, since soundfile rejects str names that are not UTF-8.
    return (_Spliced(path, head, begin, len(data)) if head else os.fsencode(path)), cut


def _right_head(data: containers.Bytes) -> tuple[bytes, int, str | None]:
    """Returns (header, bytes of the file that it replaces, evidence of truncation or None).

    If the file's own header is right, the first two are b"" and 0.
    """
    if head := containers.wav_without_length(data):
        return head, len(head), None
    mp3 = containers.read_mp3(data) if containers.looks_like_mp3(data) else None
    if mp3 is None:
        whole = containers.read_parts(data)[-1].whole
        return b"", 0, "its last page is missing" if whole is False else None
    cut = None
    if mp3.promised is not None and mp3.frames < mp3.promised - 1:
        promised, held = (n * mp3.frame_samples for n in (mp3.promised, mp3.frames))
        cut = _promise(promised, held, mp3.sample_rate)
    elif not mp3.whole:
        cut = "it ends inside a frame"
    if mp3.promised == mp3.frames:
        return b"", 0, cut
    return containers.header_of_mp3(data, mp3), mp3.begin, cut


def _promise(promised: int, held: int, sample_rate: int) -> str:
    return (
        f"its header promises {promised / sample_rate:.1f} s, it holds {held / sample_rate:.1f} s"
    )


def cut_off(file: soundfile.SoundFile, held: int | None = None) -> str | None:
    """Returns evidence, from the header or `held` samples read, that a file's end is missing."""
    if held is not None and held < file.frames < _UNKNOWN:
        return _promise(file.frames, held, file.samplerate)
    share = containers.promised_share(file.extra_info)
    return share and _promise(round(file.frames * share), file.frames, file.samplerate)


@contextlib.contextmanager
def _mapped(path: str | os.PathLike) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


class _Spliced(io.RawIOBase):
    """A file whose beginning is replaced by other bytes, or a section of a file."""

    def __init__(self, path: str, head: bytes, begin: int, end: int):
        self._head, self._begin = head, begin
        self._length = len(head) + end - begin
        self._file = open(path, "rb", buffering=1 << 16)  # noqa: SIM115, closed in close
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + (0, self._at, self._length)[whence], 0)
        return self._at

    def readinto(self, buffer) -> int:
        size = min(len(buffer), max(self._length - self._at, 0))
        head = self._head[self._at : self._at + size]
        self._file.seek(self._begin + max(self._at - len(self._head), 0))
        data = head + self._file.read(size - len(head))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _stamp(path: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1 << 12)  # a file is opened several times, in many threads
def _is_decodable(path: str, stamp: tuple[int, int]) -> bool:
    """Returns whether libsndfile decodes a file to its end."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            while len(read_block(file, _BLOCK_SAMPLES)[0]):
                pass
    except soundfile.SoundFileError:
        return False
    return True


@functools.lru_cache(maxsize=_KEPT_FILES)
def _kept(
    path: str, stamp: tuple[int, int], by_ffmpeg: bool = False
) -> tuple[_Temporary, str | None]:
    """Decodes a file to a cached temporary one; returns it and evidence of truncation or None."""
    decoded = _Temporary()
    with _mapped(path) as data:
        if not by_ffmpeg:
            return decoded, _decode_in_turn(path, containers.read_parts(data), decoded.name)
        if data[4:8] == b"ftyp" and containers.joined_mp4(data):
            raise FfmpegFailed("it contains several recordings in a row; join them with ffmpeg")
    return decoded, _decode_with_ffmpeg(path, decoded.name)


def _decode_in_turn(path: str, parts: list[containers.Part], out: str) -> str | None:
    """Decodes joined recordings into one file; returns evidence that the last is truncated."""
    writer = cut = None
    with contextlib.ExitStack() as stack:
        for part in parts:
            source = os.fsencode(path)
            if len(parts) > 1:
                source = _Spliced(path, b"", part.begin, part.end)
            with soundfile.SoundFile(source) as file:
                form = file.samplerate, file.channels
                if writer is None:
                    writer = stack.enter_context(
                        soundfile.SoundFile(out, "w", *form, "FLOAT", format="CAF")
                    )
                elif form != (writer.samplerate, writer.channels):
                    raise soundfile.SoundFileRuntimeError(
                        "it contains recordings of different sample rates or channels in a row"
                    )
                held = 0
                while len(block := read_block(file, _BLOCK_SAMPLES)[0]):
                    writer.write(block)
                    held += len(block)
                cut = "its last page is missing" if part.whole is False else cut_off(file, held)
    return cut


def read_block(
    file: soundfile.SoundFile, samples: int
) -> tuple[Float32[np.ndarray, "t c"], soundfile.SoundFileError | None]:
    """Reads the next `samples` samples, fewer at the end of the file.

    Returns:
      The samples, and libsndfile's error if one occurred after them: a FLAC file that is truncated
      or does not state its length ends with one.

    Raises:
      soundfile.SoundFileError: an error in a file of another format.
    """
    out = np.full((samples, file.channels), np.nan, np.float32)
    try:
        return file.read(out=out), None
    except soundfile.SoundFileError as error:
        # Samples read before the error are in `out`; only the remaining NaN tell how many.
        untouched = np.isnan(out).all(axis=1)
        count = int(np.argmax(untouched)) if untouched.any() else samples
        if file.format != "FLAC":
            raise
        return out[:count], error


def reason(error: Exception) -> str:
    """Returns libsndfile's message in lower case, without the path and the full stop."""
    words = getattr(error, "error_string", str(error)).strip().rstrip(".").lower()
    # libsndfile says so of .mp3 files without an MP3 frame; the path is known to exist.
    return "it contains no audio" if "does not exist" in words else words


def _decode_with_ffmpeg(path: str, out: str) -> str | None:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise FfmpegNeeded
    done = subprocess.run(
        [
            *(ffmpeg, "-nostdin", "-y", "-v", "error"),
            *("-protocol_whitelist", "file", "-format_whitelist", _DEMUXERS),
            *("-i", f"file:{os.path.abspath(path)}", "-map", "0:a:0"),
            *("-c:a", "pcm_f32le", "-f", "caf", f"file:{out}"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    words = done.stderr.decode(errors="replace").replace(f"file:{os.path.abspath(path)}: ", "")
    if "matches no streams" in words:
        raise FfmpegFailed("it has no audio stream")
    if done.returncode or not os.path.getsize(out):
        raise FfmpegFailed((words.strip().splitlines() or ["it decoded no samples"])[-1].strip())
    cut = re.search(r"[^\]\n]*(?:partial file|ended prematurely|truncated)[^\n]*", words)
    return f"ffmpeg says: {cut[0].strip()}" if cut else None
