"""TensorFlow's own readers read our records (extra `tensorflow`, in an environment of its own)."""

import hashlib
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from uss_jax.cli.main import main
from uss_jax.data.index import load_index

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is None, reason="needs tensorflow-cpu"
    ),
]

# A process of its own: TensorFlow changes how other libraries of this one open files.
PROGRAM = """
import hashlib, json, sys
import tensorflow as tf, tensorflow_datasets as tfds

folder, root, encoding = sys.argv[1:]
pcm = encoding == "pcm_s16le"

def described(id, audio, labels):
    return [id.decode(), hashlib.sha256(audio.tobytes() if pcm else audio).hexdigest(), labels]

builder = tfds.builder_from_directory(folder)
loaded = [
    described(clip["id"], clip["audio"], clip["labels"].tolist())
    for data in (builder.as_dataset(split="train"), tfds.load("toy", data_dir=root, split="train"))
    for clip in tfds.as_numpy(data)
]
features = {
    "id": tf.io.FixedLenFeature([], tf.string),
    "audio": tf.io.FixedLenFeature([], tf.string),
    "labels": tf.io.RaggedFeature(tf.int64),
}
for payload in tf.data.TFRecordDataset(sorted(tf.io.gfile.glob(folder + "/*.tfrecord-*"))):
    clip = tf.io.parse_single_example(payload, features)
    audio = clip["audio"]
    audio = (tf.io.decode_raw(audio, tf.int16) if pcm else audio).numpy()
    loaded.append(described(clip["id"].numpy(), audio, clip["labels"].numpy().tolist()))
print(json.dumps(loaded))
"""


@pytest.mark.parametrize("encoding", ["pcm_s16le", "flac"])
def test_tfds_and_tf_data_give_the_clips_that_we_read(tmp_path, encoding):
    rng = np.random.default_rng(0)
    lines = ["file,labels"]
    for number in range(5):
        name = f"{'é' * number}{number}.wav"
        soundfile.write(tmp_path / name, rng.uniform(-0.9, 0.9, 800 + number), 16000)
        lines.append(f"{name},Dog" + ";Bark" * (number % 2))
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["prepare", "--audio", str(tmp_path), "--labels", str(tmp_path / "labels.csv")]
    words += ["--out", str(tmp_path / "data"), "--name", "toy", "--version", "1.0.0"]
    words += ["--split", "train", "--sample-rate", "16000", "--shards", "2"]
    assert main([*words, "--encoding", encoding]) == 0

    folder = tmp_path / "data" / "toy" / "1.0.0"
    words = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "data"), encoding]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    index = load_index(folder, "train")
    ids = [id.decode() for id in index.ids.tolist()]
    assert sorted(id for id, _, _ in loaded) == sorted(ids * 3)
    for id, digest, labels in loaded:
        record = ids.index(id)
        assert sorted(labels) == index.labels(record).tolist()
        shard = (folder / index.shards[index.record_shard[record]]).read_bytes()
        audio = shard[int(index.audio_offset[record]) :][: int(index.audio_bytes[record])]
        assert hashlib.sha256(audio).hexdigest() == digest
