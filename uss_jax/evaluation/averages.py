"""Averages the conditions of training recordings into one condition per class.

Letters: `d` width of the condition, `m` recordings of a label, `t` samples of a recording.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from uss_jax.audio.files import read_mono
from uss_jax.bundles.model import Model
from uss_jax.data.chosen import Chosen
from uss_jax.data.reader import ClipReader
from uss_jax.devices.batching import in_batches
from uss_jax.evaluation.clips import BATCH_SIZE, MIN_DBFS, anchors_of_clips, read_segments
from uss_jax.evaluation.items import Item
from uss_jax.evaluation.metrics import is_silent
from uss_jax.ontology import load_ontology
from uss_jax.separation.banks import Bank
from uss_jax.separation.example_vectors import remove_silence

# A class average converges with far fewer clips; AudioSet's largest classes have a million.
_CLIPS_OF_AVERAGE = 100
_SEGMENTS_AT_A_TIME = 16

Label = TypeVar("Label", int, str)
Averages = dict[str, Float[np.ndarray, " d"]]
# Conditions of the recordings of each label.
Vectors = dict[str, Float[np.ndarray, "m d"]]


def file_averages(
    model: Model, files: Mapping[str, Sequence[str | os.PathLike]], *, without_silence: bool
) -> Averages:
    """Averages the conditions of each label over its files, see `file_vectors`."""
    return averaged(file_vectors(model, files, without_silence=without_silence))


def file_vectors(
    model: Model, files: Mapping[str, Sequence[str | os.PathLike]], *, without_silence: bool
) -> Vectors:
    """Averages the conditions of each file of each label over its segments.

    As in the reference, a short last segment is repeated to full length. Silent files are skipped.
    Empty for a model whose conditions are not made of recordings.

    Args:
      model: computes the conditions.
      files: label -> its files.
      without_silence: first drop silent intervals of 0.1 s, as the reference does with whole songs
        and sentences.
    """

    def read(path: str | os.PathLike) -> Float[np.ndarray, " t"]:
        waveform = read_mono(path, model.sample_rate)
        return remove_silence(waveform, model.sample_rate) if without_silence else waveform

    return _vectors(model, {label: map(read, paths) for label, paths in files.items()})


def source_averages(model: Model, items: Sequence[Item]) -> Averages:
    """Does the same as `file_averages` with the sources of a training split's items."""
    by_label: dict[str, list[Item]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    sources = {
        label: (item.read("source", model.sample_rate) for item in same)
        for label, same in by_label.items()
    }
    return averaged(_vectors(model, sources))


def averaged(vectors: Mapping[Label, Float[np.ndarray, "m d"]]) -> dict[Label, np.ndarray]:
    """Returns the mean vector of each label."""
    return {label: of_label.mean(axis=0) for label, of_label in vectors.items()}


def _vectors(model: Model, recordings: Mapping[str, Iterable[np.ndarray]]) -> Vectors:
    if not model.query.module.takes.recordings:
        return {}
    vectors = {}
    for label, waveforms in tqdm(recordings.items(), "class averages", disable=None):
        if of_label := _vectors_of(model, waveforms):
            vectors[label] = np.stack(of_label)
    return vectors


def _vectors_of(model: Model, waveforms: Iterable[np.ndarray]) -> list[Float[np.ndarray, " d"]]:
    """Returns the mean condition of each recording that is not silent.

    A batch may hold segments of several recordings.
    """
    batch = -(-_SEGMENTS_AT_A_TIME // jax.device_count()) * jax.device_count()
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    length = model.segment_samples
    segments = (
        (number, np.resize(waveform[begin : begin + length], length))
        for number, waveform in enumerate(waveforms)
        if waveform.size and not is_silent(waveform)
        for begin in range(0, len(waveform), length)
    )
    for some, rows in in_batches(segments, batch):
        inputs = np.stack([segment for _, segment in some])
        found = np.asarray(model.condition(inputs, np.zeros(batch, np.int32)))
        for (number, _), vector in zip(some[:rows], found, strict=False):
            sums[number] = sums.get(number, 0) + vector.astype(np.float64)
            counts[number] = counts.get(number, 0) + 1
    return [(sums[number] / counts[number]).astype(np.float32) for number in sorted(sums)]


def class_vectors(
    model: Model, reader: ClipReader, classes: Sequence[int]
) -> dict[int, Float[np.ndarray, "m d"]]:
    """Computes the conditions of the mined anchors of clips of each class.

    Uses a fixed random choice of at most 100 clips per class, and no anchors below -60 dBFS.
    Classes with nothing left are omitted.
    """
    index = reader.index
    labels_of_record = np.diff(index.label_row.astype(np.int64))
    record_of_label = np.repeat(np.arange(len(index)), labels_of_record)
    records = []
    for label in classes:
        clips = record_of_label[index.label_class == label]
        keep = np.random.default_rng(label).permutation(len(clips))[:_CLIPS_OF_AVERAGE]
        records.append(clips[np.sort(keep)])
    if not sum(map(len, records)):
        return {}
    chosen = Chosen(np.concatenate(records), np.repeat(classes, [len(some) for some in records]))
    anchors = anchors_of_clips(reader, chosen, model.sed, model.segment_samples)

    conditions, loud = [], []
    for places, _ in in_batches(range(len(chosen.records)), BATCH_SIZE):
        at = np.array(places)
        segments = read_segments(reader, chosen.records[at], anchors.at(at), model.segment_samples)
        conditions.append(model.condition(segments, chosen.classes[at].astype(np.int32)))
        loud.append(np.mean(np.square(segments), axis=1) >= 10 ** (MIN_DBFS / 10))
    conditions = np.concatenate(conditions)[: len(chosen.records)]
    loud = np.concatenate(loud)[: len(chosen.records)]
    counts = {label: loud & (chosen.classes == label) for label in classes}
    return {label: conditions[rows] for label, rows in counts.items() if rows.any()}


def by_name(vectors: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces class indexes by class names as keys."""
    names = load_ontology().class_names
    return {names[label]: of_label for label, of_label in vectors.items()}


def bank_of_averages(model: Model, averages: Averages, how: str) -> Bank:
    """Returns the averages as a query bank with one vector per class name."""
    return Bank(
        name=tuple(averages),
        vectors=np.stack(list(averages.values())),
        kind=model.query.module.kind,
        net_hash=model.query_hash,
        how=how,
    )
