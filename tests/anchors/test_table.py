import dataclasses
import json

import numpy as np
import pytest

from uss_jax.anchors.table import (
    FORMAT_VERSION,
    Placement,
    read_header,
    read_table,
    usable,
    without,
    write_table,
)
from uss_jax.data.index import RecordIndex
from uss_jax.errors import UserError

LABELS = [[0], [0, 3, 7], [], [5]]
ROWS = [(0, 0), (1, 0), (1, 3), (1, 7), (3, 5)]
SEGMENT = 100


def _index():
    records = len(LABELS)
    zeros = np.zeros(records, np.uint32)
    return RecordIndex(
        shards=np.array(["toy"]),
        shard_bytes=np.array([1], np.uint64),
        shard_digest=np.array(["d"]),
        record_shard=zeros,
        record_offset=zeros,
        record_bytes=zeros,
        audio_offset=zeros,
        audio_bytes=zeros,
        samples=np.array([1000, 1000, 1000, 90], np.uint32),
        ids=np.arange(records).astype("S"),
        label_row=np.cumsum([0, *map(len, LABELS)]).astype(np.uint64),
        label_class=np.array([k for labels in LABELS for k in labels], np.uint16),
    )


INDEX = _index()
HEADER = {
    "sed_hash": "s",
    "index_digest": INDEX.digest,
    "sample_rate": 1000,
    "segment_samples": SEGMENT,
    "clip_samples": 1000,
}
COLUMNS = {
    "record": np.array([record for record, _ in ROWS]),
    "class": np.array([label for _, label in ROWS]),
    "begin_sample": np.array([[10, 500], [20, 600], [30, 30], [40, 700], [0, 0]]),
    "score": np.array([[0.9, 0.3], [0.6, 0.2], [0.5, -1], [0.2, 0.1], [-1, -1]]),
    "purity": np.full(5, 0.1),
    "rms_db": np.array([-20.0, -30, -55, -20, -90]),
}


@pytest.fixture
def path(tmp_path):
    write_table(tmp_path / "anchors.npz", HEADER, COLUMNS)
    return tmp_path / "anchors.npz"


@pytest.fixture
def table(path):
    return read_table(path, INDEX, SEGMENT)


def _rows_of(table, **policy):
    rows = ROWS[:4]
    records, classes = (np.repeat(column, 500) for column in np.array(rows).T)
    begin, score = Placement(table, INDEX, 3, **policy).place(
        np.arange(len(records)), records, classes
    )
    return begin.reshape(4, 500), score.reshape(4, 500)


def test_a_table_comes_back_with_designs_types(path, table):
    with np.load(path) as stored:
        types = {name: stored[name].dtype.str[1:] for name in COLUMNS}
    assert types == {
        "record": "u4",
        "class": "u2",
        "begin_sample": "u4",
        "score": "f4",
        "purity": "f2",
        "rms_db": "f2",
    }
    assert table.header == HEADER
    np.testing.assert_array_equal(table.begin_sample, COLUMNS["begin_sample"])


def test_the_best_anchor_of_the_drawn_label_is_read(table):
    begin, score = _rows_of(table)
    np.testing.assert_array_equal(begin, np.repeat([[10], [20], [30], [40]], 500, axis=1))
    np.testing.assert_allclose(score[:, 0], [0.9, 0.6, 0.5, 0.2])


def test_runners_up_are_drawn_in_proportion_to_their_scores(table):
    begin, score = _rows_of(table, top_k=2)
    share = (begin == COLUMNS["begin_sample"][:4, :1]).mean(axis=1)
    np.testing.assert_allclose(share, [0.75, 0.75, 1, 2 / 3], atol=0.06)
    assert (score > 0).all()


def test_runners_up_below_the_least_score_are_not_drawn(table):
    begin, _ = _rows_of(table, top_k=2, min_score=0.25)
    assert set(begin[0]) == {10, 500}
    assert set(begin[1]) == {20}


def test_jitter_is_even_and_stays_inside_the_clip(table):
    begin, _ = _rows_of(table, jitter_samples=15)
    assert begin[0].min() == 0  # 10 - 15 would be before the clip
    assert set(begin[1]) == set(range(5, 36))
    placement = Placement(table, INDEX, 3, jitter_samples=15)
    short, _ = placement.place(np.arange(50), np.full(50, 3), np.full(50, 5))
    assert (short == 0).all()  # 90 samples, shorter than an anchor


