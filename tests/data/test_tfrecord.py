import dataclasses
import hashlib
import threading

import google_crc32c
import numpy as np
import pytest
import tensorboardX.record_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from uss_jax.audio.in_memory import flac_bytes
from uss_jax.data import storage
from uss_jax.data.index import build_index, load_index
from uss_jax.data.reader import ClipReader
from uss_jax.data.schema import Schema
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import DamagedRecord, RecordWriter, scan_records
from uss_jax.errors import UserError

# Clips by shard: (id, samples, labels).
SHARDS = [
    [(b"a", 1000, [5, 1]), (b"b", 1, [])],
    [(b"c", 320, [526]), ("é".encode(), 2000, [0, 7, 9])],
]
CLIPS = [clip for shard in SHARDS for clip in shard]


def _samples(id, n):
    return np.random.default_rng(list(id)).integers(-(2**15), 2**15, n).astype(np.int16)


def _write(directory, shards=SHARDS, split="train"):
    directory.mkdir(exist_ok=True)
    for number, clips in enumerate(shards):
        name = f"toy-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
        with RecordWriter(directory / name) as writer:
            for id, n, labels in clips:
                writer.write(serialise(id, _samples(id, n), labels))
    return directory


@pytest.fixture
def records(tmp_path):
    return _write(tmp_path / "records")


def _shard(directory, number=1):
    return directory / f"toy-train.tfrecord-{number:05d}-of-00002"


def test_checksum_of_another_writer_is_ours(tmp_path):
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of crc32c
    writer = tensorboardX.record_writer.RecordWriter(str(tmp_path / "shard"))
    writer.write(b"abc")
    writer.close()
    assert [payload for _, _, payload in scan_records(tmp_path / "shard")] == [b"abc"]


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=100), min_size=1, max_size=5))
def test_scan_gives_back_what_was_written(tmp_path_factory, payloads):
    path = tmp_path_factory.mktemp("shard") / "shard"
    with RecordWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
    data = path.read_bytes()
    scanned = list(scan_records(path))
    assert [payload for _, _, payload in scanned] == payloads
    for offset, length, payload in scanned:
        assert data[offset : offset + length] == payload


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_bit_and_any_cut_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("shard") / "shard"
    with RecordWriter(path) as writer:
        writer.write(b"first payload")
        writer.write(b"second payload")
    good = path.read_bytes()
    second = 13 + 16
    at = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(good[:at])
        if at in (0, second):  # nothing, and a whole record: the index knows the size
            return
    else:
        bad = bytearray(good)
        bad[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(bad)
    with pytest.raises(
        UserError, match=f"record at byte {second if at >= second else 0} "
    ) as error:
        list(scan_records(path))
    assert str(path) in str(error.value)


def test_index_points_at_the_samples(records):
    index = build_index(records, "train")
    assert index.ids.tolist() == [id for id, _, _ in CLIPS]
    assert index.samples.tolist() == [n for _, n, _ in CLIPS]
    assert index.record_shard.tolist() == [0, 0, 1, 1]
    for record, (id, n, labels) in enumerate(CLIPS):
        data = _shard(records, index.record_shard[record]).read_bytes()
        begin, size = int(index.audio_offset[record]), int(index.audio_bytes[record])
        assert data[begin : begin + size] == _samples(id, n).tobytes()
        assert index.labels(record).tolist() == sorted(labels)


def test_loaded_index_equals_the_built_one_with_designs_types(records):
    built, loaded = build_index(records, "train"), load_index(records, "train", verify=True)
    assert loaded.encoding == built.encoding == "pcm_s16le"
    for field in dataclasses.fields(built)[:-1]:
        ours, theirs = getattr(built, field.name), getattr(loaded, field.name)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert built.digest == loaded.digest
    types = {name: getattr(loaded, name).dtype.str[1:] for name in ("record_shard", "label_class")}
    assert types == {"record_shard": "u4", "label_class": "u2"}
    assert loaded.label_row.dtype == loaded.record_offset.dtype == np.uint64


def test_digest_tells_other_content_apart(records, tmp_path):
    digest = build_index(records, "train").digest
    assert build_index(_write(tmp_path / "again"), "train").digest == digest
    other = [SHARDS[0], [(b"c", 320, [525]), SHARDS[1][1]]]
    assert build_index(_write(tmp_path / "other", other), "train").digest != digest


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("shards", lambda x: np.array([f"{name}2" for name in x])),
        ("shard_bytes", lambda x: x + np.uint64(1)),
        ("shard_digest", lambda x: x[::-1]),
        ("record_shard", lambda x: x[::-1]),
        ("record_offset", lambda x: x + np.uint64(1)),
        ("record_bytes", lambda x: x + np.uint32(1)),
        ("audio_offset", lambda x: x + np.uint64(1)),
        ("audio_bytes", lambda x: x + np.uint32(1)),
        ("samples", lambda x: x + np.uint32(1)),
        ("ids", lambda x: x[::-1]),
        ("label_row", lambda x: np.array([0, 1, 2, 3, 6], np.uint64)),
        ("label_class", lambda x: x + np.uint16(1)),
        ("encoding", lambda x: "flac"),
    ],
)
def test_digest_covers_every_column(records, column, change):
    index = build_index(records, "train")
    other = dataclasses.replace(index, **{column: change(getattr(index, column))})
    assert other.digest != index.digest
    assert not index.has_digest(other.digest)


