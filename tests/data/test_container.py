"""Another container of records is a `Container` and a row."""

import contextlib
import struct
import zlib

import numpy as np
import pytest

from tests.data.toy import CLIPS, toy_samples
from uss_jax.data import shards
from uss_jax.data.container import Container, DamagedRecord, damage
from uss_jax.data.index import load_index
from uss_jax.data.indexing import build_index
from uss_jax.data.reader import ClipReader
from uss_jax.data.tf_example import serialise


class _Writer:
    """Four bytes of length, the payload, its crc32."""

    def __init__(self, file):
        self._file = file

    def write(self, payload):
        crc = struct.pack("<I", zlib.crc32(payload))
        self._file.write(struct.pack("<I", len(payload)) + payload + crc)


@contextlib.contextmanager
def _writer(path):
    with open(path, "wb") as file:
        yield _Writer(file)


def _scan(path):
    with open(path, "rb") as file:
        while head := file.read(4):
            begin, length = file.tell() - 4, struct.unpack("<I", head)[0]
            payload = file.read(length)
            if struct.pack("<I", zlib.crc32(payload)) != file.read(4):
                raise damage(path, begin, "has a wrong checksum")
            yield begin + 4, length, payload


def _defect(buffers):
    data = b"".join(bytes(buffer) for buffer in buffers)
    return None if struct.pack("<I", zlib.crc32(data[:-4])) == data[-4:] else "is not as written"


TOY = Container("toy", 4, 4, _scan, _defect, _writer)


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setitem(shards.CONTAINERS, "toy", TOY)
    path = tmp_path / "mine-train.toy-00000-of-00001"
    with TOY.writer(path) as writer:
        for id, samples, labels in CLIPS:
            writer.write(serialise(id, toy_samples(id, samples), labels))
    return tmp_path


def test_its_records_are_indexed_and_read(records):
    build_index(records, "train")
    index = load_index(records, "train", verify=True)
    assert index.container is TOY
    assert index.ids.tolist() == [id for id, _, _ in CLIPS]
    reader = ClipReader(records, index)
    for record, (id, samples, _) in enumerate(CLIPS):
        np.testing.assert_array_equal(reader.read(record), toy_samples(id, samples))


def test_its_damage_is_found_by_its_own_rule(records):
    build_index(records, "train")
    index = load_index(records, "train")
    shard = next(records.glob("*.toy-*"))
    data = bytearray(shard.read_bytes())
    data[int(index.audio_offset[2]) + 7] ^= 1
    shard.write_bytes(data)
    begin = int(index.record_offset[2]) - 4
    with pytest.raises(DamagedRecord, match=f"the record at byte {begin} is not as written"):
        ClipReader(records, index).read(2)


def test_a_file_of_no_container_is_no_shard(records, monkeypatch):
    monkeypatch.delitem(shards.CONTAINERS, "toy")
    assert shards.splits(records) == []
