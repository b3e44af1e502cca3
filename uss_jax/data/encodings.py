"""Encodings of samples in a record, and their decoding to int16.

    pcm_s16le   bytes: little-endian int16 PCM, mono
    wav, flac   bytes: a whole audio file (any format that libsndfile reads)
    float       a list of floats in [-1, 1], packed: little-endian float32
    int64       a list of integers, packed: varints; TFDS's default for audio, and the slowest

`pcm_s16le` and `float` allow partial reads.
"""

import numpy as np
from jaxtyping import Float32, Int16, Int64

from uss_jax.audio.containers import begins_file
from uss_jax.audio.files import PEAK_LIMIT, check_scale
from uss_jax.audio.in_memory import decode_bytes, decode_pcm16, holds_floats, require_whole

ENCODINGS = ("pcm_s16le", "flac", "wav", "float", "int64")
# Bytes per sample, for encodings of fixed sample width.
SAMPLE_BYTES = {"pcm_s16le": 2, "float": 4}
# Clips with a larger share of clipped samples are reported.
CLIPPED_SHARE = 0.001


def to_int16(waveform: Float32[np.ndarray, " t"]) -> Int16[np.ndarray, " t"]:
    """Quantises [-1, 1] to int16 at a scale of 32768; 1 clips to 32767."""
    return np.clip(np.rint(waveform * 32768), -32768, 32767).astype(np.int16)


def decode(data: bytes | memoryview, encoding: str) -> Int16[np.ndarray, " t"]:
    """Decodes all samples of a record, or a part of them in an encoding of fixed sample width."""
    if encoding == "pcm_s16le":
        return np.frombuffer(data, "<i2")
    if encoding == "float":
        return to_int16(np.frombuffer(data, "<f4"))
    if encoding == "int64":
        return np.clip(varints(data), -32768, 32767).astype(np.int16)
    return to_int16(decode_bytes(bytes(data)).mean(axis=0))


def decode_into(
    out: Int16[np.ndarray, " t"], data: bytes | memoryview, encoding: str, begin: int = 0
) -> None:
    """Fills `out` with the samples from `begin` on.

    Of 16-bit mono WAV and FLAC files, only these samples are decoded.
    Raises:
      ValueError: the bytes are not an audio file, or hold too few samples.
    """
    if encoding in ("flac", "wav") and decode_pcm16(data, begin, out):
        return
    found = decode(data, encoding)[begin : begin + len(out)]
    if len(found) < len(out):
        raise ValueError(f"holds audio that ends at sample {begin + len(found)}")
    out[:] = found


def clipped_share(data: bytes, encoding: str) -> float:
    """Returns the share of samples above full scale, which are clipped when decoded to int16.

    Raises:
      ValueError: a sample is NaN or infinite, or far outside the expected range.
    """
    if encoding == "float":
        waveform = np.frombuffer(data, "<f4")
        check_scale(waveform)
    elif encoding == "int64":
        integers = varints(data)
        most = 32768 * PEAK_LIMIT
        if integers.max(initial=0) > most or integers.min(initial=0) < -most:
            raise ValueError("has samples outside the range of 16-bit integers; divide them to fit")
        waveform = integers / 32768
    elif encoding in ("flac", "wav") and holds_floats(data):
        waveform = decode_bytes(data)
    else:
        return 0.0
    return float(np.mean((waveform > 1) | (waveform < -1)))


def count_samples(data: bytes, encoding: str, sample_rate: int | None) -> int:
    """Counts the samples in encoded audio.

    Raises:
      ValueError: the bytes are not in this encoding, hold no samples, or have another sampling
        rate.
    """
    if encoding == "pcm_s16le" and begins_file(data):
        raise ValueError(
            f"has audio that begins with {data[:4]!r}: an audio file (encoding wav or flac), not "
            "PCM samples"
        )
    if encoding in SAMPLE_BYTES:
        count, rest = divmod(len(data), SAMPLE_BYTES[encoding])
        if rest or not count:
            raise ValueError(
                f"has {len(data)} bytes of audio, not one or more whole {encoding} samples"
            )
        return count
    if encoding == "int64":
        count = int((np.frombuffer(data, np.uint8) < 128).sum())
        if not count:
            raise ValueError("has no samples in its audio")
        return count
    form = require_whole(data)
    if sample_rate is not None and form.sample_rate != sample_rate:
        raise ValueError(f"holds audio of {form.sample_rate} Hz, the schema says {sample_rate}")
    if not form.samples:
        raise ValueError("has no samples in its audio")
    return form.samples


def varints(data: bytes | memoryview) -> Int64[np.ndarray, " t"]:
    """Decodes protobuf varints: seven bits per byte, lowest first; a set high bit: more follow."""
    octets = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(octets < 128)
    first = np.concatenate([[0], last[:-1] + 1]) if last.size else last
    place = np.arange(len(octets)) - np.repeat(first, last - first + 1)
    bits = (octets & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(bits, first).astype(np.int64) if last.size else np.zeros(0, np.int64)
