import dataclasses
import threading

import numpy as np
import pytest

from tests.data.toy import CLIPS, shard_path, toy_samples
from uss_jax.audio.in_memory import flac_bytes
from uss_jax.data import storage
from uss_jax.data.container import DamagedRecord
from uss_jax.data.indexing import build_index
from uss_jax.data.reader import ClipReader
from uss_jax.data.schema import Schema
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.errors import UserError


def test_reader_gives_whole_clips_and_parts(records):
    reader = ClipReader(records, build_index(records, "train"))
    for record, (id, n, _) in enumerate(CLIPS):
        expected = toy_samples(id, n)
        np.testing.assert_array_equal(reader.read(record), expected)
        np.testing.assert_array_equal(reader.read(record, begin=n // 3), expected[n // 3 :])
        np.testing.assert_array_equal(
            reader.read(record, n // 4, n // 2), expected[n // 4 :][: n // 2]
        )
    with pytest.raises(ValueError, match="500 to 1001 are not within a clip of 1000"):
        reader.read(0, 500, 501)


def test_rows_hold_their_parts_and_then_zeros(records):
    reader = ClipReader(records, build_index(records, "train"))
    rows = np.full((len(CLIPS) + 1, 1200), 7, np.int16)
    parts = [(record, n // 3, n // 2) for record, (_, n, _) in enumerate(CLIPS)]
    parts.append((0, 0, CLIPS[0][1]))  # whole
    assert reader.read_into(rows, *zip(*parts, strict=True)) == {}
    for row, (record, begin, length) in zip(rows, parts, strict=True):
        expected = toy_samples(*CLIPS[record][:2])[begin : begin + length]
        np.testing.assert_array_equal(row, np.pad(expected, (0, 1200 - length)))


def test_damaged_rows_are_told_apart(records):
    index = build_index(records, "train")
    data = bytearray(shard_path(records).read_bytes())
    data[int(index.audio_offset[3]) + 100] ^= 1
    shard_path(records).write_bytes(data)
    rows = np.zeros((4, 2000), np.int16)
    whole = index.samples[[3, 2, 3, 0]].astype(int)
    damaged = ClipReader(records, index).read_into(rows, [3, 2, 3, 0], [0] * 4, whole.tolist())
    assert list(damaged) == [0, 2]
    assert all("has a wrong checksum" in str(error) for error in damaged.values())
    for row, record in ((1, 2), (3, 0)):
        expected = toy_samples(*CLIPS[record][:2])
        np.testing.assert_array_equal(rows[row, : len(expected)], expected)


@pytest.mark.parametrize("keep", [100, 600])
def test_a_flac_file_that_cannot_be_decoded_is_damage(tmp_path, keep):
    """Its header is whole, and so is the record's checksum."""
    flac = flac_bytes(toy_samples(b"a", 1000), 8000)

    def write(data):
        with RecordWriter(tmp_path / "toy-train.tfrecord-00000-of-00001") as writer:
            writer.write(serialise(b"a", data, [1]))

    write(flac)
    index = build_index(tmp_path, "train", Schema(encoding="flac"))
    write(flac[:keep] + bytes(len(flac) - keep))  # of the same length, and later than the index
    with pytest.raises(UserError, match=r"the record at byte 0 holds (no readable|audio that)"):
        ClipReader(tmp_path, index).read(0)
    write(flac[:keep])
    with pytest.raises(UserError, match="the record at byte 0 holds an audio file that is cut off"):
        build_index(tmp_path, "train", Schema(encoding="flac"))


def test_many_threads_read_through_few_descriptors(records, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN_FILES", 1)
    reader = ClipReader(records, build_index(records, "train"))
    wrong = []

    def read():
        for record in [0, 3, 2, 1] * 50:
            id, n, _ = CLIPS[record]
            if not np.array_equal(reader.read(record), toy_samples(id, n)):
                wrong.append(record)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_whole_reads_check_the_checksum_and_name_shard_and_byte(records):
    index = build_index(records, "train")
    data = bytearray(shard_path(records).read_bytes())
    data[int(index.audio_offset[3]) + 100] ^= 1
    shard_path(records).write_bytes(data)
    reader = ClipReader(records, index)
    begin = int(index.record_offset[3]) - 12
    with pytest.raises(UserError, match=f"00001-of-00002: the record at byte {begin} has a wrong"):
        reader.read(3)
    reader.read(3, 200, 10)  # a part has no checksum of its own


def test_reads_refuse_a_shard_of_another_size(records):
    index = build_index(records, "train")
    shard_path(records).write_bytes(shard_path(records).read_bytes()[:-50])
    for length in (None, 10):
        with pytest.raises(UserError, match=r"bytes, it had \d+ when it was indexed"):
            ClipReader(records, index).read(3, 0, length)
    shard_path(records).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        ClipReader(records, index).read(3)


def test_a_shard_cut_while_open_is_noticed(records):
    index = build_index(records, "train")
    reader = ClipReader(records, index)
    reader.read(2)
    shard_path(records).write_bytes(shard_path(records).read_bytes()[:-50])
    with pytest.raises(UserError, match="is cut off"):
        reader.read(3)


def test_a_record_that_holds_less_than_was_indexed_is_damage(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    with RecordWriter(records / "toy-train.tfrecord-00000-of-00001") as writer:
        writer.write(serialise(b"a", flac_bytes(toy_samples(b"a", 20000), 8000), [1]))
    index = build_index(records, "train", Schema(encoding="flac"))
    assert len(ClipReader(records, index).read(0)) == 20000
    longer = dataclasses.replace(index, samples=index.samples + np.uint32(5))
    with pytest.raises(DamagedRecord, match="holds audio that ends at sample 20000"):
        ClipReader(records, longer).read(0)
