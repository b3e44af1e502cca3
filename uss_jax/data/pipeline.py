"""Batches of clips, read ahead by threads. The only importer of grain.

Batch n is a pure function of the order and n, for any number of hosts and threads: position n of
the data is step n of the training, and there is no iterator state to save.

Letters: b clips of this host, t samples, k classes.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from uss_jax.data.tfrecord import ClipReader
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology


@runtime_checkable
class Order(Protocol):
    """Which record and which class stand at each position; see data/sampling.py."""

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


def batches(
    reader: ClipReader,
    order: Order,
    *,
    start_step: int,
    stop_step: int,
    batch_size: int,
    clip_samples: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 2,
    labels: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's part of the batches of steps start_step..stop_step - 1.

    Args:
      reader: of the records.
      order: what stands at which position; step n takes positions n * batch_size and on.
      start_step, stop_step: steps of training.
      batch_size: clips in the batch of all hosts together.
      clip_samples: shorter clips are followed by zeros, longer ones cut to their beginning.
      host, hosts: of the batch, this host gets the block of rows number `host` of `hosts`.
      threads: how many batches are read at a time.
      labels: also give all labels of the clips.

    Yields:
      audio [b, t] int16, samples [b] int32 (true length, at most t), class_index [b] int32 (what
      was drawn), record [b] int32 and, if asked for, labels [b, k] uint8 of 0 and 1.
    """
    if batch_size % hosts:
        raise UserError(
            f"a batch of {batch_size} cannot be divided among {hosts} hosts; use a multiple"
        )
    if start_step >= stop_step:
        return iter(())
    rows = np.arange(host * batch_size // hosts, (host + 1) * batch_size // hosts)

    def make_batch(step: int) -> dict[str, np.ndarray]:
        records, classes = order.draw(step * batch_size + rows)
        audio, samples = _read_clips(reader, records, clip_samples)
        batch = {
            "audio": audio,
            "samples": samples,
            "class_index": classes.astype(np.int32),
            "record": records.astype(np.int32),
        }
        if labels:
            batch["labels"] = _label_matrix(reader, records)
        return batch

    dataset = grain.MapDataset.range(start_step, stop_step).map(make_batch)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    return iter(dataset.to_iter_dataset(ahead))


def _read_clips(
    reader: ClipReader, records: np.ndarray, clip_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    samples = np.minimum(reader.index.samples[records], clip_samples).astype(np.int32)
    audio = np.zeros((len(records), clip_samples), np.int16)
    for row, record in enumerate(records.tolist()):
        audio[row, : samples[row]] = reader.read(record, 0, int(samples[row]))
    return audio, samples


def _label_matrix(reader: ClipReader, records: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(records), len(load_ontology().class_mids)), np.uint8)
    for row, record in enumerate(records.tolist()):
        matrix[row, reader.index.labels(record)] = 1
    return matrix
