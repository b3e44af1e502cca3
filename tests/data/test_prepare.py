import csv
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from uss_jax.audio import mended
from uss_jax.data import prepare as prepare_module
from uss_jax.data.encodings import to_int16
from uss_jax.data.index import load_index
from uss_jax.data.labels import LabelledFile
from uss_jax.data.metadata import read_encoding, read_sample_rate
from uss_jax.data.prepare import ClipSettings, Skipped, prepare, prepare_clip
from uss_jax.data.reader import ClipReader
from uss_jax.data.tf_example import parse
from uss_jax.errors import UserError

SETTINGS = ClipSettings(sample_rate=8000, clip_seconds=1.0)


def _noise(n, channels=1):
    return np.random.default_rng(n).uniform(-0.9, 0.9, (n, channels)).astype(np.float32)


@pytest.fixture
def audio(tmp_path):
    folder = tmp_path / "audio folder"
    folder.mkdir()
    for at in range(10):
        soundfile.write(folder / f"{at}.wav", _noise(800 + at), 8000, subtype="PCM_16")
    soundfile.write(folder / "long.flac", _noise(20000), 8000)
    soundfile.write(folder / "stereo.wav", _noise(1600, 2), 16000)
    soundfile.write(folder / "silent.wav", np.full((8000, 1), 5e-4), 8000)
    (folder / "text.wav").write_text("no sound")
    return folder


def _labelled(names):
    return [LabelledFile(name, (at, at + 1), at + 2) for at, name in enumerate(names)]


GOOD = [f"{at}.wav" for at in range(10)] + ["long.flac", "stereo.wav"]


def _prepare(audio, out, names=GOOD, **settings):
    arguments = {"name": "toy", "version": "1.0.0", "split": "train", "settings": SETTINGS}
    return prepare(_labelled(names), audio, out, **(arguments | settings))


