"""Audio files in memory: decodes and encodes the bytes of records and reports.

Letters: `c` channels, `t` samples. Waveforms are float32 in [-1, 1].
"""

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
import soundfile
from jaxtyping import Float32, Int16

from uss_jax.audio import containers, mended
from uss_jax.audio.files import Format, check_scale

MP3_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # Hz


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
    if head := containers.wav_without_length(data):
        data = head + data[len(head) :]
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            form = file.format in ("WAV", "WAVEX", "FLAC"), file.subtype, file.channels
            if form != (True, "PCM_16", 1):
                return False
            file.seek(begin_sample)
            found = len(file.read(dtype="int16", out=out))
    except soundfile.SoundFileError as error:
        raise ValueError(f"holds no readable audio file ({mended.reason(error)})") from error
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
        raise ValueError(f"holds no readable audio file ({mended.reason(error)})") from error


def flac_bytes(samples: Int16[np.ndarray, " t"], sample_rate: int) -> bytes:
    """Encodes one channel as a FLAC file in memory."""
    memory = io.BytesIO()
    soundfile.write(memory, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return memory.getvalue()


def mp3_bytes(waveform: Float32[np.ndarray, "c t"], sample_rate: int) -> bytes:
    """Encodes one or two channels as an MP3 file in memory, at one of MP3_SAMPLE_RATES."""
    memory = io.BytesIO()
    soundfile.write(memory, waveform.T, sample_rate, format="MP3", subtype="MPEG_LAYER_III")
    return memory.getvalue()
