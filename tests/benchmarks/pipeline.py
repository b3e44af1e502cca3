"""What the data side of a run can do on one CPU core: `python -m tests.benchmarks.pipeline`.

Records of 10-second clips are written to a temporary folder and read through the training's own
pipeline, in balanced order, as whole clips and as the 2-second anchors of a table; they stay in the
page cache, so that the disk is not measured. Then an index as large as AudioSet's is loaded (the
labels of its balanced set, 95 times), and an order made of it. Rates are by CPU time of the whole
process, which other programs do not move, and by wall time.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from uss_jax.anchors.table import AnchorTable, Placement
from uss_jax.audio.in_memory import flac_bytes
from uss_jax.data.grouping import GroupedOrder
from uss_jax.data.index import RecordIndex, load_index
from uss_jax.data.indexing import build_index
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.data.schema import Schema
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter

RATE = 32000
CLIP, SEGMENT = 10 * RATE, 2 * RATE
BATCH = 64
REPEATS, SHARDS = 95, 6500
LABELS = pathlib.Path(__file__).parents[1] / "data" / "audioset_balanced_labels.npz"


def write_clips(directory: pathlib.Path, clips: int, encoding: str = "pcm_s16le") -> RecordIndex:
    """Records of low noise with two or three labels each; as FLAC 0.55 of their size."""
    rng = np.random.default_rng(0)
    directory.mkdir(exist_ok=True)
    with RecordWriter(directory / "bench-train.tfrecord-00000-of-00001") as writer:
        for clip in range(clips):
            noise = np.cumsum(rng.standard_normal(CLIP + 2000))
            noise = noise[2000:] - noise[:-2000]  # without what is below 16 Hz
            samples = np.rint(noise * (12000 / np.abs(noise).max())).astype(np.int16)
            labels = rng.integers(0, 527, 3).tolist()
            audio = flac_bytes(samples, RATE) if encoding == "flac" else samples
            writer.write(serialise(b"%d" % clip, audio, labels))
    return build_index(directory, "train", schema=Schema(encoding=encoding, sample_rate=RATE))


def order_of(index: RecordIndex) -> GroupedOrder:
    """The published order."""
    return GroupedOrder(
        BalancedOrder(index.label_row, index.label_class, 0),
        index.label_row,
        index.label_class,
        0,
        group_size=16,
        sources=2,
        conflict_free=False,
    )


def made_up_table(index: RecordIndex) -> AnchorTable:
    """Anchors anywhere."""
    rows = len(index.label_class)
    begin = np.random.default_rng(0).integers(0, (CLIP - SEGMENT) // 320, (rows, 4)) * 320
    return AnchorTable(
        {"segment_samples": SEGMENT},
        begin.astype(np.uint32),
        np.full((rows, 4), 0.5, np.float32),
        np.zeros(rows, np.float16),
        np.zeros(rows, np.float16),
    )


def clips_per_second(
    directory: pathlib.Path, index: RecordIndex, places: Placement | None, steps: int, threads: int
) -> tuple[float, float, float]:
    """(by CPU time, by wall time, bytes read of each clip)."""
    read, preadv = [], os.preadv

    def counted(*arguments: Any) -> int:
        read.append(preadv(*arguments))
        return read[-1]

    os.preadv = counted
    try:
        feed = batches(
            ClipReader(directory, index),
            order_of(index),
            start_step=0,
            stop_step=steps + 5,
            batch_size=BATCH,
            clip_samples=CLIP if places is None else SEGMENT,
            threads=threads,
            places=places,
        )
        next(feed)
        cpu, wall = time.process_time(), time.monotonic()
        for _ in range(steps):
            next(feed)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        feed.close()
    finally:
        os.preadv = preadv
    return steps * BATCH / cpu, steps * BATCH / wall, sum(read) / len(read)


def write_large_index(directory: pathlib.Path) -> None:
    """An index of AudioSet's size, and shards of nothing that have the sizes it says."""
    with np.load(LABELS) as stored:
        counts = np.tile(stored["labels"].astype(np.int64), REPEATS)
        label_class = np.tile(stored["label_class"], REPEATS)
    records = len(counts)
    row = np.concatenate([[0], np.cumsum(counts)])
    shard = (np.arange(records) * SHARDS // records).astype(np.uint32)
    names = [f"full-train.tfrecord-{number:05d}-of-{SHARDS:05d}" for number in range(SHARDS)]
    for name in names:
        with open(directory / name, "wb") as file:
            file.truncate(200_000_000)
    zeros = np.zeros(records, np.uint32)
    ids = np.char.add(np.char.zfill(np.arange(records).astype("S11"), 11), b".wav")
    np.savez(
        directory / "index-train.npz",
        format_version=1,
        shards=np.array(names),
        shard_bytes=np.full(SHARDS, 200_000_000, np.uint64),
        shard_digest=np.array(["0" * 64] * SHARDS),
        record_shard=shard,
        record_offset=np.arange(records, dtype=np.uint64),
        record_bytes=zeros,
        audio_offset=np.arange(records, dtype=np.uint64),
        audio_bytes=zeros,
        samples=np.full(records, CLIP, np.uint32),
        ids=ids,
        label_row=row.astype(np.uint64),
        label_class=label_class,
        encoding="pcm_s16le",
    )


def peak_megabytes() -> float:
    """The most memory this process has had (getrusage would count its parent's too)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def load_large_index(directory: str) -> None:
    """Prints seconds and megabytes; in a process of its own, whose memory is counted."""
    before = peak_megabytes()
    began = time.monotonic()
    index = load_index(directory, "train")
    index.digest  # noqa: B018, the run needs it
    loaded = time.monotonic()
    order = BalancedOrder(index.label_row, index.label_class, 0)
    order.draw(np.arange(256))
    drawn = time.monotonic()
    print(
        f"index of {len(index):,} records, {len(index.label_class):,} labels, {len(index.shards)} "
        f"shards: loaded in {loaded - began:.2f} s, first batch drawn after another "
        f"{drawn - loaded:.2f} s, {peak_megabytes() - before:.0f} MB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.pipeline", description=__doc__
    )
    parser.add_argument("--clips", type=int, default=300, help="records to write, 0.64 MB each")
    parser.add_argument("--steps", type=int, default=20, help=f"batches of {BATCH} to time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--index", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.index:
        load_large_index(args.index)
        return
    os.sched_setaffinity(0, {args.core})
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        index = write_clips(directory, args.clips)
        places = Placement(made_up_table(index), index, 0, top_k=4, jitter_samples=1600)
        print(f"{'':<20}{'clips/CPU s':>12}{'clips/s':>10}{'bytes each':>12}")
        rates, sizes = [], []
        for name, where in (("whole clips", None), ("anchors of a table", places)):
            # Once to warm up.
            clips_per_second(directory, index, where, 2, args.threads)
            cpu, wall, size = clips_per_second(directory, index, where, args.steps, args.threads)
            rates.append(cpu)
            sizes.append(size)
            print(f"{name:<20}{cpu:>12.0f}{wall:>10.0f}{size:>12.0f}", flush=True)
        print(
            f"anchors: {rates[1] / rates[0]:.1f} times as many a CPU second, "
            f"{sizes[1] / sizes[0]:.3f} of the bytes"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_large_index(pathlib.Path(folder))
        words = [sys.executable, "-m", "tests.benchmarks.pipeline", "--index", folder]
        subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
