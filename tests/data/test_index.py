import dataclasses
import hashlib

import numpy as np
import pytest

from tests.data.toy import SHARDS, shard_path, write_shards
from uss_jax.data.index import load_index
from uss_jax.data.indexing import build_index
from uss_jax.errors import UserError


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
    assert build_index(write_shards(tmp_path / "again"), "train").digest == digest
    other = [SHARDS[0], [(b"c", 320, [525]), SHARDS[1][1]]]
    assert build_index(write_shards(tmp_path / "other", other), "train").digest != digest


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
    index = build_index(write_shards(tmp_path / "r"), "train")
    path = tmp_path / "r" / "index-train.npz"
    columns = {**dataclasses.asdict(index), "encoding": "flac"}
    columns["samples"] = np.full(4, 2**32 - 1, np.uint32)
    np.savez(path, format_version=1, **columns)
    with pytest.raises(UserError, match="invalid samples"):
        load_index(tmp_path / "r", "train")


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
    shard_path(records).write_bytes(shard_path(records).read_bytes() + b"x")
    with pytest.raises(UserError, match="when it was indexed"):
        load_index(records, "train")

    # The same size, other content: only a whole read can tell.
    write_shards(records, [SHARDS[0], [(b"d", 320, [526]), SHARDS[1][1]]])
    assert load_index(records, "train").digest == index.digest
    with pytest.raises(UserError, match="changed since it was indexed"):
        load_index(records, "train", verify=True)
