"""Files whose headers are wrong about what they hold, and formats that only ffmpeg decodes."""

import os
import pathlib
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile

from uss_jax.audio import mended
from uss_jax.audio.containers import read_mp3
from uss_jax.audio.files import (
    Format,
    audio_format,
    decode_bytes,
    find_recordings,
    format_of_bytes,
    read_audio,
    read_mono,
    truncation,
    writing_audio,
)
from uss_jax.errors import UserError

RATE = 32000
SECONDS = 3


def _waveform(seconds=SECONDS, channels=1):
    """A tone that grows and shrinks: frames of a variable bit rate differ in size."""
    t = np.arange(seconds * RATE) / RATE
    noise = np.random.default_rng(0).normal(0, 0.2, (len(t), channels)) * (t > 1)[:, None]
    return (0.3 * np.sin(2 * np.pi * 440 * t)[:, None] + noise).clip(-0.9, 0.9)


def _file(folder, suffix, **options):
    path = folder / f"whole.{suffix}"
    options = {
        "wav": {"subtype": "PCM_16"},
        "opus": {"format": "OGG", "subtype": "OPUS"},
        "rf64": {"format": "RF64", "subtype": "PCM_16"},
    }.get(suffix, {}) | options
    rate = 48000 if suffix == "opus" else RATE
    soundfile.write(path, _waveform(), rate, **options)
    return path


def _vbr_mp3(folder):
    path = _file(folder, "mp3", bitrate_mode="VARIABLE", compression_level=0.4)
    mp3 = read_mp3(path.read_bytes())
    assert mp3.promised == mp3.frames
    return path, mp3


def _seconds(path):
    waveform, rate = read_audio(path)
    assert waveform.shape[1] == audio_format(path).samples
    return waveform.shape[1] / rate


def test_an_mp3_without_a_header_of_its_length_is_read_to_its_end(tmp_path):
    path, mp3 = _vbr_mp3(tmp_path)
    bare = tmp_path / "bare.mp3"
    bare.write_bytes(path.read_bytes()[mp3.begin :])
    with soundfile.SoundFile(bare) as file:
        assert file.frames < 0.9 * SECONDS * RATE  # what libsndfile makes of it alone
    assert _seconds(bare) == pytest.approx(SECONDS, abs=0.15)
    assert truncation(bare) is None
    # The same samples, but for the coder's delay, which only the lost header told.
    whole, part = read_audio(path)[0][0], read_audio(bare)[0][0]
    shifts = [np.abs(part[d : d + 60000] - whole[:60000]).max() for d in range(1700)]
    assert min(shifts) < 1e-4


