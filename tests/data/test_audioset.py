"""`tfds build` makes the records that `prepare` makes (extra `tfds`)."""

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

pytest.importorskip("importlib_resources")  # of the extra `tfds`
pytest.importorskip("array_record")

from uss_jax.data.audioset import AudioSet


@pytest.fixture
def manual(tmp_path):
    (tmp_path / "manual" / "audio").mkdir(parents=True)
    for name in ("a", "Yb_1_11"):
        waveform = np.random.default_rng(len(name)).uniform(-0.9, 0.9, 3200)
        soundfile.write(tmp_path / "manual" / "audio" / f"{name}.wav", waveform, 32000)
    (tmp_path / "manual" / "mine.csv").write_text("file,labels\na.wav,Dog;Bark\nmissing.wav,Dog\n")
    (tmp_path / "manual" / "balanced_train_segments.csv").write_text(
        '# YTID, start_seconds, end_seconds, positive_labels\nb, 1.000, 11.000, "/m/09x0r"\n'
    )
    return tmp_path / "manual"


@pytest.mark.filterwarnings("default")  # of TFDS's own
def test_the_builder_gives_what_the_recordings_hold(manual, tmp_path):
    builder = AudioSet(data_dir=tmp_path / "data", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert counts == {"balanced_train": 1, "mine": 1}
    (clip,) = builder.as_data_source("mine")
    samples, _ = soundfile.read(manual / "audio" / "a.wav", dtype="int16")
    assert clip["id"] == b"a.wav"
    np.testing.assert_array_equal(clip["audio"], samples)
    names = [builder.info.features["labels"].feature.int2str(int(k)) for k in clip["labels"]]
    assert sorted(names) == ["Bark", "Dog"]
