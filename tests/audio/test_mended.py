"""Formats that only ffmpeg decodes."""

import pathlib
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
import soundfile

from tests.audio.sounds import RATE, SECONDS, seconds_of, sound_file, swelling_tone
from uss_jax.audio import mended
from uss_jax.audio.files import read_audio, truncation
from uss_jax.disk import atomic
from uss_jax.errors import UserError


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
    path = _ffmpeg(sound_file(tmp_path, "wav"), tmp_path / f"a.{suffix}")
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
    samples = 1.5 * swelling_tone(channels=channels).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    path = _ffmpeg(tmp_path / "a.wav", tmp_path / "a.mka", "-c:a", "pcm_f32le")
    np.testing.assert_array_equal(read_audio(path)[0], samples.T)


@needs_ffmpeg
@pytest.mark.parametrize("seconds", [1, 2, 3, 5, 7])
def test_every_opus_file_that_ffmpeg_writes_is_read(tmp_path, seconds):
    soundfile.write(tmp_path / "a.wav", swelling_tone(seconds), RATE)
    for bitrate in ("16k", "64k"):
        path = _ffmpeg(tmp_path / "a.wav", tmp_path / f"{bitrate}.opus", "-b:a", bitrate)
        waveform, rate = read_audio(path)
        assert waveform.shape[1] / rate == pytest.approx(seconds, abs=0.02)
        assert truncation(path) is None
        _require_tone(waveform, rate)


@needs_ffmpeg
def test_ffmpegs_files_that_are_cut_off_are_known_as_such(tmp_path):
    path = _ffmpeg(sound_file(tmp_path, "wav"), tmp_path / "a.mka")
    path.write_bytes(path.read_bytes()[:-9000])
    assert "ffmpeg says: " in truncation(path)


@needs_ffmpeg
def test_a_playlist_reaches_no_other_file(tmp_path):
    sound = sound_file(tmp_path, "wav")
    lists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{sound}\n#EXT-X-ENDLIST\n",
        "b.m4a": f"ffconcat version 1.0\nfile '{sound}'\n",
    }
    for name, text in lists.items():
        pathlib.Path(tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="cannot be read as audio"):
            read_audio(tmp_path / name)


@needs_ffmpeg
def test_joined_mp4_files_are_refused(tmp_path):
    path = sound_file(tmp_path, "wav")
    once = tmp_path / "once.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", path, once], check=True)
    joined = tmp_path / "joined.m4a"
    joined.write_bytes(2 * once.read_bytes())
    assert seconds_of(once) == pytest.approx(3, abs=0.1)
    with pytest.raises(UserError, match="it contains several recordings in a row"):
        read_audio(joined)


@needs_ffmpeg
def test_a_video_without_sound_is_said_to_hold_none(tmp_path):
    path = tmp_path / "silent.mp4"
    picture = ["-f", "lavfi", "-i", "color=c=red:d=1:s=32x32"]
    subprocess.run(["ffmpeg", "-v", "error", *picture, path], check=True)
    with pytest.raises(UserError, match="it has no audio stream"):
        read_audio(path)


def test_what_was_decoded_is_removed_with_the_object_or_by_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(atomic, "_unfinished", set())
    kept = mended._Temporary()
    assert len(list(tmp_path.iterdir())) == 1
    del kept
    assert not list(tmp_path.iterdir())
    kept = mended._Temporary()
    atomic.remove_unfinished()
    assert not list(tmp_path.iterdir())
    del kept
    assert not atomic._unfinished
