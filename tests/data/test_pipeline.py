import itertools
import multiprocessing
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uss_jax.data import pipeline
from uss_jax.data.indexing import build_index
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.errors import UserError

CLIP_SAMPLES = 100


def _samples(record):
    n = [20, 100, 150, 1][record % 4]
    return np.random.default_rng(record).integers(-1000, 1000, n).astype(np.int16)


def _labels(record):
    return [record % 5, 5 + record % 3]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    for shard in range(2):
        with RecordWriter(directory / f"toy-train.tfrecord-{shard:05d}-of-00002") as writer:
            for record in range(20 * shard, 20 * shard + 20):
                writer.write(serialise(b"%d" % record, _samples(record), _labels(record)))
    build_index(directory, "train")
    return directory


def _feed(directory, start=0, stop=6, **arguments):
    index = build_index(directory, "train")
    order = BalancedOrder(index.label_row, index.label_class, seed=3)
    arguments = {"batch_size": 12, "clip_samples": CLIP_SAMPLES, "threads": 2} | arguments
    reader = ClipReader(directory, index)
    return batches(reader, order, start_step=start, stop_step=stop, **arguments)


def _batches(directory, *arguments, **options):
    return list(_feed(directory, *arguments, **options))


def _assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        for key in our:
            np.testing.assert_array_equal(our[key], their[key])


def test_batches_hold_what_the_records_hold(directory):
    for batch in _batches(directory, labels=True):
        assert {key: value.dtype.name for key, value in batch.items()} == {
            "audio": "int16",
            "samples": "int32",
            "class_index": "int32",
            "record": "int32",
            "labels": "uint8",
        }
        for row, record in enumerate(batch["record"]):
            samples = _samples(record)[:CLIP_SAMPLES]
            padded = np.pad(samples, (0, CLIP_SAMPLES - len(samples)))
            np.testing.assert_array_equal(batch["audio"][row], padded)
            assert batch["samples"][row] == len(samples)
            assert np.flatnonzero(batch["labels"][row]).tolist() == _labels(record)
            assert batch["class_index"][row] in _labels(record)


def test_batches_follow_the_order(directory):
    classes = np.concatenate([batch["class_index"] for batch in _batches(directory)])
    assert np.bincount(classes).tolist() == [9] * 8  # 72 draws, 8 classes


@pytest.mark.parametrize("threads", [1, 4, 16])
def test_any_number_of_threads_gives_the_same_batches(directory, threads):
    _assert_same(_batches(directory, threads=threads), _batches(directory))


@pytest.mark.long
@pytest.mark.parametrize(("threads", "workers"), [(1, 1), (4, 2)])
def test_workers_give_the_same_batches_and_end_with_them(directory, threads, workers):
    feed = _feed(directory, stop=30, threads=threads, workers=workers)
    _assert_same(list(itertools.islice(feed, 6)), _batches(directory))
    assert len(multiprocessing.active_children()) == workers
    feed.close()
    assert not multiprocessing.active_children()


def test_threads_end_with_the_batches(directory):
    def readers():
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    feed = _feed(directory, stop=30, threads=4)
    next(feed)
    assert readers()
    feed.close()
    for thread in readers():
        thread.join(60)  # with the batch it is at
    assert not readers()


@pytest.mark.parametrize("drawn_at_once", [1, 12, 30, 50])
def test_positions_drawn_together_are_those_drawn_alone(directory, monkeypatch, drawn_at_once):
    wanted = _batches(directory)
    monkeypatch.setattr(pipeline, "_DRAWN_AT_ONCE", drawn_at_once)
    for start in (0, 1, 5):
        _assert_same(_batches(directory, start=start, threads=4), wanted[start:])