@pytest.mark.parametrize(
    "suffix", ["mp3", "ogg", "opus", "flac", "wav", "aiff", "au", "caf", "w64", "rf64"]
)
def test_joined_files_are_read_to_their_end(tmp_path, suffix):
    path = _file(tmp_path, suffix)
    once = _seconds(path)
    assert truncation(path) is None
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(2 * path.read_bytes())
    assert _seconds(joined) == pytest.approx(2 * once, abs=0.15)
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
    path = _file(tmp_path, suffix)
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
    flac = bytearray(_file(tmp_path, "flac").read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # the number of samples, unknown
    (tmp_path / "piped.flac").write_bytes(flac)
    wav = bytearray(_file(tmp_path, "wav").read_bytes())
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


def test_an_audio_file_in_memory_is_mended_too(tmp_path):
    path, mp3 = _vbr_mp3(tmp_path)
    bare = path.read_bytes()[mp3.begin :]
    assert format_of_bytes(bare).samples == decode_bytes(bare).shape[1] > 0.98 * SECONDS * RATE
    wav = _file(tmp_path, "wav").read_bytes()
    with pytest.raises(ValueError, match=r"is cut off .its header promises 3.0 s"):
        format_of_bytes(wav[:9999])
    with pytest.raises(ValueError, match="several audio files"):
        format_of_bytes(2 * wav)


@pytest.mark.parametrize("peak", [32768.0, -1e30, 12.0])
def test_integers_stored_as_floats_are_refused_with_the_remedy(tmp_path, peak):
    waveform = _waveform() * peak
    soundfile.write(tmp_path / "loud.wav", waveform, RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=r"loud.wav .*above full scale .*divided by 32768"):
        read_mono(tmp_path / "loud.wav", RATE)
    with pytest.raises(ValueError, match="above full scale"):
        decode_bytes((tmp_path / "loud.wav").read_bytes())
    soundfile.write(tmp_path / "loud.wav", waveform / peak * 9, RATE, subtype="FLOAT")
    assert np.abs(read_mono(tmp_path / "loud.wav", RATE)).max() > 5


def test_what_integers_cannot_hold_is_counted(tmp_path):
    block = np.array([[0.5, 1.0, 1.5, -1.0, -1.01], [0, 0, 0, 2, 0]], np.float32)
    form = Format(RATE, 2, 5)
    for subtype, clipped in (("PCM_16", 6), ("PCM_24", 6), ("FLOAT", 0)):
        with writing_audio(tmp_path / "out.wav", form, subtype) as write:
            write(block)
            write(block)
        assert write.clipped == clipped


def test_one_rule_says_what_a_recording_is(tmp_path):
    for name in (
        *("a.wav", "b.OPUS", "c.aiff", "d.au", "e.w64", "f.caf", "sub/g.m4a", "sub/h.mp3"),
        *("._a.wav", ".hidden/x.wav", "Thumbs.db", "notes.txt", "sub/labels.csv"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    recordings, others = find_recordings(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in recordings]
    assert names == [
        *["a.wav", "b.OPUS", "c.aiff", "d.au", "e.w64", "f.caf", "sub/g.m4a", "sub/h.mp3"]
    ]
    assert [path.name for path in others] == ["notes.txt", "labels.csv"]


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", "/dev/zero"):
        with pytest.raises(UserError, match="is not a regular file"):
            audio_format(path)


def test_without_ffmpeg_its_formats_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(mended.shutil, "which", lambda name: None)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x1cftypM4A " + bytes(99))
    with pytest.raises(UserError, match=r"only ffmpeg decodes .*install ffmpeg"):
        read_audio(tmp_path / "a.m4a")


needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def _ffmpeg(source, out, *options):
    subprocess.run(["ffmpeg", "-y", "-v", "error", "-i", source, *options, out], check=True)
    return out


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["m4a", "mp4", "webm", "mka"])
def test_ffmpeg_decodes_what_libsndfile_does_not_know(tmp_path, suffix):
    path = _ffmpeg(_file(tmp_path, "wav"), tmp_path / f"a.{suffix}")
    waveform, rate = read_audio(path)
    assert waveform.shape[1] / rate == pytest.approx(SECONDS, abs=0.1)
    assert truncation(path) is None
    _require_tone(waveform, rate)


def _require_tone(waveform, rate):
    """The beginning is a tone of 440 Hz, 0.3 high, and nothing else."""
    heard = waveform[0, rate // 4 : 3 * rate // 4]
    t = np.arange(len(heard)) / rate
    waves = np.stack([np.sin(2 * np.pi * 440 * t), np.cos(2 * np.pi * 440 * t)], axis=1)
    parts, *_ = np.linalg.lstsq(waves, heard, rcond=None)
    assert np.hypot(*parts) == pytest.approx(0.3, rel=0.05)
    assert np.std(heard - waves @ parts) < 0.03


@needs_ffmpeg
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_ffmpeg_decodes_are_those_of_the_file(tmp_path, channels):
    """Lossless, so equal to the last bit; floats, so beyond full scale too."""
    samples = 1.5 * _waveform(channels=channels).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    path = _ffmpeg(tmp_path / "a.wav", tmp_path / "a.mka", "-c:a", "pcm_f32le")
    np.testing.assert_array_equal(read_audio(path)[0], samples.T)


@needs_ffmpeg
@pytest.mark.parametrize("seconds", [1, 2, 3, 5, 7])
def test_every_opus_file_that_ffmpeg_writes_is_read(tmp_path, seconds):
    soundfile.write(tmp_path / "a.wav", _waveform(seconds), RATE)
    for bitrate in ("16k", "64k"):
        path = _ffmpeg(tmp_path / "a.wav", tmp_path / f"{bitrate}.opus", "-b:a", bitrate)
        waveform, rate = read_audio(path)
        assert waveform.shape[1] / rate == pytest.approx(seconds, abs=0.02)
        assert truncation(path) is None
        _require_tone(waveform, rate)


@needs_ffmpeg
def test_ffmpegs_files_that_are_cut_off_are_known_as_such(tmp_path):
    path = _ffmpeg(_file(tmp_path, "wav"), tmp_path / "a.mka")
    path.write_bytes(path.read_bytes()[:-9000])
    assert "ffmpeg says: " in truncation(path)


@needs_ffmpeg
def test_a_playlist_reaches_no_other_file(tmp_path):
    sound = _file(tmp_path, "wav")
    lists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{sound}\n#EXT-X-ENDLIST\n",
        "b.m4a": f"ffconcat version 1.0\nfile '{sound}'\n",
    }
    for name, text in lists.items():
        pathlib.Path(tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="cannot be read as audio"):
            read_audio(tmp_path / name)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
def test_joined_mp4_files_are_refused(tmp_path):
    path = _file(tmp_path, "wav")
    once = tmp_path / "once.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", path, once], check=True)
    joined = tmp_path / "joined.m4a"
    joined.write_bytes(2 * once.read_bytes())
    assert _seconds(once) == pytest.approx(3, abs=0.1)
    with pytest.raises(UserError, match="it contains several recordings in a row"):
        read_audio(joined)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
def test_a_video_without_sound_is_said_to_hold_none(tmp_path):
    path = tmp_path / "silent.mp4"
    picture = ["-f", "lavfi", "-i", "color=c=red:d=1:s=32x32"]
    subprocess.run(["ffmpeg", "-v", "error", *picture, path], check=True)
    with pytest.raises(UserError, match="it has no audio stream"):
        read_audio(path)