def test_runs_of_before_the_digest_covered_labels_are_known(records):
    index = build_index(records, "train")
    parts = list(zip(index.shards.tolist(), index.shard_digest.tolist(), strict=True))
    assert index.has_digest(hashlib.sha256(repr(parts).encode()).hexdigest())
    assert index.has_digest(index.digest)
    assert not index.has_digest("")


def _changed(column, at, value):
    def change(stored):
        stored[column] = stored[column].copy()
        stored[column][at] = value

    return change


def _of_type(column, dtype):
    return lambda stored: stored.update({column: stored[column].astype(dtype)})


TAMPERED = {
    "shard above": (
        lambda s: s["shards"].__setitem__(0, "../" + s["shards"][0][3:]),
        "invalid shards",
    ),
    "shard twice": (lambda s: s["shards"].__setitem__(0, s["shards"][1]), "a shard twice"),
    "no shard": (_changed("record_shard", 3, 2), "invalid record_shard"),
    "shards mixed": (_changed("record_shard", 0, 1), "invalid record_shard"),
    "header": (_changed("record_offset", 0, 0), "invalid record_offset"),
    "beyond": (_changed("record_offset", 3, 10**6), "invalid record_offset"),
    "far beyond": (_changed("record_offset", 3, 2**64 - 8), "invalid record_offset"),
    "long": (_changed("record_bytes", 3, 2**32 - 1), "invalid record_offset"),
    "audio before": (_changed("audio_offset", 1, 12), "invalid audio_offset"),
    "audio beyond": (_changed("audio_offset", 0, 2**64 - 1), "invalid audio_offset"),
    "audio long": (_changed("audio_bytes", 0, 2**32 - 1), "invalid audio_offset"),
    "no samples": (_changed("samples", 0, 0), "invalid samples"),
    "more samples": (_changed("samples", 0, 1001), "invalid samples"),
    "label_row first": (_changed("label_row", 0, 1), "invalid label_row"),
    "label_row down": (_changed("label_row", 1, 5), "invalid label_row"),
    "label_row last": (_changed("label_row", 4, 2**63), "invalid label_row"),
    "class": (_changed("label_class", 0, 527), "invalid label_class"),
    "labels twice": (_changed("label_class", 1, 1), "not in ascending order"),
    "encoding": (lambda s: s.update(encoding="mp3"), "invalid encoding"),
    "float offsets": (_of_type("record_offset", float), "'record_offset' of type float64"),
    "signed": (_of_type("samples", np.int32), "'samples' of type int32"),
    "objects": (_of_type("ids", object), "'ids' of type object"),
    "column gone": (lambda s: s.pop("samples"), "has no array 'samples'"),
    "short column": (lambda s: s.update(samples=s["samples"][:3]), r"shape \(3,\)"),
    "matrix": (lambda s: s.update(samples=s["samples"][None]), r"shape \(1, 4\)"),
    "version": (lambda s: s.update(format_version="1"), "'format_version' of type"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_index_is_refused_at_load(records, case):
    change, said = TAMPERED[case]
    build_index(records, "train")
    path = records / "index-train.npz"
    with np.load(path) as file:
        stored = dict(file)
    change(stored)
    np.savez(path, **stored)
    with pytest.raises(UserError, match=said) as error:
        load_index(records, "train")
    assert "index-train.npz is damaged" in str(error.value)
    assert "run `uss-jax index" in str(error.value)


def test_a_packed_sample_count_beyond_any_encoding_is_refused(tmp_path):
    index = build_index(_write(tmp_path / "r"), "train")
    path = tmp_path / "r" / "index-train.npz"
    columns = {**dataclasses.asdict(index), "encoding": "flac"}
    columns["samples"] = np.full(4, 2**32 - 1, np.uint32)
    np.savez(path, format_version=1, **columns)
    with pytest.raises(UserError, match="invalid samples"):
        load_index(tmp_path / "r", "train")


def test_reader_gives_whole_clips_and_parts(records):
    reader = ClipReader(records, build_index(records, "train"))
    for record, (id, n, _) in enumerate(CLIPS):
        expected = _samples(id, n)
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
        expected = _samples(*CLIPS[record][:2])[begin : begin + length]
        np.testing.assert_array_equal(row, np.pad(expected, (0, 1200 - length)))


def test_damaged_rows_are_told_apart(records):
    index = build_index(records, "train")
    data = bytearray(_shard(records).read_bytes())
    data[int(index.audio_offset[3]) + 100] ^= 1
    _shard(records).write_bytes(data)
    rows = np.zeros((4, 2000), np.int16)
    whole = index.samples[[3, 2, 3, 0]].astype(int)
    damaged = ClipReader(records, index).read_into(rows, [3, 2, 3, 0], [0] * 4, whole.tolist())
    assert list(damaged) == [0, 2]
    assert all("has a wrong checksum" in str(error) for error in damaged.values())
    for row, record in ((1, 2), (3, 0)):
        expected = _samples(*CLIPS[record][:2])
        np.testing.assert_array_equal(rows[row, : len(expected)], expected)


@pytest.mark.parametrize("keep", [100, 600])
def test_a_flac_file_that_cannot_be_decoded_is_damage(tmp_path, keep):
    """Its header is whole, and so is the record's checksum."""
    flac = flac_bytes(_samples(b"a", 1000), 8000)

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
            if not np.array_equal(reader.read(record), _samples(id, n)):
                wrong.append(record)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_whole_reads_check_the_checksum_and_name_shard_and_byte(records):
    index = build_index(records, "train")
    data = bytearray(_shard(records).read_bytes())
    data[int(index.audio_offset[3]) + 100] ^= 1
    _shard(records).write_bytes(data)
    reader = ClipReader(records, index)
    begin = int(index.record_offset[3]) - 12
    with pytest.raises(UserError, match=f"00001-of-00002: the record at byte {begin} has a wrong"):
        reader.read(3)
    reader.read(3, 200, 10)  # a part has no checksum of its own


def test_reads_refuse_a_shard_of_another_size(records):
    index = build_index(records, "train")
    _shard(records).write_bytes(_shard(records).read_bytes()[:-50])
    for length in (None, 10):
        with pytest.raises(UserError, match=r"bytes, it had \d+ when it was indexed"):
            ClipReader(records, index).read(3, 0, length)
    _shard(records).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        ClipReader(records, index).read(3)


def test_a_shard_cut_while_open_is_noticed(records):
    index = build_index(records, "train")
    reader = ClipReader(records, index)
    reader.read(2)
    _shard(records).write_bytes(_shard(records).read_bytes()[:-50])
    with pytest.raises(UserError, match="is cut off"):
        reader.read(3)


def test_a_record_that_holds_less_than_was_indexed_is_damage(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    with RecordWriter(records / "toy-train.tfrecord-00000-of-00001") as writer:
        writer.write(serialise(b"a", flac_bytes(_samples(b"a", 20000), 8000), [1]))
    index = build_index(records, "train", Schema(encoding="flac"))
    assert len(ClipReader(records, index).read(0)) == 20000
    longer = dataclasses.replace(index, samples=index.samples + np.uint32(5))
    with pytest.raises(DamagedRecord, match="holds audio that ends at sample 20000"):
        ClipReader(records, longer).read(0)


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
    damage(_shard(records))
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
    records = _write(tmp_path / "records", [SHARDS[0], [clip]])
    with pytest.raises(UserError, match=said) as error:
        build_index(records, "train")
    assert "00001-of-00002: the record at byte 0" in str(error.value)


def test_a_foreign_schema_is_said_with_shard_and_byte(records):
    with RecordWriter(_shard(records)) as writer:
        writer.write(b"no example")
    with pytest.raises(UserError, match="00001-of-00002: the record at byte 0 is not a tf"):
        build_index(records, "train")


def test_two_sets_of_shards_are_not_mixed(records):
    (records / "toy-train.tfrecord-00000-of-00001").write_bytes(b"")
    with pytest.raises(UserError, match="several sets of shards"):
        build_index(records, "train")


def test_missing_split_and_directory_say_what_there_is(records, tmp_path):
    with pytest.raises(UserError, match=r'no shards of split "test".*"train"'):
        load_index(records, "test")
    with pytest.raises(UserError, match=r"index-train.npz does not exist; run `uss-jax index"):
        load_index(records, "train")
    with pytest.raises(UserError, match="cannot be read"):
        load_index(tmp_path / "nowhere", "train")


def test_load_says_what_does_not_match(records):
    index = build_index(records, "train")
    path = records / "index-train.npz"
    good = path.read_bytes()

    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="is damaged"):
        load_index(records, "train")
    np.savez(path, format_version=99)
    with pytest.raises(UserError, match="has format 99, this program reads 1"):
        load_index(records, "train")

    path.write_bytes(good)
    _shard(records).write_bytes(_shard(records).read_bytes() + b"x")
    with pytest.raises(UserError, match="when it was indexed"):
        load_index(records, "train")

    # The same size, other content: only a whole read can tell.
    _write(records, [SHARDS[0], [(b"d", 320, [526]), SHARDS[1][1]]])
    assert load_index(records, "train").digest == index.digest
    with pytest.raises(UserError, match="changed since it was indexed"):
        load_index(records, "train", verify=True)
