"""Toy shards, toy recordings prepared as records, and AudioSet's own labels (see NOTICE)."""

import functools
import pathlib

import numpy as np

from uss_jax.data.conversion import ClipSettings
from uss_jax.data.labels import LabelledFile
from uss_jax.data.prepare import prepare
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter

# Clips by shard: (id, samples, labels).
SHARDS = [
    [(b"a", 1000, [5, 1]), (b"b", 1, [])],
    [(b"c", 320, [526]), ("é".encode(), 2000, [0, 7, 9])],
]
CLIPS = [clip for shard in SHARDS for clip in shard]
# Recordings, as the fixture `audio` makes them, and how they are converted.
SETTINGS = ClipSettings(sample_rate=8000, clip_seconds=1.0)
GOOD = [f"{at}.wav" for at in range(10)] + ["long.flac", "stereo.wav"]


def toy_samples(id, n):
    return np.random.default_rng(list(id)).integers(-(2**15), 2**15, n).astype(np.int16)


def write_shards(directory, shards=SHARDS, split="train"):
    directory.mkdir(exist_ok=True)
    for number, clips in enumerate(shards):
        name = f"toy-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
        with RecordWriter(directory / name) as writer:
            for id, n, labels in clips:
                writer.write(serialise(id, toy_samples(id, n), labels))
    return directory


def shard_path(directory, number=1):
    return directory / f"toy-train.tfrecord-{number:05d}-of-00002"


def toy_noise(n, channels=1):
    return np.random.default_rng(n).uniform(-0.9, 0.9, (n, channels)).astype(np.float32)


def toy_lines(names):
    return [LabelledFile(name, (at, at + 1), at + 2) for at, name in enumerate(names)]


def prepare_toy(audio, out, names=GOOD, **settings):
    arguments = {"name": "toy", "version": "1.0.0", "split": "train", "settings": SETTINGS}
    return prepare(toy_lines(names), audio, out, **(arguments | settings))


def files_of(folder):
    """But for unfinished work, which is hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@functools.cache
def audioset_labels():
    """label_row and label_class of AudioSet's balanced clips (22,160 clips, 52,882 labels)."""
    with np.load(pathlib.Path(__file__).with_name("audioset_balanced_labels.npz")) as stored:
        return np.cumsum([0, *stored["labels"].tolist()]), stored["label_class"]
