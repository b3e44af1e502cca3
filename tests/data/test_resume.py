"""A run that is killed goes on with the batches it would have had, on any number of hosts."""

import hashlib
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from uss_jax.anchors.table import AnchorTable, Placement
from uss_jax.data.grouping import GroupedOrder
from uss_jax.data.index import load_index
from uss_jax.data.indexing import build_index
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.errors import UserError

BATCH, GROUP, SEGMENT = 32, 8, 40
ROOT = pathlib.Path(__file__).parents[2]
# What a run reads, step by step, until it is killed.
PROGRAM = """
import sys
from tests.data.test_resume import digest, feed
for batch in feed(sys.argv[1], 0, 10**9, threads=3, workers=int(sys.argv[2])):
    print(digest([batch]), flush=True)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    with RecordWriter(directory / "toy-train.tfrecord-00000-of-00001") as writer:
        for record in range(60):
            samples = rng.integers(-1000, 1000, rng.integers(20, 200)).astype(np.int16)
            labels = rng.choice(40, 2, replace=False).tolist()
            writer.write(serialise(b"%d" % record, samples, labels))
    build_index(directory, "train")
    return directory


def feed(directory, start, stop, *, host=0, hosts=1, threads=2, **arguments):
    """Everything a run can have: weights, conflict-free groups, anchors of a table with jitter."""
    index = load_index(directory, "train")
    rows = len(index.label_class)
    samples = np.repeat(index.samples, np.diff(index.label_row.astype(int)))
    latest = np.maximum(samples.astype(int) - SEGMENT, 0)
    begin = np.stack([latest // 2, latest], axis=1)
    table = AnchorTable(
        {"segment_samples": SEGMENT},
        begin.astype(np.uint32),
        np.random.default_rng(1).random((rows, 2), np.float32),
        np.zeros(rows, np.float16),
        np.zeros(rows, np.float16),
    )
    weights = np.ones(527, np.int64)
    weights[:5] = [3, 0, 2, 1, 7]
    order = GroupedOrder(
        BalancedOrder(index.label_row, index.label_class, 5, weights),
        index.label_row,
        index.label_class,
        5,
        group_size=GROUP,
        sources=2,
        conflict_free=True,
    )
    return batches(
        ClipReader(directory, index),
        order,
        start_step=start,
        stop_step=stop,
        batch_size=BATCH,
        clip_samples=SEGMENT,
        host=host,
        hosts=hosts,
        threads=threads,
        places=Placement(table, index, 5, top_k=2, jitter_samples=3),
        **arguments,
    )


def digest(parts):
    """Of a global batch, of which each host has a part."""
    sha = hashlib.sha256()
    for key in sorted(parts[0]):
        sha.update(key.encode() + np.concatenate([part[key] for part in parts]).tobytes())
    return sha.hexdigest()


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_in_the_middle_goes_on_with_the_same_batches(directory, start, workers):
    words = [sys.executable, "-c", PROGRAM, str(directory), str(workers)]
    killed = start(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    before = [killed.stdout.readline().strip() for _ in range(5)]
    killed.send_signal(signal.SIGKILL)
    before += killed.stdout.read().split()
    killed.wait()
    assert killed.returncode == -signal.SIGKILL
    before = before[:20]
    whole = [digest([batch]) for batch in feed(directory, 0, len(before) + 3)]
    assert whole[: len(before)] == before
    assert len(set(whole)) == len(whole)
    for step in (3, len(before)):
        resumed = [digest([batch]) for batch in feed(directory, step, step + 3, threads=1)]
        assert resumed == whole[step : step + 3]


@pytest.mark.parametrize("hosts", [2, 4, 16])  # 16 share a group of 8 among four
def test_any_number_of_hosts_has_the_same_global_batches(directory, hosts):
    whole = [digest([batch]) for batch in feed(directory, 7, 10)]
    parts = [feed(directory, 7, 10, host=host, hosts=hosts) for host in range(hosts)]
    assert [digest(step) for step in zip(*parts, strict=True)] == whole


def test_anchors_hold_the_samples_from_where_they_begin(directory):
    reader = ClipReader(directory, load_index(directory, "train"))
    short = 0
    for batch in feed(directory, 0, 5):
        for row, record in enumerate(batch["record"].tolist()):
            clip = reader.read(record)[batch["begin_sample"][row] :][:SEGMENT]
            assert batch["samples"][row] == len(clip)
            np.testing.assert_array_equal(
                batch["audio"][row], np.pad(clip, (0, SEGMENT - len(clip)))
            )
            short += len(clip) < SEGMENT
    assert 0 < short < 5 * BATCH


def _damage(directory, copy, records):
    """A copy of the records in which some have a wrong bit in their samples."""
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    index = load_index(copy, "train")
    shard = copy / str(index.shards[0])
    data = bytearray(shard.read_bytes())
    for record in records:
        data[int(index.audio_offset[record])] ^= 1
    shard.write_bytes(data)
    return index


def _clips(directory, index, verify_parts=False, **arguments):
    order = BalancedOrder(index.label_row, index.label_class, 5)
    arguments = {"clip_samples": 200, "batch_size": 16, "threads": 2} | arguments
    reader = ClipReader(directory, index, verify_parts)
    return list(batches(reader, order, start_step=0, stop_step=12, **arguments))


def test_damaged_records_are_said_and_others_take_their_place(directory, tmp_path, capfd):
    index = _damage(directory, tmp_path, [3, 17])
    good = _clips(directory, index)
    left_out = _clips(tmp_path, index, max_corrupt=2)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("has a wrong checksum" in line for line in said)
    assert said[1].endswith("skipped, damaged record 2 of at most 2")
    replaced = 0
    for before, after in zip(good, left_out, strict=True):
        damaged = np.isin(before["record"], [3, 17])
        replaced += damaged.sum()
        assert not np.isin(after["record"], [3, 17]).any()
        for key in before:
            np.testing.assert_array_equal(after[key][~damaged], before[key][~damaged])
    assert replaced > 1
    # Still a function of the position: of threads and hosts it knows nothing.
    halves = [_clips(tmp_path, index, max_corrupt=2, host=h, hosts=2, threads=1) for h in (0, 1)]
    for step, parts in enumerate(zip(*halves, strict=True)):
        assert digest(parts) == digest([left_out[step]])


def test_more_damaged_records_than_allowed_are_an_error(directory, tmp_path):
    index = _damage(directory, tmp_path, [3, 17])
    with pytest.raises(UserError, match=r"damaged record number 2 .*max_corrupt allows 1"):
        _clips(tmp_path, index, max_corrupt=1)
    with pytest.raises(UserError, match=r"the record at byte .* has a wrong checksum"):
        _clips(tmp_path, index)


def test_parts_are_checked_only_when_all_is_read(directory, tmp_path):
    everything = list(range(60))
    index = _damage(directory, tmp_path, everything)
    record = int(np.argmax(index.samples))
    ClipReader(tmp_path, index).read(record, 5, 10)
    with pytest.raises(UserError, match="has a wrong checksum"):
        ClipReader(tmp_path, index, verify_parts=True).read(record, 5, 10)
    good = ClipReader(directory, index)
    np.testing.assert_array_equal(
        ClipReader(directory, index, verify_parts=True).read(record, 5, 10),
        good.read(record, 5, 10),
    )
