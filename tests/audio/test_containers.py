"""Files whose headers are wrong about what they hold."""

import struct

import numpy as np
import pytest
import soundfile

from tests.audio.sounds import RATE, SECONDS, seconds_of, sound_file, vbr_mp3
from uss_jax.audio.files import audio_format, read_audio, truncation
from uss_jax.errors import UserError


def test_an_mp3_without_a_header_of_its_length_is_read_to_its_end(tmp_path):
    path, mp3 = vbr_mp3(tmp_path)
    bare = tmp_path / "bare.mp3"
    bare.write_bytes(path.read_bytes()[mp3.begin :])
    with soundfile.SoundFile(bare) as file:
        assert file.frames < 0.9 * SECONDS * RATE  # what libsndfile makes of it alone
    assert seconds_of(bare) == pytest.approx(SECONDS, abs=0.15)
    assert truncation(bare) is None
    # The same samples, but for the coder's delay, which only the lost header told.
    whole, part = read_audio(path)[0][0], read_audio(bare)[0][0]
    shifts = [np.abs(part[d : d + 60000] - whole[:60000]).max() for d in range(1700)]
    assert min(shifts) < 1e-4


@pytest.mark.parametrize(
    "suffix", ["mp3", "ogg", "opus", "flac", "wav", "aiff", "au", "caf", "w64", "rf64"]
)
def test_joined_files_are_read_to_their_end(tmp_path, suffix):
    path = sound_file(tmp_path, suffix)
    once = seconds_of(path)
    assert truncation(path) is None
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(2 * path.read_bytes())
    assert seconds_of(joined) == pytest.approx(2 * once, abs=0.15)
    assert truncation(joined) is None


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        ("wav", "its header promises 3.0 s, it holds 1.5 s"),
        ("aiff", "its header promises 3.0 s, it holds 1.5 s"),
        ("au", "its header promises 3.0 s, it holds 1.5 s"),
        ("w64", "its header promises 3.0 s, it holds 1.5 s"),
        ("rf64", "its header promises 3.0 s, it holds 1.5 s"),
        ("flac", "its header promises 3.0 s, it holds "),
        ("mp3", "its header promises 3.1 s, it holds "),
        ("ogg", "its last page is missing"),
        ("opus", "its last page is missing"),
    ],
)
def test_a_file_that_is_cut_off_is_known_as_such(tmp_path, suffix, said):
    path = sound_file(tmp_path, suffix)
    data = path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    half = data[: len(data) * (7 if suffix == "opus" else 5) // 10]
    cut.write_bytes(half)
    assert truncation(path) is None
    assert said in truncation(cut)
    waveform, rate = read_audio(cut, accept_truncated=True)
    assert 0.2 * SECONDS < waveform.shape[1] / rate < 0.9 * SECONDS
    if suffix == "flac":  # of which only decoding tells
        with pytest.raises(UserError, match=r"is cut off \(its header promises 3.0 s, it holds"):
            read_audio(cut)
        whole, _ = read_audio(path)
        np.testing.assert_array_equal(waveform, whole[:, : waveform.shape[1]])
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(data + half)
    if suffix in ("flac", "ogg", "opus", "wav", "aiff", "au", "w64", "rf64"):
        assert truncation(joined)


def test_files_written_into_a_pipe_are_read_whole(tmp_path):
    flac = bytearray(sound_file(tmp_path, "flac").read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # the number of samples, unknown
    (tmp_path / "piped.flac").write_bytes(flac)
    wav = bytearray(sound_file(tmp_path, "wav").read_bytes())
    at = wav.index(b"data") + 4
    for name, size in (("zero", 0), ("most", 2**32 - 1), ("pipe", 0x7FFFF000)):
        wav[at : at + 4] = struct.pack("<I", size)
        (tmp_path / f"{name}.wav").write_bytes(wav)
    for name in ("piped.flac", "zero.wav", "most.wav", "pipe.wav"):
        path = tmp_path / name
        np.testing.assert_array_equal(
            read_audio(path)[0], read_audio(tmp_path / f"whole{path.suffix}")[0], name
        )
        assert audio_format(path).samples == SECONDS * RATE
        assert truncation(path) is None
    # Five hours of which a copy holds the beginning.
    wav[at : at + 4] = struct.pack("<I", 3_000_000_000)
    (tmp_path / "copy.wav").write_bytes(wav)
    assert "its header promises" in truncation(tmp_path / "copy.wav")


@pytest.mark.parametrize("stated", [0.5, 1.0, 2.0])
def test_a_wav_of_more_than_its_header_states_is_read_to_its_end(tmp_path, stated):
    path = sound_file(tmp_path, "wav")
    wav = bytearray(path.read_bytes())
    at = wav.index(b"data") + 4
    (whole,) = struct.unpack("<I", wav[at : at + 4])
    size = int(whole * stated / SECONDS) // 4 * 4
    wav[at : at + 4] = struct.pack("<I", size)
    (tmp_path / "died.wav").write_bytes(wav)
    np.testing.assert_array_equal(read_audio(tmp_path / "died.wav")[0], read_audio(path)[0])
    assert audio_format(tmp_path / "died.wav").samples == SECONDS * RATE
    # Whole chunks after the samples are no samples, however long.
    tagged = wav[: at + 4 + size] + b"LIST" + struct.pack("<I", whole) + bytes(whole)
    (tmp_path / "tagged.wav").write_bytes(tagged)
    assert audio_format(tmp_path / "tagged.wav").samples < 1.1 * stated * RATE
    # Nor is a chunk or a tag that is cut off.
    for after in (b"LIST\xff\xff\xff\x0f", b"ID3\3\0\0\0\0\1\1", b"APETAGEX\xd0\7\0\0"):
        for length in (size // 2, 3 * whole):
            (tmp_path / "cut.wav").write_bytes(wav[: at + 4 + size] + after + bytes(length))
            assert audio_format(tmp_path / "cut.wav").samples < 1.1 * stated * RATE


def _chunk(name, content, padded=True):
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2 * padded)


@pytest.mark.parametrize(
    ("after", "stated"),
    [
        (_chunk(b"id3 ", bytes(range(256)) * 400) + b"stray", True),
        (_chunk(b"id3 ", bytes(range(256)) * 400) + b"stray", False),
        (_chunk(b"note", b"odd", False) + _chunk(b"id3 ", bytes(range(256)) * 400), False),
        (_chunk(b"covr", bytes(range(256)) * 400)[:50_000], True),
    ],
)
def test_long_metadata_after_the_samples_is_no_sound(tmp_path, after, stated):
    """Whatever is wrong with it; it may be longer than the recording."""
    wav = bytearray(sound_file(tmp_path, "wav").read_bytes())
    if stated:
        wav[4:8] = struct.pack("<I", len(wav) + 102_408 - 8)
    (tmp_path / "tagged.wav").write_bytes(wav + after)
    assert audio_format(tmp_path / "tagged.wav").samples == SECONDS * RATE
    np.testing.assert_array_equal(
        read_audio(tmp_path / "tagged.wav")[0], read_audio(tmp_path / "whole.wav")[0]
    )


def test_chunks_after_no_samples_are_not_taken_for_samples(tmp_path):
    """An empty file of a recorder that tags its files is none that was written to a pipe."""
    path = tmp_path / "empty.wav"
    soundfile.write(path, np.zeros(0), RATE)
    empty = path.read_bytes()
    empty = empty[: empty.index(b"data") + 8]
    for after in (b"iXML\6\0\0\0<BWF/>", b"LIST\4\0\0\0INFOid3 \3\0\0\0ID3\0", b"id3 \3\0\0\0ID3"):
        data = empty + after
        path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
        with pytest.raises(UserError, match="holds no samples"):
            read_audio(path)
        # With a length that nobody has put in, they are what they were.
        path.write_bytes(data[:4] + bytes(4) + data[8:])
        assert read_audio(path)[0].shape == (1, len(after) // 2)
    silence = empty[:4] + struct.pack("<I", len(empty) + 8) + empty[8:] + bytes(16)
    path.write_bytes(silence)
    assert read_audio(path)[0].shape == (1, 8)
