"""Reads labelled clips of records in batches of one shape, and finds their anchors.

Letters: `n` chosen clips, `m` rows of them, `s` samples of a segment.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Integer

from uss_jax.anchors.find import find_anchors
from uss_jax.bundles.model import Model, Net
from uss_jax.data.chosen import Chosen
from uss_jax.data.index import load_index
from uss_jax.data.metadata import read_sample_rate
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.errors import UserError

BATCH_SIZE = 8
# As in training, quieter segments are not chosen as anchors.
MIN_DBFS = -60.0


def open_clips(directory: str | os.PathLike, split: str, model: Model) -> tuple[ClipReader, Model]:
    """Opens the records of a split, and returns the model for their sampling rate.

    Raises:
      UserError: their sampling rate is not the model's, and its nets do not resample.
    """
    rate = read_sample_rate(directory)
    model = model.at_sample_rate(rate)
    if rate != model.sample_rate:
        raise UserError(
            f"{directory} is at {rate} Hz, {model.path} at {model.sample_rate} Hz; "
            f"prepare records with --sample-rate {model.sample_rate}"
        )
    return ClipReader(directory, load_index(directory, split)), model


def batches_of(
    reader: ClipReader, chosen: Chosen, multiple: int, labels: bool = False
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Yields the chosen clips in order as (batch, number of rows that are not padding).

    Args:
      reader: reader of the records.
      chosen: clips to read.
      multiple: clips are padded to the longest of the split, rounded up to a multiple of this
        number of samples.
      labels: whether batches also hold all labels of each clip.
    """
    longest = int(reader.index.samples.max())
    for step, batch in enumerate(
        batches(
            reader,
            chosen,
            start_step=0,
            stop_step=-(-len(chosen.records) // BATCH_SIZE),
            batch_size=BATCH_SIZE,
            clip_samples=-(-longest // multiple) * multiple,
            labels=labels,
        )
    ):
        yield batch, min(BATCH_SIZE, len(chosen.records) - step * BATCH_SIZE)


@functools.partial(jax.jit, static_argnames=("segment_samples", "min_dbfs"))
def anchors_of_batch(
    sed: Net | None,
    batch: dict[str, jax.Array],
    key: jax.Array,
    segment_samples: int,
    min_dbfs: float | None = MIN_DBFS,
) -> Any:
    """Finds the anchors of a batch as training does; random ones without a detector."""
    net = (None, None) if sed is None else (sed.module, sed.variables)
    return find_anchors(*net, batch, key, segment_samples=segment_samples, min_dbfs=min_dbfs)


@dataclasses.dataclass(frozen=True)
class MinedAnchors:
    """The anchor of each chosen clip: the segment where its class is most probable.

    Attributes:
      begin_sample: [n] first sample of the anchor in its clip.
      samples: [n] length of the anchor; shorter than a segment in short clips.
    """

    begin_sample: Integer[np.ndarray, " n"]
    samples: Integer[np.ndarray, " n"]

    def at(self, rows: Integer[np.ndarray, " m"]) -> "MinedAnchors":
        """Selects rows."""
        return MinedAnchors(self.begin_sample[rows], self.samples[rows])


def anchors_of_clips(
    reader: ClipReader,
    chosen: Chosen,
    sed: Net,
    segment_samples: int,
    *,
    min_dbfs: float | None = MIN_DBFS,
) -> MinedAnchors:
    """Finds the anchors of the chosen clips with a detector.

    Segments below `min_dbfs` are not chosen; None allows every segment.
    """
    found = []
    for batch, rows in batches_of(reader, chosen, segment_samples):
        inputs = {name: batch[name] for name in ("audio", "samples", "class_index")}
        key = jax.random.key(0)  # unused with a detector
        anchors = anchors_of_batch(sed, inputs, key, segment_samples, min_dbfs)
        found.append((anchors.begin_sample[:rows], anchors.samples[:rows]))
    begin, samples = (np.concatenate(column) for column in zip(*found, strict=True))
    return MinedAnchors(begin, samples)


def read_segments(
    reader: ClipReader, records: Integer[np.ndarray, " n"], anchors: MinedAnchors, samples: int
) -> Float[np.ndarray, "n s"]:
    """Reads the anchors as float32 in [-1, 1), zero-padded where a clip is short."""
    segments = np.zeros((len(records), samples), np.float32)
    for row, record in enumerate(records.tolist()):
        length = int(anchors.samples[row])
        begin = int(anchors.begin_sample[row])
        segments[row, :length] = reader.read(record, begin, length) / np.float32(32768)
    return segments
