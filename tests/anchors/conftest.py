"""Records of three shards, and the table mined from them."""

import numpy as np
import pytest

from tests.anchors.toy import SED, SETTINGS, clips_of_many_lengths
from tests.tiny import RATE, SEGMENT
from uss_jax.anchors.mine import mine
from uss_jax.anchors.table import read_table
from uss_jax.data.index import load_index
from uss_jax.data.indexing import build_index
from uss_jax.data.metadata import write_metadata
from uss_jax.data.reader import ClipReader
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """Three shards."""
    directory = tmp_path_factory.mktemp("records")
    clips = clips_of_many_lengths()
    shards = [clips[:4], clips[4:5], clips[5:]]
    for number, some in enumerate(shards):
        path = directory / f"toy-train.tfrecord-{number:05d}-of-00003"
        with RecordWriter(path) as writer:
            for id, waveform, labels in some:
                samples = np.rint(waveform * 32767).astype(np.int16)
                writer.write(serialise(id.encode(), samples, labels))
    index = build_index(directory, "train")
    write_metadata(
        directory,
        name="toy",
        version="1.0.0",
        split="train",
        shard_records=[4, 1, 5],
        shard_bytes=int(index.shard_bytes.sum()),
        sample_rate=RATE,
    )
    return directory


@pytest.fixture(scope="session")
def reader(records):
    return ClipReader(records, load_index(records, "train"))


@pytest.fixture(scope="session")
def table(reader, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "anchors.npz"
    assert mine(reader, SED, out, SETTINGS, batch_size=8)
    return read_table(out, reader.index, SEGMENT)
