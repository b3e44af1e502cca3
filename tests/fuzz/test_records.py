"""Index, anchor table, metadata, schema and records."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_encodings import SAMPLES, STORED
from tests.data.test_foreign import NAMES, _record
from tests.fuzz.damage import check_words, damaged, fuzz, json_values
from uss_jax.anchors.captions import open_captions, write_captions
from uss_jax.anchors.conditions import open_conditions, write_header, write_shard
from uss_jax.anchors.table import COLUMNS as TABLE_COLUMNS
from uss_jax.anchors.table import AnchorTable, read_table, write_table
from uss_jax.data.encodings import clipped_share, count_samples, decode
from uss_jax.data.index import COLUMNS, load_index
from uss_jax.data.indexing import build_index
from uss_jax.data.metadata import check_format, read_encoding, read_sample_rate
from uss_jax.data.reader import ClipReader
from uss_jax.data.schema import Schema, read_schema
from uss_jax.data.tf_example import guess_schema, parse, serialise
from uss_jax.data.tfrecord import RecordWriter, scan_records
from uss_jax.errors import UserError

SEGMENT = 8


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """(folder, its index, the index file's bytes, the shard's bytes)."""
    folder = tmp_path_factory.mktemp("records")
    shard = folder / "toy-train.tfrecord-00000-of-00001"
    with RecordWriter(shard) as writer:
        for at in range(3):
            writer.write(serialise(b"%d" % at, SAMPLES[: 10 + at], [at, 7]))
    index = build_index(folder, "train")
    return folder, index, (folder / "index-train.npz").read_bytes(), shard.read_bytes()


def _read_all(folder, index):
    reader = ClipReader(folder, index)
    for record in range(len(index)):
        assert len(reader.read(record)) == index.samples[record]
        reader.read(record, int(index.samples[record]) // 2, 1)
        assert (index.labels(record) < 527).all()
    reader.close()


def _try_index(folder):
    try:
        _read_all(folder, load_index(folder, "train"))
    except UserError as error:
        check_words(error)


@fuzz
@given(st.data())
def test_a_damaged_index_is_right_or_refused(records, data):
    folder, _, good, _ = records
    (folder / "index-train.npz").write_bytes(data.draw(damaged(good)))
    _try_index(folder)


@fuzz
@given(st.data())
def test_an_index_of_other_numbers_is_right_or_refused(records, data):
    folder, index, good, _ = records
    columns = {name: getattr(index, name).copy() for name in COLUMNS}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(COLUMNS)))
        column = columns[name]
        if column.dtype.kind == "u":
            at = data.draw(st.integers(0, len(column) - 1))
            most = np.iinfo(column.dtype).max
            near = (int(column[at]) + data.draw(st.integers(-3, 3))) % (most + 1)
            column[at] = data.draw(
                st.just(near) | st.integers(0, most) | st.sampled_from((0, most))
            )
        else:
            columns[name] = data.draw(
                st.sampled_from((column[:0], column[::-1], np.array(["../x"]), column[None]))
            )
    encoding = data.draw(st.sampled_from(("pcm_s16le", "flac", "float", "int64", "x")))
    np.savez(folder / "index-train.npz", format_version=1, encoding=encoding, **columns)
    _try_index(folder)
    (folder / "index-train.npz").write_bytes(good)


@fuzz
@given(st.data())
def test_a_damaged_shard_is_right_or_refused(records, data):
    folder, index, good, shard = records
    (folder / "index-train.npz").write_bytes(good)
    path = folder / "toy-train.tfrecord-00000-of-00001"
    path.write_bytes(data.draw(damaged(shard)))
    try:
        list(scan_records(path))
        _read_all(folder, index)
    except UserError as error:
        check_words(error)
    path.write_bytes(shard)


def _columns(index):
    """Columns of zeros, of a table of two anchors a label."""
    rows = len(index.label_class)
    return {
        name: np.zeros((rows, 2) if "k" in column.shape else rows, column.dtype)
        for name, column in TABLE_COLUMNS.items()
    }


@fuzz
@given(st.data())
def test_an_anchor_table_is_right_or_refused(records, data):
    folder, index, _, _ = records
    columns = _columns(index)
    columns["record"] = np.repeat(np.arange(len(index)), np.diff(index.label_row.astype(int)))
    columns["class"] = index.label_class.copy()
    header = {"sed_hash": "s", "index_digest": index.digest, "sample_rate": 8000}
    header |= {"segment_samples": SEGMENT, "clip_samples": 12}
    if data.draw(st.booleans()):
        header[data.draw(st.sampled_from(sorted(header)))] = data.draw(json_values())
    for _ in range(data.draw(st.integers(0, 2))):
        column = columns[data.draw(st.sampled_from(sorted(columns)))]
        numbers = (0, 1, 3, 65535)
        if column.dtype.kind == "f":
            numbers = (np.nan, -1.0, 0.5, 2.0, np.inf)
        column.flat[data.draw(st.integers(0, column.size - 1))] = data.draw(
            st.sampled_from(numbers)
        )
    path = folder / "anchors.npz"
    write_table(path, header, columns)
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        table = read_table(path, index, SEGMENT)
    except UserError as error:
        check_words(error)
        return
    latest = np.maximum(index.samples[columns["record"]].astype(int) - SEGMENT, 0)
    assert (table.begin_sample <= latest[:, None]).all()
    assert np.isfinite(table.score).all()


@fuzz
@given(st.data())
def test_mined_conditions_are_right_or_refused(records, data):
    folder, index, _, _ = records
    rows, table = len(index.label_class), AnchorTable.of({"sed_hash": "s"}, _columns(index))
    good = np.arange(rows * 2 * 3).reshape(rows, 2, 3).astype(np.float16)
    header = {"format_version": 1, "query_hash": "q", "query_model": {}, "output": "clipwise"}
    header |= {"width": 3, "anchors_digest": table.digest, "shard_digests": ["d"]}
    if data.draw(st.booleans()):
        header[data.draw(st.sampled_from(sorted(header)))] = data.draw(json_values())
    path = folder / "anchors.conditions"
    path.mkdir(exist_ok=True)
    write_header(path, header)
    write_shard(path, 0, good)
    if data.draw(st.booleans()):
        file = path / data.draw(st.sampled_from(("header.json", "00000.npy")))
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    try:
        conditions = open_conditions(path, table, index)
        read = conditions.read(np.arange(rows), np.ones(rows, int))
    except UserError as error:
        check_words(error)
        return
    assert read.shape == (rows, 3)
    assert np.isfinite(read).all()


METADATA = json.dumps({"sample_rate": 8000, "encoding": "flac"}).encode()
INFO = json.dumps({"splits": [{"name": "a", "shardLengths": ["1"]}], "name": "toy"}).encode()


@fuzz
@given(
    *2 * [damaged(METADATA) | damaged(INFO) | json_values().map(lambda x: json.dumps(x).encode())]
)
def test_metadata_is_right_or_refused(tmp_path_factory, ours, info):
    folder = tmp_path_factory.getbasetemp()
    (folder / "metadata.json").write_bytes(ours)
    (folder / "dataset_info.json").write_bytes(info)
    try:
        assert 1000 <= read_sample_rate(folder) <= 768_000
        assert read_encoding(folder) in STORED
        check_format(folder, "train", 8000, "flac")
    except UserError as error:
        check_words(error)


SCHEMA = json.dumps({"id": "a", "sample_rate": 32000, "label_form": "mid", "shards": "*.x"})


@fuzz
@given(damaged(SCHEMA.encode()) | json_values().map(lambda x: json.dumps(x).encode()))
def test_a_schema_is_right_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "schema.json"
    path.write_bytes(data)
    try:
        assert dataclasses.is_dataclass(Schema(**read_schema(path)))
    except UserError as error:
        check_words(error)


@fuzz
@given(st.data())
def test_a_record_is_right_or_refused(data):
    encoding = data.draw(st.sampled_from(sorted(STORED)))
    form = data.draw(st.sampled_from(sorted(NAMES)))
    payload = data.draw(damaged(_record(b"a", encoding, form)))
    given_fields = data.draw(
        st.sampled_from(({}, {"encoding": encoding}, {"label_form": form}, {"labels": "classes"}))
    )
    try:
        schema = guess_schema(payload, {"sample_rate": 8000, **given_fields})
        clip = parse(payload, schema)
        count = count_samples(clip.audio, schema.encoding, 8000)
        assert 0 <= clipped_share(clip.audio, schema.encoding) <= 1
        assert count > 0
        decode(clip.audio, schema.encoding)
        assert len(set(clip.labels)) == len(clip.labels) or schema.label_form in ("mid", "name")
    except ValueError as error:
        check_words(error)


@pytest.fixture(scope="module")
def captions(records, tmp_path_factory):
    """A folder of captions, and what it holds."""
    folder = tmp_path_factory.mktemp("captions") / "captions"
    vectors = np.arange(8, dtype=np.float32).reshape(2, 4)
    write_captions(folder, ["a", "", "b"], lambda some: vectors, 4, "minilm", records[1], int)
    return folder, vectors


@fuzz
@given(st.data())
def test_captions_are_right_or_refused(records, captions, tmp_path_factory, data):
    good, vectors = captions
    folder = tmp_path_factory.mktemp("damaged")
    which = data.draw(st.sampled_from(["header.json", "row.npy", "vectors.npy"]))
    for file in good.iterdir():
        content = file.read_bytes()
        content = data.draw(damaged(content)) if file.name == which else content
        (folder / file.name).write_bytes(content)
    try:
        there, found = open_captions(folder, records[1], "minilm").read(np.arange(3))
    except UserError as error:
        check_words(error)
        return
    assert there.tolist() == [True, False, True]
    np.testing.assert_array_equal(found, vectors)
