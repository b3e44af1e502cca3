"""Batches of clips or anchors, read ahead. The only importer of grain.

Batch n, the batch of training step n, is a pure function of the order and n for any number of
hosts, workers and threads, so there is no iterator state to save.

Shape letters: b clips of this host, t samples, k classes, s steps, n positions.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from jaxtyping import Int16, Int32, Integer

from uss_jax.data.container import DamagedRecord
from uss_jax.data.grouping import GroupedOrder
from uss_jax.data.orders import Order
from uss_jax.data.reader import ClipReader
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

_FAR = 2**44
# Clips drawn in place of a damaged one, at least. A class whose only clip is damaged is drawn as
# often as others, so that in a small data set many draws in a row may be of that clip.
_LEAST_ATTEMPTS = 1000
_DRAWN_AT_ONCE = 256  # positions; drawing them takes a few milliseconds
_BLOCKS_KEPT = 4  # enough, as threads are at most a few steps apart
# Columns of a batch that belong to a place in the order; all others belong to the clip drawn there.
_OF_PLACE = frozenset(("conflict", "absent"))


@runtime_checkable
class Places(Protocol):
    """Maps positions to the begin samples and scores of anchors; see anchors/table.py."""

    def place(
        self, positions: np.ndarray, records: np.ndarray, classes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]: ...


@runtime_checkable
class Asks(Protocol):
    """Maps positions to what items are asked with, as columns; see training/asking.py."""

    def ask(
        self, positions: np.ndarray, records: np.ndarray, classes: np.ndarray
    ) -> dict[str, np.ndarray]: ...


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
    asks: Asks | None = None,
    around_samples: int = 0,
    max_corrupt: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns an iterator over this host's part of the batches of steps start_step..stop_step - 1.

    Args:
      reader: reads the clips.
      order: the sampling order; step n uses the `batch_size` positions from n * batch_size on.
      start_step, stop_step: range of training steps.
      batch_size: global batch size over all hosts.
      clip_samples: length of a row, in samples; clips are zero-padded or cut at the end.
      host, hosts: index of this host and number of hosts; each gets a contiguous block of rows.
      threads: batches read concurrently in each process, which holds up to `threads` + 1 batches;
        a worker holds two more in shared memory.
      workers: processes that read, for when one is too slow (FLAC); 0: this process reads.
      labels: whether to yield all labels of the clips.
      places: where the anchors to read begin; None: read clips from their beginning.
      asks: what the items are asked with; None: the step finds it.
      around_samples: with `places`, how much longer a row is than an anchor. The anchor is in the
        middle of its row, except near the ends of its clip.
      max_corrupt: damaged records to report and replace by other clips; one more is an error.

    Yields:
      audio [b, t] int16, samples [b] int32 (true length, at most t), class_index [b] int32 (the
      drawn class), record [b] int32; with `places`, begin_sample [b] int32 (of the anchor in its
      clip), anchor_sample [b] int32 (of the anchor in its row) and score [b] float32; with `asks`,
      its columns;
      for a GroupedOrder, conflict and absent [b] uint8 (see its draw_marked); with `labels`, labels
      [b, k] uint8 of 0 and 1.

    Raises:
      UserError: `batch_size` is not a multiple of `hosts`.
    """
    if batch_size % hosts:
        raise UserError(
            f"a batch of {batch_size} cannot be divided among {hosts} hosts; use a multiple"
        )
    if start_step >= stop_step:
        return iter(())
    rows = np.arange(host * batch_size // hosts, (host + 1) * batch_size // hosts)
    draws = _Draws(order, places, asks, batch_size, rows, stop_step)
    make_batch = _MakeBatch(
        reader, draws, clip_samples, around_samples, labels, _Corrupt(max_corrupt)
    )
    dataset = grain.MapDataset.range(start_step, stop_step).map(make_batch)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    dataset = dataset.to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags, which only absl programs parse
            flags.FLAGS.mark_as_parsed()
        # Each worker takes every `workers`-th step; steps are still yielded in order.
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
        dataset = dataset.mp_prefetch(options, _end_with_parent)
    return _until_closed(dataset)


def _until_closed(dataset: grain.IterDataset) -> Iterator[dict[str, np.ndarray]]:
    """Yields the elements, and ends the reading threads and processes when closed or done."""
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _end_with_parent(worker: int, workers: int) -> None:
    """Makes a worker exit when its parent process has been killed."""
    del worker, workers
    # Terminals and schedulers signal all processes; the main process handles it and ends workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """Makes the batch of a step, in any thread or process; see `batches`."""

    reader: ClipReader
    draws: "_Draws"
    clip_samples: int
    around_samples: int
    labels: bool
    corrupt: "_Corrupt"

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        positions, drawn = self.draws.of_step(step)
        audio = np.empty((len(positions), self.clip_samples), np.int16)
        samples, damaged = self._read(drawn, audio)
        attempt = 0
        while damaged:
            attempt += 1
            if attempt > max(len(self.reader.index), _LEAST_ATTEMPTS):  # nothing is left
                raise next(iter(damaged.values()))
            for row, error in damaged.items():
                self.corrupt.note(int(drawn["record"][row]), error)
            # Replaced by the clip at a distant position of the order: still a function of position.
            some = np.fromiter(damaged, np.int64)
            others = self.draws.at(positions[some] + attempt * _FAR)
            their_audio = audio[some]
            their_samples, wrong = self._read(others, their_audio)
            audio[some], samples[some] = their_audio, their_samples
            for name in drawn.keys() - _OF_PLACE:
                drawn[name][some] = others[name]
            damaged = {int(some[at]): error for at, error in wrong.items()}
        if self.labels:
            drawn["labels"] = _label_matrix(self.reader, drawn["record"])
        return {"audio": audio, "samples": samples, **drawn}

    def _read(
        self, drawn: dict[str, np.ndarray], audio: Int16[np.ndarray, "b t"]
    ) -> tuple[Int32[np.ndarray, " b"], dict[int, DamagedRecord]]:
        """Reads the drawn clips, or what is around their anchors, into `audio`.

        Adds anchor_sample to `drawn` if it has anchors.

        Returns:
          True lengths, and errors of damaged rows.
        """
        records = drawn["record"]
        length = self.reader.index.samples[records].astype(np.int64)
        begin = np.zeros_like(length)
        if "begin_sample" in drawn:
            first = drawn["begin_sample"] - self.around_samples // 2
            begin = np.clip(first, 0, np.maximum(length - audio.shape[1], 0))
            drawn["anchor_sample"] = (drawn["begin_sample"] - begin).astype(np.int32)
        samples = np.clip(length - begin, 0, audio.shape[1]).astype(np.int32)
        damaged = self.reader.read_into(audio, records.tolist(), begin.tolist(), samples.tolist())
        return samples, damaged


class _Draws:
    """Caches the draws at a host's positions, made for blocks of several steps.

    A draw makes a thousand small numpy calls that hold the GIL, and takes hardly longer for a few
    hundred positions than for 16.
    """

    def __init__(
        self,
        order: Order,
        places: Places | None,
        asks: Asks | None,
        batch_size: int,
        rows: Integer[np.ndarray, " b"],
        stop_step: int,
    ):
        """
        Args:
          order, places, asks, batch_size, stop_step: see `batches`.
          rows: this host's rows of each global batch.
        """
        self._arguments = order, places, asks, batch_size, rows, stop_step
        self._steps = max(1, _DRAWN_AT_ONCE // len(rows))
        self._blocks: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _Draws, self._arguments  # another process draws for itself

    def of_step(self, step: int) -> tuple[Integer[np.ndarray, " b"], dict[str, np.ndarray]]:
        """Returns a step's positions, and copies of the columns of its batch, see `at`."""
        number, at = divmod(step, self._steps)
        with self._lock:
            block = self._blocks.get(number)
            if block is None:
                while len(self._blocks) >= _BLOCKS_KEPT:
                    del self._blocks[min(self._blocks)]
                block = self._blocks[number] = self._block(number)
        positions = self._positions(np.array([step]))
        here = slice(at * len(positions), (at + 1) * len(positions))
        return positions, {name: column[here].copy() for name, column in block.items()}

    def _block(self, number: int) -> dict[str, np.ndarray]:
        stop_step = self._arguments[-1]
        steps = np.arange(number * self._steps, min((number + 1) * self._steps, stop_step))
        return self.at(self._positions(steps))

    def _positions(self, steps: Integer[np.ndarray, " s"]) -> Integer[np.ndarray, " n"]:
        _, _, _, batch_size, rows, _ = self._arguments
        return (steps[:, None] * batch_size + rows).ravel()

    def at(self, positions: Integer[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Returns the columns of a batch that need no reading, at any positions; see `batches`."""
        order, places, asks = self._arguments[:3]
        drawn = {}
        if isinstance(order, GroupedOrder):
            records, classes, *marks = order.draw_marked(positions)
            drawn["conflict"], drawn["absent"] = (mark.astype(np.uint8) for mark in marks)
        else:
            records, classes = order.draw(positions)
        if places is not None:
            begin, score = places.place(positions, records, classes)
            drawn |= {"begin_sample": begin.astype(np.int32), "score": score.astype(np.float32)}
        if asks is not None:
            drawn |= asks.ask(positions, records, classes)
        return drawn | {"class_index": classes.astype(np.int32), "record": records.astype(np.int32)}


class _Corrupt:
    """Counts the damaged records of this process and reports each once."""

    def __init__(self, limit: int):
        self._limit, self._records, self._lock = limit, set(), threading.Lock()

    def __reduce__(self) -> tuple:
        return _Corrupt, (self._limit,)  # another process counts for itself

    def note(self, record: int, error: DamagedRecord) -> None:
        """Reports a damaged record, or raises its error if the limit is exceeded."""
        with self._lock:
            if record in self._records:
                return
            self._records.add(record)
            if len(self._records) > self._limit:
                if not self._limit:
                    raise error
                raise DamagedRecord(
                    f"{error} (damaged record number {len(self._records)} of this process; "
                    f"config.data.max_corrupt allows {self._limit})"
                ) from error
            print(
                f"{error}; skipped, damaged record {len(self._records)} of at most {self._limit}",
                file=sys.stderr,
                flush=True,
            )


def _label_matrix(reader: ClipReader, records: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(records), len(load_ontology().class_mids)), np.uint8)
    for row, record in enumerate(records.tolist()):
        matrix[row, reader.index.labels(record)] = 1
    return matrix
