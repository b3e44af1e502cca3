import contextlib
import dataclasses
import errno
import io
import os
import tempfile

import pytest
import soundfile

from tests.data.toy import SETTINGS, toy_noise
from uss_jax.audio import mended
from uss_jax.data import conversion
from uss_jax.data.conversion import Skipped, prepare_clip
from uss_jax.data.tf_example import parse
from uss_jax.errors import UserError


def test_16_bit_samples_at_the_same_rate_come_through_unchanged(audio):
    clip = parse(prepare_clip(audio / "3.wav", "3.wav", (7, 5), SETTINGS).data)
    samples, _ = soundfile.read(audio / "3.wav", dtype="int16")
    assert clip == (b"3.wav", samples.tobytes(), (5, 7))


def test_long_clips_keep_their_beginning_and_short_ones_their_length(audio):
    long = parse(prepare_clip(audio / "long.flac", "a", (0,), SETTINGS).data)
    whole, _ = soundfile.read(audio / "long.flac", dtype="int16")
    assert long.audio == whole[:8000].tobytes()
    short = parse(prepare_clip(audio / "stereo.wav", "a", (0,), SETTINGS).data)
    assert len(short.audio) == 2 * 800


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        mended.FfmpegFailed("Error writing trailer: No space left on device"),
    ],
)
def test_a_full_folder_of_temporary_files_leaves_no_clip_out(audio, monkeypatch, error):
    @contextlib.contextmanager
    def opened(path):
        raise error
        yield

    monkeypatch.setattr(mended, "opened", opened)
    with pytest.raises(UserError, match=f"no space is left to write {tempfile.gettempdir()}; free"):
        prepare_clip(audio / "3.wav", "3.wav", (7,), SETTINGS)


def test_memory_that_ffmpeg_refuses_a_damaged_header_is_the_clip_s_trouble(audio, monkeypatch):
    @contextlib.contextmanager
    def opened(path):
        raise mended.FfmpegFailed("damaged.ape: Cannot allocate memory")
        yield

    monkeypatch.setattr(mended, "opened", opened)
    assert prepare_clip(audio / "3.wav", "3.wav", (7,), SETTINGS).kind == "unreadable"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_trouble_of_the_machine_leaves_no_clip_out(audio, monkeypatch, number):
    path, stat = str(audio / "3.wav"), os.stat

    def no_stat(asked, **options):
        if str(asked) == path:
            raise OSError(number, os.strerror(number), path)
        return stat(asked, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", no_stat)
        with pytest.raises(UserError, match=r"3\.wav .*: this is the machine's trouble"):
            prepare_clip(path, "3.wav", (7,), SETTINGS)

    def no_descriptor(*arguments, **options):
        raise soundfile.LibsndfileError(2)  # "System error."

    def no_file(asked, *arguments):
        if asked == path:
            raise OSError(number, os.strerror(number), path)
        return io.open(asked, *arguments)  # noqa: UP020

    monkeypatch.setattr(soundfile, "SoundFile", no_descriptor)
    skipped = prepare_clip(path, "3.wav", (7,), SETTINGS)
    assert skipped.kind == "unreadable"  # as it can be opened
    monkeypatch.setattr(conversion, "open", no_file, raising=False)
    with pytest.raises(UserError, match="this is the machine's trouble"):
        prepare_clip(path, "3.wav", (7,), SETTINGS)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("none.wav", "missing", "does not exist"),
        ("no\0ne.wav", "missing", "does not exist"),
        ("link.wav", "missing", "link.wav is a link to gone.wav, which does not exist"),
        ("text.wav", "unreadable", "cannot be read"),
        ("silent.wav", "silent", "is silent"),
        (".", "unreadable", "is a folder"),
        ("pipe", "unreadable", "is not a regular file"),
    ],
)
def test_unusable_clips_give_a_reason(audio, name, kind, reason, monkeypatch):
    monkeypatch.setattr(mended.shutil, "which", lambda name: None)  # no ffmpeg
    os.mkfifo(audio / "pipe")
    (audio / "link.wav").symlink_to("gone.wav")
    made = prepare_clip(audio / name, name, (0,), SETTINGS)
    assert isinstance(made, Skipped)
    assert made.kind == kind
    assert reason in made.reason.replace("only ffmpeg decodes", "cannot be read")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_recordings_that_are_cut_off_are_left_out_unless_accepted(audio, suffix):
    path = audio / f"cut.{suffix}"
    soundfile.write(path, toy_noise(40000), 8000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    settings = dataclasses.replace(SETTINGS, clip_seconds=10.0)
    made = prepare_clip(path, "a", (0,), settings)
    assert isinstance(made, Skipped)
    assert made.kind == "cut off"
    accepted = prepare_clip(path, "a", (0,), dataclasses.replace(settings, accept_truncated=True))
    assert 1 < len(parse(accepted.data).audio) / 16000 < 4


def test_the_segment_is_cut_out_of_a_whole_video(audio):
    waveform = toy_noise(60 * 8000)
    soundfile.write(audio / "video.wav", waveform, 8000, subtype="PCM_16")
    settings = dataclasses.replace(SETTINGS, clip_seconds=10.0)
    whole, _ = soundfile.read(audio / "video.wav", dtype="int16")
    at_30 = prepare_clip(audio / "video.wav", "a", (0,), settings, (30.0, 40.0))
    assert parse(at_30.data).audio == whole[240000:320000].tobytes()
    # A shorter clip than the segment is its beginning; the end may be a moment too early.
    one = prepare_clip(audio / "video.wav", "a", (0,), SETTINGS, (30.0, 40.0))
    assert parse(one.data).audio == whole[240000:248000].tobytes()
    last = prepare_clip(audio / "video.wav", "a", (0,), settings, (50.5, 60.5))
    assert parse(last.data).audio == whole[404000:].tobytes()
    # What was cut out already stays as it is.
    soundfile.write(audio / "cut.wav", waveform[: 10 * 8000], 8000, subtype="PCM_16")
    cut = prepare_clip(audio / "cut.wav", "a", (0,), settings, (30.0, 40.0))
    assert parse(cut.data).audio == whole[:80000].tobytes()
    # Neither the one nor the other.
    soundfile.write(audio / "part.wav", waveform[: 20 * 8000], 8000, subtype="PCM_16")
    part = prepare_clip(audio / "part.wav", "a", (0,), settings, (30.0, 40.0))
    assert part.kind == "not its segment"
    assert "lasts 20.0 s" in part.reason
