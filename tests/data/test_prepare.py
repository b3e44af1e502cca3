import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from tests.data.toy import GOOD, SETTINGS, files_of, prepare_toy, toy_noise
from uss_jax.data import blocks
from uss_jax.data import prepare as prepare_module
from uss_jax.data.conversion import ClipSettings
from uss_jax.data.index import load_index
from uss_jax.data.labels import LabelledFile
from uss_jax.data.metadata import read_encoding, read_sample_rate
from uss_jax.data.reader import ClipReader
from uss_jax.data.tfrecord import TFRECORD
from uss_jax.errors import UserError


def test_clipped_samples_are_counted(audio, tmp_path):
    t = np.arange(8000)
    soundfile.write(audio / "loud.wav", 2 * np.sin(t), 8000, subtype="FLOAT")
    soundfile.write(audio / "full.wav", np.sin(t), 8000, subtype="FLOAT")
    made = prepare_toy(audio, tmp_path / "out", ["loud.wav", "full.wav", "3.wav"])
    ((item, share),) = made.clipped
    assert item.file == "loud.wav"
    assert share == pytest.approx(2 / 3, abs=0.01)  # |2 sin| > 1


def test_several_segments_are_cut_out_of_one_video(audio, tmp_path):
    soundfile.write(audio / "video.wav", toy_noise(20 * 8000), 8000, subtype="PCM_16")
    soundfile.write(audio / "short.wav", toy_noise(5 * 8000), 8000, subtype="PCM_16")
    segments = [
        (f"{name}.wav", span) for name in ("video", "short") for span in ((1.0, 5.0), (7.0, 12.0))
    ]
    labelled = [
        LabelledFile(file, (at,), at + 2, span, shared=True)
        for at, (file, span) in enumerate(segments)
    ]
    names = {"name": "toy", "version": "1.0.0", "split": "train"}
    made = prepare_module.prepare(labelled, audio, tmp_path, **names, settings=SETTINGS)
    assert made.index.ids.tolist() == [b"video.wav#t=1,5", b"video.wav#t=7,12"]
    whole, _ = soundfile.read(audio / "video.wav", dtype="int16")
    reader = ClipReader(made.directory, made.index)
    for clip, begin in enumerate((1, 7)):
        expected = whole[8000 * begin : 8000 * (begin + 1)]
        np.testing.assert_array_equal(reader.read(clip), expected)
    assert [why.kind for _, why in made.skipped] == ["not its segment"] * 2
    assert "short.wav lasts 5.0 s and is thus one segment" in made.skipped[0][1].reason
    assert "short_1_5" in made.skipped[0][1].reason


def test_a_name_that_is_not_utf_8_is_reported(audio, tmp_path):
    name = os.fsdecode(b"\xff\n.wav")
    soundfile.write(os.path.join(audio, "x.wav"), toy_noise(100) * 0, 8000)
    os.rename(audio / "x.wav", os.path.join(audio, name))
    made = prepare_toy(audio, tmp_path / "out", [name, "3.wav"])
    report = made.report.read_bytes()
    assert report.count(b"\xff") == 2
    assert b"silent" in report
    assert "\n" not in made.skipped[0][1].reason


def test_a_split_that_is_there_is_kept_unless_it_shall_be_replaced(audio, tmp_path):
    made = prepare_toy(audio, tmp_path / "out")
    before = files_of(made.directory)
    with pytest.raises(UserError, match=r'has a split "train" already .*--overwrite'):
        prepare_toy(audio, tmp_path / "out", GOOD[:1])
    assert files_of(made.directory) == before
    assert len(prepare_toy(audio, tmp_path / "out", GOOD[:1], overwrite=True).index) == 1


