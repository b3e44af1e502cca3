"""Conditions mined beside a table of anchors."""

import json
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.anchors.toy import LENGTH, SED, SETTINGS, padded
from tests.tiny import SEGMENT, TAGGER, tagger_variables
from uss_jax.anchors import mine as mine_module
from uss_jax.anchors.conditions import folder_of, open_conditions, vectors_of_anchors
from uss_jax.anchors.mine import Query, mine
from uss_jax.anchors.table import read_table
from uss_jax.bundles.model import Net
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
    assert not again._opened
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
    move = mine_module.move

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(mine_module, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        mine(reader, SED, out, SETTINGS, **arguments, host=0, hosts=2)
    assert not out.exists()
    monkeypatch.setattr(mine_module, "move", move)
    monkeypatch.setattr(mine_module, "_mine_part", None)  # nothing is mined again
    assert mine(reader, SED, out, SETTINGS, **arguments)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["anchors.conditions", "anchors.npz"]
    assert mine(reader, SED, out, SETTINGS, **arguments)
    for wanted in sorted(folder_of(mined).iterdir()):
        assert (folder_of(out) / wanted.name).read_bytes() == wanted.read_bytes()


def test_another_query_net_is_mined_again_and_replaces_the_conditions(mined, reader, tmp_path):
    out = tmp_path / "anchors.npz"
    shutil.copy(mined, out)
    shutil.copytree(folder_of(mined), folder_of(out))
    other = Query(Net(TAGGER, tagger_variables(seed=8)), "clipwise")
    assert mine(reader, SED, out, SETTINGS, query=other, batch_size=8)
    _, conditions = _opened(out, reader)
    assert conditions.width == 527
    assert conditions.header["query_hash"] == other.header()["query_hash"]
    # Without a query net, the conditions of a table stay.
    assert mine(reader, SED, out, SETTINGS, batch_size=8)
    assert _opened(out, reader)[1].header == conditions.header


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
    refused(lambda folder: (folder / "00002.npy").unlink(), "00002.npy cannot be read")
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
