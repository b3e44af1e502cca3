"""Records in a bucket: the same clips, and only the bytes that are asked for."""

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from uss_jax.cli.main import main
from uss_jax.data.index import load_index
from uss_jax.data.indexing import build_index
from uss_jax.data.metadata import read_sample_rate, write_format
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.data.storage import open_folder, split_path
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.errors import UserError

SHARD = "toy-train.tfrecord-00000-of-00002"


class CountingStore(MemoryFileSystem):
    """Objects in memory, and how many bytes of them were given out."""

    protocol = "counted"
    store, pseudo_dirs = {}, [""]
    given = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("counted://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start, end, **kwargs)
        CountingStore.given += len(data)
        return data


fsspec.register_implementation("counted", CountingStore, clobber=True)


@pytest.fixture
def disk(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(2):
        with RecordWriter(tmp_path / SHARD.replace("00000", f"{number:05d}", 1)) as writer:
            for record in range(10):
                samples = rng.integers(-1000, 1000, 1000).astype(np.int16)
                writer.write(serialise(b"%d-%d" % (number, record), samples, [record % 4]))
    write_format(tmp_path, 16000, "pcm_s16le")
    return tmp_path


@pytest.fixture
def bucket(disk):
    CountingStore.store.clear()
    files = CountingStore()
    for path in disk.iterdir():
        files.pipe_file(f"/lab/records/{path.name}", path.read_bytes())
    return "counted://lab/records"


def test_records_of_a_bucket_give_the_batches_of_those_on_disk(disk, bucket):
    def feed(directory):
        assert read_sample_rate(directory) == 16000
        build_index(directory, "train")
        index = load_index(directory, "train", verify=True)
        order = BalancedOrder(index.label_row, index.label_class, 0)
        reader = ClipReader(directory, index)
        ends = {"start_step": 0, "stop_step": 4}
        return list(batches(reader, order, batch_size=6, clip_samples=1000, **ends)), index

    (ours, index), (theirs, remote) = feed(disk), feed(bucket)
    assert index.digest == remote.digest
    for one, other in zip(ours, theirs, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    assert not [name for name in CountingStore.store if ".shards" in name]


def test_a_part_of_a_clip_costs_its_own_bytes(bucket):
    reader = ClipReader(bucket, build_index(bucket, "train"))
    CountingStore.given = 0
    part = reader.read(13, 300, 200)
    assert CountingStore.given == part.nbytes == 400
    np.testing.assert_array_equal(part, reader.read(13)[300:500])


def test_a_batch_is_asked_for_at_once(bucket, monkeypatch):
    asked, ranges = [], CountingStore.cat_ranges
    monkeypatch.setattr(
        CountingStore, "cat_ranges", lambda *a, **k: asked.append(len(a[1])) or ranges(*a, **k)
    )
    index = build_index(bucket, "train")
    order = BalancedOrder(index.label_row, index.label_class, 0)
    reader = ClipReader(bucket, index)
    ends = {"start_step": 0, "stop_step": 3}
    list(batches(reader, order, batch_size=6, clip_samples=1000, **ends))
    assert asked == [6, 6, 6]


def test_an_object_that_vanishes_is_said_with_its_address(bucket):
    reader = ClipReader(bucket, build_index(bucket, "train"))
    reader.read(0)
    CountingStore.store.pop(f"/lab/records/{SHARD}")
    with pytest.raises(UserError, match=rf"{bucket}/{SHARD} cannot be read \(No such file"):
        reader.read(0)


def test_the_command_indexes_a_bucket(bucket, capsys):
    assert main(["index", bucket, "--workers", "1"]) == 0
    assert "20 records in 2 shards" in capsys.readouterr().out


def test_what_is_wrong_in_a_bucket_is_said_with_its_address(bucket):
    index = build_index(bucket, "train")
    CountingStore.store[f"/lab/records/{SHARD}"].truncate(100)
    with pytest.raises(UserError, match=f"{bucket}/{SHARD} has 100 bytes, it had"):
        load_index(bucket, "train")
    with pytest.raises(UserError, match=f"{bucket}/{SHARD} has 100 bytes"):
        ClipReader(bucket, index).read(0)
    with pytest.raises(UserError, match=r"counted://nowhere cannot be read \(No such file"):
        load_index("counted://nowhere", "train")
    with pytest.raises(UserError, match="fsspec package"):
        open_folder("nosuchstore://lab/records")


@pytest.mark.parametrize(
    ("path", "parts"),
    [("a", (".", "a")), ("/a", ("/", "a")), ("x/y/a", ("x/y", "a")), ("gs://b/a", ("gs://b", "a"))],
)
def test_a_path_is_its_folder_and_its_name(path, parts):
    assert split_path(path) == parts
