"""Conditions mined beside a table of anchors."""

import contextlib
import json
import os
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.anchors.toy import LENGTH, SED, SETTINGS, padded
from tests.tiny import SEGMENT, TAGGER, tagger_variables
from uss_jax.anchors import conditions as conditions_module
from uss_jax.anchors import mine as mine_module
from uss_jax.anchors import parts as parts_module
from uss_jax.anchors.conditions import folder_of, open_conditions, vectors_of_anchors
from uss_jax.anchors.mine import Query, mine
from uss_jax.anchors.table import read_table
from uss_jax.bundles.model import Net
from uss_jax.disk.lock import InUse
from uss_jax.errors import UserError

QUERY = Query(Net(TAGGER, tagger_variables(seed=7)), "embedding")


@pytest.fixture(scope="module")
def mined(reader, tmp_path_factory):
    """A table with conditions."""
    out = tmp_path_factory.mktemp("conditions") / "anchors.npz"
    assert mine(reader, SED, out, SETTINGS, query=QUERY, batch_size=8)
    return out


def _opened(out, reader):
    table = read_table(out, reader.index, SEGMENT)
    return table, open_conditions(folder_of(out), table, reader.index)


def test_every_anchor_has_the_vector_of_its_sound(mined, reader, table):
    found, conditions = _opened(mined, reader)
    assert found.digest == table.digest  # the anchors are those of a table without conditions
    index, row = reader.index, 0
    for record in range(len(index)):
        clip = np.pad(padded(reader, record), (0, SEGMENT))
        for _ in index.labels(record):
            for anchor in range(SETTINGS.candidates):
                vector = conditions.read(np.array([row]), np.array([anchor]))[0]
                if found.score[row, anchor] < 0:
                    assert not vector.any()
                    continue
                begin = int(found.begin_sample[row, anchor])
                segment = clip[None, begin : begin + SEGMENT] / np.float32(32768)
                wanted = np.asarray(QUERY.tagger(jnp.asarray(segment))["embedding"])[0]
                np.testing.assert_allclose(vector, wanted, rtol=1e-3, atol=1e-6)
            row += 1
    assert row == len(found)
    assert np.unique(conditions.read(np.arange(row), np.zeros(row, int)), axis=0).shape[0] > 5
    # In any order, of all shards, in another process.
    rows = np.random.default_rng(0).permutation(row)
    anchors = rows % SETTINGS.candidates
    again = pickle.loads(pickle.dumps(conditions))
    np.testing.assert_array_equal(again.read(rows, anchors), conditions.read(rows, anchors))
    assert len(pickle.dumps(conditions)) < 2000


def test_labels_that_share_an_anchor_share_its_computation():
    audio = np.arange(40, dtype=np.int16).reshape(2, 20)
    batches = []

    def compute(segments):
        batches.append(segments.copy())
        return segments[:, :2].astype(np.float32)

    begin = np.array([[3, 9], [3, 0], [9, 4]], np.uint32)
    score = np.array([[0.5, 0.4], [0.2, -1], [0.1, 0.1]], np.float32)
    clips = np.array([0, 0, 1])
    vectors = vectors_of_anchors(
        compute, audio, clips, begin, score, width=2, segment_samples=5, batch_size=3
    )
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(
        vectors, [[[3, 4], [9, 10]], [[3, 4], [0, 0]], [[29, 30], [24, 25]]]
    )
    assert [len(batch) for batch in batches] == [3, 3]  # four anchors, the last repeated
    with pytest.raises(UserError, match="beyond the range of float16"):
        vectors_of_anchors(
            lambda segments: np.full((len(segments), 2), 7e4),
            *(audio, clips, begin, score),
            width=2,
            segment_samples=5,
            batch_size=3,
        )


