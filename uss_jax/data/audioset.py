"""AudioSet and similar collections as a TFDS data set, with the same records as `prepare`.

    tfds build uss_jax/data/audioset.py --manual_dir DIR

DIR holds `audio/` and a label file for each split: <split>_segments.csv as AudioSet publishes them,
or <split>.csv with the columns file and labels. TFDS needs TensorFlow to write TFRecords; without
it, give `--file_format=array_record` (extra `tfds`). It shuffles clips and cannot resume: for large
collections use `uss-jax prepare`, whose directories `tfds.load` reads as well.
"""

import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from uss_jax.data.conversion import ClipSettings, Skipped, prepare_clip
from uss_jax.data.labels import read_labels
from uss_jax.data.metadata import tfds_features
from uss_jax.data.tf_example import parse

SETTINGS = ClipSettings()


class AudioSet(tfds.core.GeneratorBasedBuilder):
    """Weakly labelled mono clips of at most 10 s at 32 kHz."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Google publishes the labels but no audio. Put your recordings into audio/ and, next to "
        "it, a label file for each split: <split>_segments.csv as published, or <split>.csv with "
        "the columns file and labels."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Weakly labelled audio clips.",
            features=tfds_features(SETTINGS.sample_rate, SETTINGS.encoding),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = sorted(pathlib.Path(os.fspath(dl_manager.manual_dir)).glob("*.csv"))
        if not files:
            raise FileNotFoundError(self.MANUAL_DOWNLOAD_INSTRUCTIONS)
        splits = {file.stem.removesuffix("_segments"): file for file in files}
        return {name: self._generate_examples(file, name) for name, file in splits.items()}

    def _generate_examples(
        self, labels: pathlib.Path, split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        audio = labels.parent / "audio"
        for item in read_labels(labels, audio, split).clips:
            path, about = audio / item.file, (item.segment, item.shared)
            made = prepare_clip(path, item.id, item.labels, SETTINGS, *about)
            if isinstance(made, Skipped):
                logging.warning("%s", made.reason)
                continue
            clip = parse(made.data)
            samples = np.frombuffer(clip.audio, "<i2")
            yield item.id, {"id": item.id, "audio": samples, "labels": list(clip.labels)}