def _files(folder):
    """But for unfinished work, which is hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_16_bit_samples_at_the_same_rate_come_through_unchanged(audio):
    clip = parse(prepare_clip(audio / "3.wav", "3.wav", (7, 5), SETTINGS).data)
    samples, _ = soundfile.read(audio / "3.wav", dtype="int16")
    assert clip == (b"3.wav", samples.tobytes(), (5, 7))


def test_full_scale_is_cut_to_16_bits():
    waveform = np.array([-2, -1, -0.5, 0, 0.5, 1, 2], np.float32)
    assert to_int16(waveform).tolist() == [-32768, -32768, -16384, 0, 16384, 32767, 32767]


def test_long_clips_keep_their_beginning_and_short_ones_their_length(audio):
    long = parse(prepare_clip(audio / "long.flac", "a", (0,), SETTINGS).data)
    whole, _ = soundfile.read(audio / "long.flac", dtype="int16")
    assert long.audio == whole[:8000].tobytes()
    short = parse(prepare_clip(audio / "stereo.wav", "a", (0,), SETTINGS).data)
    assert len(short.audio) == 2 * 800


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("none.wav", "missing", "does not exist"),
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
    soundfile.write(path, _noise(40000), 8000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    settings = dataclasses.replace(SETTINGS, clip_seconds=10.0)
    made = prepare_clip(path, "a", (0,), settings)
    assert isinstance(made, Skipped)
    assert made.kind == "cut off"
    accepted = prepare_clip(path, "a", (0,), dataclasses.replace(settings, accept_truncated=True))
    assert 1 < len(parse(accepted.data).audio) / 16000 < 4


def test_the_segment_is_cut_out_of_a_whole_video(audio):
    waveform = _noise(60 * 8000)
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


def test_several_segments_are_cut_out_of_one_video(audio, tmp_path):
    soundfile.write(audio / "video.wav", _noise(20 * 8000), 8000, subtype="PCM_16")
    soundfile.write(audio / "short.wav", _noise(5 * 8000), 8000, subtype="PCM_16")
    segments = [
        (f"{name}.wav", span) for name in ("video", "short") for span in ((1.0, 5.0), (7.0, 12.0))
    ]
    labelled = [
        LabelledFile(file, (at,), at + 2, span, shared=True)
        for at, (file, span) in enumerate(segments)
    ]
    names = {"name": "toy", "version": "1.0.0", "split": "train"}
    made = prepare(labelled, audio, tmp_path, **names, settings=SETTINGS)
    assert made.index.ids.tolist() == [b"video.wav#t=1,5", b"video.wav#t=7,12"]
    whole, _ = soundfile.read(audio / "video.wav", dtype="int16")
    reader = ClipReader(made.directory, made.index)
    for clip, begin in enumerate((1, 7)):
        expected = whole[8000 * begin : 8000 * (begin + 1)]
        np.testing.assert_array_equal(reader.read(clip), expected)
    assert [why.kind for _, why in made.skipped] == ["not its segment"] * 2
    assert "short.wav lasts 5.0 s and is thus one segment" in made.skipped[0][1].reason
    assert "short_1_5" in made.skipped[0][1].reason


def test_clipped_samples_are_counted(audio, tmp_path):
    t = np.arange(8000)
    soundfile.write(audio / "loud.wav", 2 * np.sin(t), 8000, subtype="FLOAT")
    soundfile.write(audio / "full.wav", np.sin(t), 8000, subtype="FLOAT")
    made = _prepare(audio, tmp_path / "out", ["loud.wav", "full.wav", "3.wav"])
    ((item, share),) = made.clipped
    assert item.file == "loud.wav"
    assert share == pytest.approx(2 / 3, abs=0.01)  # |2 sin| > 1


def test_a_name_that_is_not_utf_8_is_reported(audio, tmp_path):
    name = os.fsdecode(b"\xff\n.wav")
    soundfile.write(os.path.join(audio, "x.wav"), _noise(100) * 0, 8000)
    os.rename(audio / "x.wav", os.path.join(audio, name))
    made = _prepare(audio, tmp_path / "out", [name, "3.wav"])
    report = made.report.read_bytes()
    assert report.count(b"\xff") == 2
    assert b"silent" in report
    assert "\n" not in made.skipped[0][1].reason


def test_a_split_that_is_there_is_kept_unless_it_shall_be_replaced(audio, tmp_path):
    made = _prepare(audio, tmp_path / "out")
    before = _files(made.directory)
    with pytest.raises(UserError, match=r'has a split "train" already .*--overwrite'):
        _prepare(audio, tmp_path / "out", GOOD[:1])
    assert _files(made.directory) == before
    assert len(_prepare(audio, tmp_path / "out", GOOD[:1], overwrite=True).index) == 1


def test_a_command_stopped_after_it_published_goes_on(audio, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_metadata", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            _prepare(audio, tmp_path / "out")
    made = _prepare(audio, tmp_path / "out")
    assert len(load_index(made.directory, "train")) == len(GOOD)
    assert read_sample_rate(made.directory) == 8000


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_records_hold_every_clip_in_order_with_its_labels(audio, tmp_path):
    made = _prepare(audio, tmp_path / "out", shards=3)
    index = load_index(made.directory, "train", verify=True)
    assert [id.decode() for id in index.ids] == GOOD
    assert len(index.shards) == 3
    assert index.labels(4).tolist() == [4, 5]
    samples, _ = soundfile.read(audio / "4.wav", dtype="int16")
    np.testing.assert_array_equal(ClipReader(made.directory, index).read(4), samples)
    assert read_sample_rate(made.directory) == 8000


def test_any_number_of_workers_gives_the_same_files(audio, tmp_path, monkeypatch):
    one = _prepare(audio, tmp_path / "one", shards=2)
    monkeypatch.setattr(prepare_module, "_CLIPS_IN_FLIGHT", 3)
    many = _prepare(audio, tmp_path / "many", shards=2, workers=5)
    ours, theirs = _files(one.directory), _files(many.directory)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith(".npz"):  # a zip file holds the time
            assert ours[name] == theirs[name], name
    assert one.index.digest == many.index.digest


def test_unusable_clips_are_listed_and_the_rest_goes_on(audio, tmp_path):
    names = ["none.wav", "text.wav", *GOOD, "silent.wav"]
    made = _prepare(audio, tmp_path / "out", names, shards=8)
    # The block of the first two clips kept none, so it has no shard.
    assert len(made.index.shards) == 7
    assert len(made.index) == len(GOOD)
    with open(made.report, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["none.wav", "text.wav", "silent.wav"]
    assert [row["line"] for row in rows] == ["2", "3", "16"]
    assert "is silent" in rows[2]["reason"]


def test_nothing_usable_is_an_error_and_leaves_nothing(audio, tmp_path):
    with pytest.raises(UserError, match=r"none of the 2 clips could be used; the first: .*exist"):
        _prepare(audio, tmp_path / "out", ["none.wav", "silent.wav"])
    assert not list((tmp_path / "out").iterdir())


def test_failure_in_the_middle_keeps_what_was_there(audio, tmp_path, monkeypatch):
    made = _prepare(audio, tmp_path / "out")
    before = _files(made.directory)

    def full(path, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "RecordWriter", full)
    with pytest.raises(UserError, match="no space is left to write"):
        _prepare(audio, tmp_path / "out", GOOD[:3], overwrite=True)
    assert _files(made.directory) == before


def test_preparing_again_replaces_the_split_and_keeps_the_others(audio, tmp_path):
    _prepare(audio, tmp_path / "out", shards=4)
    test = _prepare(audio, tmp_path / "out", GOOD[:2], split="test")
    made = _prepare(audio, tmp_path / "out", GOOD[:5], shards=2, overwrite=True)
    assert len(load_index(made.directory, "train")) == 5
    assert load_index(made.directory, "test").digest == test.index.digest
    builder = tfds.builder_from_directory(made.directory)
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert counts == {"test": 2, "train": 5}
    assert not [name for name in _files(made.directory) if name.startswith(".")]


def test_tfds_reads_the_metadata_without_tensorflow(audio, tmp_path):
    made = _prepare(audio, tmp_path / "out", shards=3)
    info = tfds.builder_from_directory(made.directory).info
    assert (info.name, str(info.version)) == ("toy", "1.0.0")
    assert list(info.splits) == ["train"]
    assert info.splits["train"].num_examples == len(GOOD)
    assert info.splits["train"].shard_lengths == [4, 4, 4]
    assert [path.name for path in info.splits["train"].filepaths] == made.index.shards.tolist()
    assert info.features["audio"].np_dtype == np.int16
    assert "8000 Hz" in info.features["audio"].doc.desc
    assert info.features["labels"].feature.names[:2] == ["Speech", "Male speech, man speaking"]
    # TFDS's own decoder of our bytes, which is what tfds.load runs but for TensorFlow's reader.
    example = parse(prepare_clip(audio / "2.wav", "2.wav", (1,), SETTINGS).data)
    decoded = info.features["audio"].decode_example_np(example.audio)
    samples, _ = soundfile.read(audio / "2.wav", dtype="int16")
    np.testing.assert_array_equal(decoded, samples)


def test_another_sample_rate_beside_other_splits_is_refused(audio, tmp_path):
    _prepare(audio, tmp_path / "out")
    other = ClipSettings(sample_rate=16000, clip_seconds=1.0)
    with pytest.raises(UserError, match="train at 8000 Hz"):
        _prepare(audio, tmp_path / "out", split="test", settings=other)
    _prepare(audio, tmp_path / "out", settings=other, overwrite=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "my-sounds"),
        ("version", "1"),
        ("version", "١.٠.٠"),
        ("split", "train-1"),
        ("split", "all"),
    ],
)
def test_names_that_tfds_cannot_read_are_refused(audio, tmp_path, field, value):
    with pytest.raises(UserError, match=f'--{field} cannot be "{value}"'):
        _prepare(audio, tmp_path / "out", **{field: value})


def test_missing_or_damaged_metadata_is_said(audio, tmp_path):
    directory = _prepare(audio, tmp_path / "out").directory
    (directory / "metadata.json").write_text(json.dumps({"sample_rate": 8000, "encoding": "opus"}))
    with pytest.raises(UserError, match="expected pcm_s16le"):
        read_sample_rate(directory)
    (directory / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_sample_rate(directory)
    for rate in (0, -5, 10**30, True, "8000", None, 8000.5):
        (directory / "metadata.json").write_text(
            json.dumps({"sample_rate": rate, "encoding": "pcm_s16le"})
        )
        with pytest.raises(UserError, match=r"sample_rate is .*, expected a whole number"):
            read_sample_rate(directory)
    (directory / "metadata.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="nested deeper"):
        read_sample_rate(directory)
    (directory / "metadata.json").unlink()
    with pytest.raises(UserError, match="sample rate of these records is unknown"):
        read_sample_rate(directory)


def test_flac_records_hold_the_same_samples(audio, tmp_path):
    pcm = _prepare(audio, tmp_path / "pcm")
    flac = _prepare(
        audio, tmp_path / "flac", settings=ClipSettings(8000, clip_seconds=1.0, encoding="flac")
    )
    assert read_encoding(flac.directory) == flac.index.encoding == "flac"
    index = load_index(flac.directory, "train", verify=True)
    ours, theirs = ClipReader(flac.directory, index), ClipReader(pcm.directory, pcm.index)
    for record in range(len(index)):
        np.testing.assert_array_equal(ours.read(record), theirs.read(record))
        np.testing.assert_array_equal(ours.read(record, 100, 200), theirs.read(record, 100, 200))
    with pytest.raises(
        UserError, match="already has train encoded as flac; give test a different --version"
    ):
        _prepare(audio, tmp_path / "flac", split="test")


def test_a_job_that_was_stopped_goes_on_with_the_shards_that_are_left(audio, tmp_path, monkeypatch):
    names = ["none.wav", *GOOD, "silent.wav"]
    whole = _prepare(audio, tmp_path / "whole", names, shards=4)
    made, make = [], prepare_module.prepare_clip

    def stopped(path, id, *more):
        made.append(id)
        if id == "7.wav":
            raise KeyboardInterrupt
        return make(path, id, *more)

    monkeypatch.setattr(prepare_module, "prepare_clip", stopped)
    with pytest.raises(KeyboardInterrupt):
        _prepare(audio, tmp_path / "out", names, shards=4)
    assert not [name for name in _files(tmp_path / "out" / "toy" / "1.0.0") if "tfrecord" in name]
    stopped_at = len(made)

    def counted(path, id, *more):
        made.append(id)
        return make(path, id, *more)

    monkeypatch.setattr(prepare_module, "prepare_clip", counted)
    again = _prepare(audio, tmp_path / "out", names, shards=4)
    assert made[stopped_at:] == names[7:]  # the first two blocks of four hold three and four
    assert again.index.digest == whole.index.digest
    assert again.report.read_text() == whole.report.read_text().replace("whole", "out")
    assert not [path for path in again.directory.iterdir() if path.name.startswith(".")]

    # Other settings are another job.
    del made[:]
    _prepare(audio, tmp_path / "out", names, shards=3, overwrite=True)
    assert len(made) == len(names)


def test_one_process_prepares_a_split_at_a_time(audio, tmp_path):
    unfinished = tmp_path / "toy" / "1.0.0" / ".unfinished-train"
    unfinished.mkdir(parents=True)
    hold = (
        "import sys, time; from uss_jax.disk.lock import only_one\n"
        "with only_one(sys.argv[1], 'wait'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, unfinished], stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=rf"is in use by process {other.pid} .*wait until"):
                _prepare(audio, tmp_path)
        finally:
            other.kill()
    assert len(_prepare(audio, tmp_path).index)
    assert not unfinished.exists()