def test_hosts_and_kills_give_the_same_conditions(mined, reader, tmp_path, monkeypatch):
    out = tmp_path / "anchors.npz"
    arguments = dict(query=QUERY, batch_size=8)
    assert not mine(reader, SED, out, SETTINGS, **arguments, host=1, hosts=2)

    def kill(name):
        def killed(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(parts_module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                mine(reader, SED, out, SETTINGS, **arguments, host=0, hosts=2)
        assert not out.exists()

    kill("move")
    monkeypatch.setattr(mine_module, "_mine_part", None)  # nothing is mined again
    kill("write_table")
    assert mine(reader, SED, out, SETTINGS, **arguments)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["anchors.conditions", "anchors.npz"]
    assert mine(reader, SED, out, SETTINGS, **arguments)
    for wanted in sorted(folder_of(mined).iterdir()):
        assert (folder_of(out) / wanted.name).read_bytes() == wanted.read_bytes()


def test_a_later_mining_is_not_read_in_the_place_of_an_earlier_one(
    mined, reader, tmp_path, monkeypatch
):
    """As by a run of more shards than it keeps open."""
    monkeypatch.setattr(conditions_module, "_SHARDS_KEPT", 1)
    out = tmp_path / "anchors.npz"
    shutil.copy(mined, out)
    shutil.copytree(folder_of(mined), folder_of(out))
    _, conditions = _opened(out, reader)
    last, none = np.array([int(conditions.first_row[-1]) - 1]), np.array([0])
    before = conditions.read(last, none)
    conditions.read(none, none)  # of the first shard: the last is closed
    np.testing.assert_array_equal(conditions.read(last, none), before)
    conditions.read(none, none)
    shutil.copytree(folder_of(out), tmp_path / "later")
    shutil.rmtree(folder_of(out))
    (tmp_path / "later").rename(folder_of(out))
    for table in (conditions, pickle.loads(pickle.dumps(conditions))):
        with pytest.raises(UserError, match=r"anchors.conditions was replaced while its vectors"):
            table.read(last, none)


@pytest.mark.parametrize("moment", ["only_one", "write_header", "_replace_folder"])
def test_a_host_that_finishes_beside_another_leaves_everything_whole(
    mined, reader, tmp_path, monkeypatch, moment
):
    out = tmp_path / "anchors.npz"
    arguments = dict(query=QUERY, batch_size=8)
    module = conditions_module if moment == "write_header" else parts_module
    real = getattr(module, moment)

    def after_the_other(*words):
        monkeypatch.setattr(module, moment, real)
        # Locks do not exclude a process from itself, as on a file system without locks.
        assert mine(reader, SED, out, SETTINGS, **arguments)
        return real(*words)

    monkeypatch.setattr(module, moment, after_the_other)
    for _ in range(2):
        assert mine(reader, SED, out, SETTINGS, **arguments)
        assert getattr(module, moment) is real  # the other has finished in that moment
    table, conditions = _opened(out, reader)
    assert table.digest == read_table(mined, reader.index, SEGMENT).digest
    conditions.require_shards(verify=True)


def test_a_host_leaves_it_to_the_one_that_writes(reader, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def held(*_):
        raise InUse("another host writes")
        yield

    monkeypatch.setattr(parts_module, "only_one", held)
    assert not mine(reader, SED, tmp_path / "a.npz", SETTINGS, query=QUERY, batch_size=8)
    assert not (tmp_path / "a.npz").exists()


def test_conditions_of_a_table_are_mined_without_the_detector(
    mined, reader, table, tmp_path, monkeypatch
):
    out = tmp_path / "anchors.npz"
    assert mine(reader, SED, out, SETTINGS, batch_size=8)
    before = out.stat()
    monkeypatch.setattr(mine_module, "mine_batch", lambda *_, **__: 1 / 0)

    def same():
        assert mine(reader, SED, out, SETTINGS, query=QUERY, batch_size=8)
        after = out.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        for wanted in sorted(folder_of(mined).iterdir()):
            assert (folder_of(out) / wanted.name).read_bytes() == wanted.read_bytes()

    same()
    # What is damaged is found, and made again.
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: np.save(path, np.load(path)[::-1]),
    ):
        damage(folder_of(out) / "00002.npy")
        same()
    (folder_of(out) / "header.json").write_text("{")
    same()
    # Another query net replaces the conditions; without one, they stay.
    other = Query(Net(TAGGER, tagger_variables(seed=8)), "clipwise")
    assert mine(reader, SED, out, SETTINGS, query=other, batch_size=8)
    _, conditions = _opened(out, reader)
    assert conditions.width == 527
    assert conditions.header["query_hash"] == other.header()["query_hash"]
    assert mine(reader, SED, out, SETTINGS, batch_size=8)
    assert _opened(out, reader)[1].header == conditions.header


def test_a_place_that_cannot_hold_conditions_is_said_before_the_work(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(mine_module, "_mine_part", None)
    for make in (lambda path: path.write_text(""), lambda path: path.symlink_to(tmp_path)):
        place = tmp_path / "anchors.conditions"
        make(place)
        with pytest.raises(UserError, match="conditions must be, but is not a folder; remove it"):
            mine(reader, SED, tmp_path / "anchors.npz", SETTINGS, query=QUERY, batch_size=8)
        place.unlink()


def test_few_files_are_open_at_a_time(mined, reader, monkeypatch):
    monkeypatch.setattr(conditions_module, "_SHARDS_KEPT", 1)
    _, conditions = _opened(mined, reader)
    rows = np.arange(int(conditions.first_row[-1]))
    whole = conditions.read(rows, np.zeros_like(rows))
    opened = len(os.listdir("/proc/self/fd"))
    for row in (*rows, *rows[::-1]):
        vector = conditions.read(np.array([row]), np.array([0]))[0]
        np.testing.assert_array_equal(vector, whole[row])
    assert len(os.listdir("/proc/self/fd")) <= opened


def test_damaged_conditions_and_those_of_other_anchors_are_refused(mined, reader, tmp_path):
    table = read_table(mined, reader.index, SEGMENT)

    def refused(change, said):
        folder = tmp_path / "anchors.conditions"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folder_of(mined), folder)
        change(folder)
        with pytest.raises(UserError, match=said):
            open_conditions(folder, table, reader.index)

    def header(**changed):
        def change(folder):
            found = json.loads((folder / "header.json").read_text())
            (folder / "header.json").write_text(json.dumps({**found, **changed}))

        return change

    def cut(folder):
        content = (folder / "00002.npy").read_bytes()
        (folder / "00002.npy").write_bytes(content[:-10])

    def resaved(array):
        return lambda folder: np.save(folder / "00000.npy", array)

    broken = read_table(mined, reader.index, SEGMENT)
    folder = tmp_path / "nan.conditions"
    shutil.copytree(folder_of(mined), folder)
    vectors = np.load(folder / "00000.npy")
    vectors[1, 0, 2] = np.nan
    np.save(folder / "00000.npy", vectors)
    nan = open_conditions(folder, broken, reader.index)
    assert np.isfinite(nan.read(np.array([0]), np.array([0]))).all()
    with pytest.raises(UserError, match="it holds NaN or infinite values; mine again"):
        nan.read(np.array([0, 1]), np.array([0, 0]))

    refused(cut, r"00002.npy cannot be read .*mine again with `uss-jax mine --query`")
    refused(
        lambda folder: (folder / "00002.npy").unlink(),
        "00002.npy is missing; copy",
    )
    refused(lambda folder: (folder / "00000.npy").write_bytes(b""), "00000.npy cannot be read")
    refused(
        resaved(np.zeros((4, 3, 6), np.float32)), "the array 'vectors' of type float32, expected f2"
    )
    refused(resaved(np.zeros((4, 2, 6), np.float16)), r"of shape \(4, 2, 6\), expected \[r k w\]")
    refused(resaved(np.array([{}], object)), "00000.npy cannot be read")
    refused(lambda folder: (folder / "header.json").unlink(), "is not a folder of mined conditions")
    refused(header(output="framewise"), "output is 'framewise', expected clipwise, embedding")
    refused(header(format_version=2), "format_version is 2")
    refused(header(width=10**9), "width is 1000000000")
    refused(header(shard_digests=["0"]), "conditions of other anchors")
    refused(header(anchors_digest="0" * 64), "conditions of other anchors")
    with pytest.raises(UserError, match="is not a folder of mined conditions"):
        open_conditions(mined, table, reader.index)


def test_a_clip_shorter_than_an_anchor_has_the_vector_of_the_padded_one(mined, reader):
    short = int(np.argmin(reader.index.samples))
    assert reader.index.samples[short] < SEGMENT < LENGTH
    row = int(reader.index.label_row[short])
    vector = _opened(mined, reader)[1].read(np.array([row]), np.array([0]))[0]
    segment = padded(reader, short)[None, :SEGMENT] / np.float32(32768)
    wanted = np.asarray(QUERY.tagger(jnp.asarray(segment))["embedding"])[0]
    np.testing.assert_allclose(vector, wanted, rtol=1e-3, atol=1e-6)