def test_a_command_stopped_after_it_published_goes_on(audio, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_metadata", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_toy(audio, tmp_path / "out")
    assert len(prepare_toy(audio, tmp_path / "out", GOOD[:1], split="test").index) == 1
    made = prepare_toy(audio, tmp_path / "out")
    assert len(load_index(made.directory, "train")) == len(GOOD)
    assert read_sample_rate(made.directory) == 8000


def test_a_command_stopped_while_it_indexes_converts_nothing_again(audio, tmp_path, monkeypatch):
    whole = prepare_toy(audio, tmp_path / "whole", GOOD[1:], shards=3)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "build_index", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_toy(audio, tmp_path / "out", GOOD[1:], shards=3)
    unfinished = tmp_path / "out/toy/1.0.0/.unfinished-train"
    # One of the names was not given yet, and a shard of an earlier start is there too.
    names = json.loads((unfinished / prepare_module._NAMES).read_text())
    last = max(names)
    (unfinished / last).rename(unfinished / names[last])
    (unfinished / "toy-train.tfrecord-00000-of-00007").write_bytes(b"of an earlier version")
    monkeypatch.setattr(blocks, "prepare_clip", None)  # nothing is converted
    made = prepare_toy(audio, f"{tmp_path}/out", GOOD[1:], shards=3)
    assert not unfinished.exists()
    for shard in made.index.shards.tolist():
        assert (made.directory / shard).read_bytes() == (whole.directory / shard).read_bytes()


def test_finished_shards_are_not_thrown_away_for_another_conversion(audio, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "build_index", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_toy(audio, tmp_path / "out", shards=3)
    with pytest.raises(UserError, match=r"has 3 shards of a conversion that was stopped, with oth"):
        prepare_toy(audio, tmp_path / "out", GOOD[:1])
    monkeypatch.setattr(blocks, "prepare_clip", lambda *_: pytest.fail("converted again"))
    assert len(prepare_toy(audio, tmp_path / "out", shards=3).index) == len(GOOD)


def test_another_conversion_begins_anew_if_told_to(audio, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "build_index", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_toy(audio, tmp_path / "out", shards=3)
    assert len(prepare_toy(audio, tmp_path / "out", GOOD[:1], overwrite=True).index) == 1


def test_clips_that_were_missing_are_there_after_a_stop(audio, tmp_path, monkeypatch):
    folder = tmp_path / "audio"
    shutil.copytree(audio, folder)
    whole = prepare_toy(folder, tmp_path / "whole", shards=4)
    absent, cut = folder / GOOD[0], folder / GOOD[-1]
    kept = {path: path.read_bytes() for path in (absent, cut)}
    absent.unlink()
    cut.write_bytes(kept[cut][:30])
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "build_index", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_toy(folder, tmp_path / "out", shards=4)
    for path, content in kept.items():
        path.write_bytes(content)
    converted = []
    convert = blocks.prepare_clip
    monkeypatch.setattr(
        blocks, "prepare_clip", lambda *words: converted.append(words[1]) or convert(*words)
    )
    # The folder may be written otherwise, as a shell completes it.
    made = prepare_toy(f"{folder}/", tmp_path / "out", shards=4)
    assert not made.skipped
    assert 0 < len(converted) <= len(GOOD) // 2 + 1  # of the two blocks with these clips
    for shard in whole.index.shards.tolist():
        assert (made.directory / shard).read_bytes() == (whole.directory / shard).read_bytes()


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_records_hold_every_clip_in_order_with_its_labels(audio, tmp_path):
    made = prepare_toy(audio, tmp_path / "out", shards=3)
    index = load_index(made.directory, "train", verify=True)
    assert [id.decode() for id in index.ids] == GOOD
    assert len(index.shards) == 3
    assert index.labels(4).tolist() == [4, 5]
    samples, _ = soundfile.read(audio / "4.wav", dtype="int16")
    np.testing.assert_array_equal(ClipReader(made.directory, index).read(4), samples)
    assert read_sample_rate(made.directory) == 8000


def test_unusable_clips_are_listed_and_the_rest_goes_on(audio, tmp_path):
    names = ["none.wav", "text.wav", *GOOD, "silent.wav"]
    made = prepare_toy(audio, tmp_path / "out", names, shards=8)
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
        prepare_toy(audio, tmp_path / "out", ["none.wav", "silent.wav"])
    assert not list((tmp_path / "out").iterdir())


def test_failure_in_the_middle_keeps_what_was_there(audio, tmp_path, monkeypatch):
    made = prepare_toy(audio, tmp_path / "out")
    before = files_of(made.directory)

    def full(path, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blocks, "WRITTEN", dataclasses.replace(TFRECORD, writer=full))
    with pytest.raises(UserError, match="no space is left to write"):
        prepare_toy(audio, tmp_path / "out", GOOD[:3], overwrite=True)
    assert files_of(made.directory) == before


def test_preparing_again_replaces_the_split_and_keeps_the_others(audio, tmp_path):
    prepare_toy(audio, tmp_path / "out", shards=4)
    test = prepare_toy(audio, tmp_path / "out", GOOD[:2], split="test")
    made = prepare_toy(audio, tmp_path / "out", GOOD[:5], shards=2, overwrite=True)
    assert len(load_index(made.directory, "train")) == 5
    assert load_index(made.directory, "test").digest == test.index.digest
    builder = tfds.builder_from_directory(made.directory)
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert counts == {"test": 2, "train": 5}
    assert not [name for name in files_of(made.directory) if name.startswith(".")]


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
        prepare_toy(audio, tmp_path / "out", **{field: value})


def test_flac_records_hold_the_same_samples(audio, tmp_path):
    pcm = prepare_toy(audio, tmp_path / "pcm")
    flac = prepare_toy(
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
        prepare_toy(audio, tmp_path / "flac", split="test")


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
                prepare_toy(audio, tmp_path)
        finally:
            other.kill()
    assert len(prepare_toy(audio, tmp_path).index)
    assert not unfinished.exists()