@given(
    steps=st.lists(st.integers(0, 40), min_size=1),
    drawn_at_once=st.integers(1, 60),
    kept=st.integers(1, 4),
)
def test_steps_in_any_sequence_get_what_stands_at_their_positions(steps, drawn_at_once, kept):
    class Squares:
        def draw(self, positions):
            assert positions.max() < 41 * 9  # nothing after the last step is asked for
            return positions**2, positions + 1

    rows = np.array([3, 4, 5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_DRAWN_AT_ONCE", drawn_at_once)
        patch.setattr(pipeline, "_BLOCKS_KEPT", kept)
        draws = pipeline._Draws(Squares(), None, None, 9, rows, 41)
        for step in steps:
            positions, drawn = draws.of_step(step)
            np.testing.assert_array_equal(positions, 9 * step + rows)
            np.testing.assert_array_equal(drawn["record"], (9 * step + rows) ** 2)
            np.testing.assert_array_equal(drawn["class_index"], 9 * step + rows + 1)
            drawn["record"][:] = 0  # the caller's own


@pytest.mark.parametrize("start", [1, 5])
def test_starting_at_a_step_gives_the_same_batches_as_getting_there(directory, start):
    _assert_same(_batches(directory, start=start), _batches(directory)[start:])


def test_far_steps_are_as_near_as_the_first(directory):
    far = _batches(directory, start=10**9, stop=10**9 + 2)
    _assert_same(far[1:], _batches(directory, start=10**9 + 1, stop=10**9 + 2))


@pytest.mark.parametrize("hosts", [2, 3, 12])
def test_hosts_together_hold_the_same_batches(directory, hosts):
    parts = [_batches(directory, host=host, hosts=hosts, labels=True) for host in range(hosts)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    _assert_same(joined, _batches(directory, labels=True))


def test_no_steps_left_is_no_batch(directory):
    assert _batches(directory, start=6) == []


def test_a_batch_that_hosts_cannot_share_is_refused(directory):
    with pytest.raises(UserError, match="12 cannot be divided among 5 hosts"):
        _batches(directory, hosts=5)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_corrupt_record_is_a_sentence_with_shard_and_byte_at_its_step(
    directory, tmp_path, threads
):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = build_index(tmp_path, "train")
    record = 25  # 100 samples, read whole
    wanted = _batches(tmp_path, stop=40)
    shard = tmp_path / str(index.shards[1])
    data = bytearray(shard.read_bytes())
    data[int(index.audio_offset[record])] ^= 1
    shard.write_bytes(data)
    order = BalancedOrder(index.label_row, index.label_class, seed=3)
    first = next(step for step, batch in enumerate(wanted) if record in batch["record"])
    feed = batches(
        ClipReader(tmp_path, index),
        order,
        start_step=0,
        stop_step=40,
        batch_size=12,
        clip_samples=CLIP_SAMPLES,
        threads=threads,
    )
    _assert_same(list(itertools.islice(feed, first)), wanted[:first])
    begin = int(index.record_offset[record]) - 12
    with pytest.raises(UserError, match=f"00001-of-00002: the record at byte {begin} has a wrong"):
        next(feed)


def test_a_damaged_clip_may_be_drawn_often_before_another(tmp_path):
    """As the only clip of one class of two is: more often in a row than there are clips."""
    with RecordWriter(tmp_path / "toy-train.tfrecord-00000-of-00001") as writer:
        for record in range(2):
            writer.write(serialise(b"%d" % record, _samples(1), [record]))
    index = build_index(tmp_path, "train")
    shard = tmp_path / str(index.shards[0])
    data = bytearray(shard.read_bytes())
    data[int(index.audio_offset[0])] ^= 1
    shard.write_bytes(data)

    class Late:
        def __init__(self, attempts):
            self.attempts = attempts

        def draw(self, positions):
            record = (positions // pipeline._FAR >= self.attempts).astype(np.int64)
            return record, record

    def records(attempts):
        reader = ClipReader(tmp_path, index)
        where = {"start_step": 0, "stop_step": 1, "batch_size": 2, "clip_samples": CLIP_SAMPLES}
        (batch,) = batches(reader, Late(attempts), **where, max_corrupt=1)
        return batch["record"].tolist()

    for attempts in (1, 3, 50):
        assert records(attempts) == [1, 1]
    with pytest.raises(UserError, match="00000-of-00001: the record at byte 0 has a wrong"):
        records(np.inf)
