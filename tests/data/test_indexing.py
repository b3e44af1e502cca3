import dataclasses
import os

import numpy as np
import pytest

from tests.data.test_encodings import SAMPLES
from tests.data.toy import CLIPS, SHARDS, shard_path, toy_samples, write_shards
from uss_jax.data import shards
from uss_jax.data.indexing import build_index
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import TFRECORD, RecordWriter, scan_records
from uss_jax.errors import UserError


def test_index_points_at_the_samples(records):
    index = build_index(records, "train")
    assert index.ids.tolist() == [id for id, _, _ in CLIPS]
    assert index.samples.tolist() == [n for _, n, _ in CLIPS]
    assert index.record_shard.tolist() == [0, 0, 1, 1]
    for record, (id, n, labels) in enumerate(CLIPS):
        data = shard_path(records, index.record_shard[record]).read_bytes()
        begin, size = int(index.audio_offset[record]), int(index.audio_bytes[record])
        assert data[begin : begin + size] == toy_samples(id, n).tobytes()
        assert index.labels(record).tolist() == sorted(labels)


def _overwrite(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def _flip(data):
    data[-100] ^= 4
    return data


DAMAGE = {
    "cut": (lambda path: _overwrite(path, lambda data: data[:-7]), "is cut off"),
    "cut_header": (lambda path: _overwrite(path, lambda data: data + b"abc"), "inside its header"),
    "flipped_bit": (lambda path: _overwrite(path, _flip), "has a wrong checksum"),
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": (lambda path: path.write_text("not records at all, a letter"), "not a TFRecord frame"),
    "missing": (lambda path: path.unlink(), "number 1 is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_when_indexing_and_leaves_no_index(records, case):
    damage, said = DAMAGE[case]
    damage(shard_path(records))
    with pytest.raises(UserError, match=said) as error:
        build_index(records, "train")
    assert str(records) in str(error.value)
    assert not [path for path in records.iterdir() if "index" in path.name]


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        ((b"a", 50, [1]), "same id 'a'"),
        ((b"z", 0, [1]), "0 bytes of audio"),
        ((b"z", 9, [527]), "label 527"),
    ],
)
def test_records_that_cannot_be_used_are_named(tmp_path, clip, said):
    records = write_shards(tmp_path / "records", [SHARDS[0], [clip]])
    with pytest.raises(UserError, match=said) as error:
        build_index(records, "train")
    assert "00001-of-00002: the record at byte 0" in str(error.value)


def test_a_foreign_schema_is_said_with_shard_and_byte(records):
    with RecordWriter(shard_path(records)) as writer:
        writer.write(b"no example")
    with pytest.raises(UserError, match="00001-of-00002: the record at byte 0 is not a tf"):
        build_index(records, "train")


def _own(directory):
    directory.mkdir()
    for number in range(3):
        name = f"toy-train.tfrecord-{number:05d}-of-00003"
        with RecordWriter(directory / name) as writer:
            for at in range(3):
                writer.write(serialise(b"%d.%d" % (number, at), SAMPLES[: 10 + at], [at]))
    return directory


def test_an_index_that_was_stopped_goes_on_with_the_shards_that_are_left(tmp_path, monkeypatch):
    directory = _own(tmp_path / "own")
    last = directory / "toy-train.tfrecord-00002-of-00003"
    good = last.read_bytes()
    last.write_bytes(good[:-5])
    with pytest.raises(UserError, match="is cut off"):
        build_index(directory, "train")
    last.write_bytes(good)
    scanned = []

    def scan(path):
        scanned.append(os.path.basename(path))
        return scan_records(path)

    noting = dataclasses.replace(TFRECORD, scan=scan)
    monkeypatch.setitem(shards.CONTAINERS, "tfrecord", noting)
    index = build_index(directory, "train")
    assert scanned == [last.name]
    assert index.digest == build_index(_own(tmp_path / "other"), "train").digest
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


@pytest.mark.long
def test_any_number_of_processes_makes_the_same_index(tmp_path):
    one = build_index(_own(tmp_path / "one"), "train")
    two = build_index(_own(tmp_path / "two"), "train", workers=2)
    assert one.digest == two.digest
    np.testing.assert_array_equal(one.ids, two.ids)
