import json

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from tests.data.toy import GOOD, SETTINGS, prepare_toy
from uss_jax.data.conversion import ClipSettings, prepare_clip
from uss_jax.data.metadata import read_sample_rate
from uss_jax.data.tf_example import parse
from uss_jax.errors import UserError


def test_tfds_reads_the_metadata_without_tensorflow(audio, tmp_path):
    made = prepare_toy(audio, tmp_path / "out", shards=3)
    info = tfds.builder_from_directory(made.directory).info
    assert (info.name, str(info.version)) == ("toy", "1.0.0")
    assert list(info.splits) == ["train"]
    assert info.splits["train"].num_examples == len(GOOD)
    assert info.splits["train"].shard_lengths == [4, 4, 4]
    assert [path.name for path in info.splits["train"].filepaths] == made.index.shards.tolist()
    assert info.features["audio"].np_dtype == np.int16
    assert "8000 Hz" in info.features["audio"].doc.desc
    assert info.features["labels"].feature.names[:2] == ["Speech", "Male speech, man speaking"]
    # TFDS's own decoder of our bytes, which is what tfds.load runs but for TensorFlow's reader.
    example = parse(prepare_clip(audio / "2.wav", "2.wav", (1,), SETTINGS).data)
    decoded = info.features["audio"].decode_example_np(example.audio)
    samples, _ = soundfile.read(audio / "2.wav", dtype="int16")
    np.testing.assert_array_equal(decoded, samples)


def test_another_sample_rate_beside_other_splits_is_refused(audio, tmp_path):
    prepare_toy(audio, tmp_path / "out")
    other = ClipSettings(sample_rate=16000, clip_seconds=1.0)
    with pytest.raises(UserError, match="train at 8000 Hz"):
        prepare_toy(audio, tmp_path / "out", split="test", settings=other)
    prepare_toy(audio, tmp_path / "out", settings=other, overwrite=True)


def test_missing_or_damaged_metadata_is_said(audio, tmp_path):
    directory = prepare_toy(audio, tmp_path / "out").directory
    (directory / "metadata.json").write_text(json.dumps({"sample_rate": 8000, "encoding": "opus"}))
    with pytest.raises(UserError, match="expected pcm_s16le"):
        read_sample_rate(directory)
    (directory / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_sample_rate(directory)
    for rate in (0, -5, 10**30, True, "8000", None, 8000.5):
        (directory / "metadata.json").write_text(
            json.dumps({"sample_rate": rate, "encoding": "pcm_s16le"})
        )
        with pytest.raises(UserError, match=r"sample_rate is .*, expected a whole number"):
            read_sample_rate(directory)
    (directory / "metadata.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="nested deeper"):
        read_sample_rate(directory)
    (directory / "metadata.json").unlink()
    with pytest.raises(UserError, match="sample rate of these records is unknown"):
        read_sample_rate(directory)