def test_places_are_a_function_of_seed_and_position(table):
    place = lambda seed, at: Placement(table, INDEX, seed, top_k=2, jitter_samples=9).place(  # noqa: E731
        at, np.zeros(len(at), int), np.zeros(len(at), int)
    )[0]
    whole = place(1, np.arange(1000, 1100))
    np.testing.assert_array_equal(whole[37:38], place(1, np.array([1037])))
    assert (whole != place(2, np.arange(1000, 1100))).mean() > 0.5


def test_unlikely_and_quiet_labels_are_left_out_of_the_order(table):
    assert usable(table, min_score=0.0, min_dbfs=None).tolist() == [True] * 4 + [False]
    assert usable(table, min_score=0.3, min_dbfs=None).tolist() == [True] * 3 + [False] * 2
    keep = usable(table, min_score=0.3, min_dbfs=-50.0)
    assert keep.tolist() == [True, True, False, False, False]
    label_row, label_class = without(INDEX, keep)
    assert label_row.tolist() == [0, 1, 2, 2, 2]
    assert label_class.tolist() == [0, 0]


def test_tables_of_others_are_refused(path):
    other = dataclasses.replace(INDEX, shard_digest=np.array(["e"]))
    with pytest.raises(
        UserError, match=r"was mined from other records \(index digest .*mine again"
    ):
        read_table(path, other, SEGMENT)
    with pytest.raises(
        UserError, match=r"anchors of 100 samples, the config asks for 200; change config\.s"
    ):
        read_table(path, INDEX, 200)


def test_damage_is_said(path):
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="is not a table of anchors"):
        read_table(path, INDEX, SEGMENT)
    np.savez(path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(UserError, match="has format 2, this program reads 1"):
        read_table(path, INDEX, SEGMENT)
    write_table(path, {"sed_hash": "s"}, COLUMNS)
    with pytest.raises(UserError, match="has no key 'index_digest'"):
        read_table(path, INDEX, SEGMENT)
    write_table(path, HEADER, {name: column[:3] for name, column in COLUMNS.items()})
    with pytest.raises(UserError, match="is damaged: it has 3 rows for 5 labels"):
        read_table(path, INDEX, SEGMENT)
    with pytest.raises(UserError, match="cannot be read"):
        read_table(path.with_name("nothing.npz"), INDEX, SEGMENT)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"begin_sample": (1, 0, 901)}, "invalid begin_sample"),
        ({"begin_sample": (4, 0, 1)}, "invalid begin_sample"),
        ({"score": (0, 0, np.nan)}, "invalid score"),
        ({"score": (0, 1, 1.5)}, "invalid score"),
        ({"score": (0, 1, -0.5)}, "invalid score"),
        ({"record": (1, 2)}, "invalid record"),
        ({"class": (1, 2)}, "invalid class"),
        ({"purity": (0, np.inf)}, "invalid purity"),
        ({"rms_db": (0, np.nan)}, "invalid rms_db"),
    ],
)
def test_rows_that_cannot_be_are_refused(path, changed, said):
    columns = {name: column.copy() for name, column in COLUMNS.items()}
    for name, (*at, value) in changed.items():
        columns[name][tuple(at)] = value
    write_table(path, HEADER, columns)
    with pytest.raises(UserError, match=f"is damaged: {said}"):
        read_table(path, INDEX, SEGMENT)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"segment_samples": 0}, "segment_samples is 0"),
        ({"sample_rate": 1e300}, "sample_rate is 1e"),
        ({"index_digest": None}, "index_digest is None"),
        ({"min_dbfs": float("nan")}, "min_dbfs is nan"),
        ({"more": [[]] * 9, "deep": [[[[[[[[]]]]]]]] * 3}, None),
    ],
)
def test_headers_are_checked(path, changed, said):
    write_table(path, {**HEADER, **changed}, COLUMNS)
    if said is None:
        assert read_header(path)["index_digest"] == INDEX.digest
        return
    with pytest.raises(UserError, match=said):
        read_header(path)
    write_table(path, {**HEADER, "deep": json.loads("[" * 90 + "]" * 90)}, COLUMNS)
    with pytest.raises(UserError, match="nested deeper"):
        read_header(path)


def test_a_table_of_before_the_digest_covered_labels_is_still_read(path):
    write_table(path, {**HEADER, "index_digest": INDEX._digest_of_shards}, COLUMNS)
    assert len(read_table(path, INDEX, SEGMENT)) == 5


def test_the_digest_tells_other_anchors_apart(table):
    assert table.digest == dataclasses.replace(table).digest
    moved = dataclasses.replace(table, begin_sample=table.begin_sample + 1)
    assert moved.digest != table.digest
