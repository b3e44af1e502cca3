"""Batches of clips or of their anchors, read ahead. The only importer of grain.

Batch n is a pure function of the order and n, for any number of hosts, workers and threads:
position n of the data is step n of the training, and there is no iterator state to save.

Letters: b clips of this host, t samples, k classes.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from uss_jax.data.reader import ClipReader
from uss_jax.data.sampling import GroupedOrder
from uss_jax.data.tfrecord import DamagedRecord
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

_FAR = 2**44


@runtime_checkable
class Order(Protocol):
    """Which record and which class stand at each position; see data/sampling.py."""

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@runtime_checkable
class Places(Protocol):
    """Where in its clip the anchor at a position begins, and its score; see anchors/table.py."""

    def place(
        self, positions: np.ndarray, records: np.ndarray, classes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]: ...


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
    workers: int = 0,
    labels: bool = False,
    places: Places | None = None,
    max_corrupt: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's part of the batches of steps start_step..stop_step - 1.

    Args:
      reader: of the records.
      order: what stands at which position; step n takes positions n * batch_size and on.
      start_step, stop_step: steps of training.
      batch_size: clips in the batch of all hosts together.
      clip_samples: shorter clips are followed by zeros, longer ones cut to their beginning; of an
        anchor, how long it is.
      host, hosts: of the batch, this host gets the block of rows number `host` of `hosts`.
      threads: how many batches are read at a time, in each process.
      workers: processes that read, where one is too slow (FLAC); 0: only this one.
      labels: also give all labels of the clips.
      places: read the anchors that begin there, not the clips.
      max_corrupt: so many damaged records are said and replaced by other clips; one more is an
        error.

    Yields:
      audio [b, t] int16, samples [b] int32 (true length, at most t), class_index [b] int32 (what
      was drawn), record [b] int32; with `places` begin_sample [b] int32 and score [b] float32; of a
      GroupedOrder conflict and absent [b] uint8 (see its draw_marked); if asked for, labels [b, k]
      uint8 of 0 and 1.
    """
    if batch_size % hosts:
        raise UserError(
            f"a batch of {batch_size} cannot be divided among {hosts} hosts; use a multiple"
        )
    if start_step >= stop_step:
        return iter(())
    rows = np.arange(host * batch_size // hosts, (host + 1) * batch_size // hosts)
    corrupt = _Corrupt(max_corrupt)

    def make_batch(step: int) -> dict[str, np.ndarray]:
        positions = step * batch_size + rows
        batch: dict[str, np.ndarray] = {}
        if isinstance(order, GroupedOrder):
            records, classes, *marks = order.draw_marked(positions)
            batch["conflict"], batch["absent"] = (mark.astype(np.uint8) for mark in marks)
        else:
            records, classes = order.draw(positions)
        audio = np.zeros((len(rows), clip_samples), np.int16)
        begin, score = _begins(places, positions, records, classes)
        samples = np.zeros(len(rows), np.int32)
        for row in range(len(rows)):
            some = slice(row, row + 1)
            for attempt in range(1, max_corrupt + 2):
                length = min(int(reader.index.samples[records[row]]) - begin[row], clip_samples)
                samples[row] = max(length, 0)
                try:
                    part = reader.read(int(records[row]), int(begin[row]), int(samples[row]))
                    break
                except DamagedRecord as error:
                    corrupt.note(int(records[row]), error)
                # A far position of the same order stands in: still a function of the position.
                far = positions[some] + attempt * _FAR
                records[some], classes[some] = order.draw(far)[:2]
                begin[some], score[some] = _begins(places, far, records[some], classes[some])
            audio[row, : samples[row]] = part
        batch |= {
            "audio": audio,
            "samples": samples,
            "class_index": classes.astype(np.int32),
            "record": records.astype(np.int32),
        }
        if places is not None:
            batch |= {"begin_sample": begin.astype(np.int32), "score": score.astype(np.float32)}
        if labels:
            batch["labels"] = _label_matrix(reader, records)
        return batch

    dataset = grain.MapDataset.range(start_step, stop_step).map(make_batch)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    dataset = dataset.to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own, ours are no absl program
            flags.FLAGS.mark_as_parsed()
        # Each takes every `workers`-th step; the steps come in order all the same.
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=threads + 1)
        dataset = dataset.mp_prefetch(options, _end_with_parent)
    return iter(dataset)


def _end_with_parent(worker: int, workers: int) -> None:
    """In a worker: a run that is killed leaves none behind, waiting for it."""
    del worker, workers
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begins(
    places: Places | None, positions: np.ndarray, records: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if places is None:
        return np.zeros(len(positions), np.int64), np.zeros(len(positions), np.float32)
    return places.place(positions, records, classes)


class _Corrupt:
    """Counts the damaged records of this process and says each once."""

    def __init__(self, limit: int):
        self._limit, self._records, self._lock = limit, set(), threading.Lock()

    def __reduce__(self) -> tuple:
        return _Corrupt, (self._limit,)  # another process counts for itself

    def note(self, record: int, error: DamagedRecord) -> None:
        """Raises the error when it is one more than allowed."""
        with self._lock:
            if record in self._records:
                return
            self._records.add(record)
            if len(self._records) > self._limit:
                if not self._limit:
                    raise error
                raise DamagedRecord(
                    f"{error} (damaged record number {len(self._records)} of this run; "
                    f"config.data.max_corrupt allows {self._limit})"
                ) from error
            print(
                f"{error}; left out, {len(self._records)} of at most {self._limit}",
                file=sys.stderr,
                flush=True,
            )


def _label_matrix(reader: ClipReader, records: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(records), len(load_ontology().class_mids)), np.uint8)
    for row, record in enumerate(records.tolist()):
        matrix[row, reader.index.labels(record)] = 1
    return matrix
