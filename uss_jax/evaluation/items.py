"""Items to separate and score, and their batches over all devices.

Letters: `b` batch, `m` items of a batch without padding, `t` and `s` samples of an item.
"""

import collections
import concurrent.futures
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from uss_jax.devices.batching import filled, in_batches
from uss_jax.devices.mesh import batch_sharded, make_mesh, replicated
from uss_jax.errors import UserError
from uss_jax.evaluation.metrics import is_silent

# Batch rows per accelerator: 16 items of 2 s keep it busy.
_ROWS_OF_ACCELERATOR = 16
_READERS = 8

Waveforms = Float[np.ndarray, "b t"]


# Stands for all items where groups are named.
ALL = "all"


@runtime_checkable
class Item(Protocol):
    """A mixture and its target source.

    Attributes:
      name: unique name.
      label: name of its class, for tables.
      class_index: AudioSet class; None if AudioSet has no such class.
      other_class_index: class of the mixture's other source; None if unknown.
      group: group that is also summarised separately; empty for none.
      files: the audio files that it is read from.
    """

    name: str
    label: str
    class_index: int | None
    other_class_index: int | None
    group: str

    @property
    def files(self) -> tuple[pathlib.Path, ...]: ...

    def samples(self, sample_rate: int) -> int:
        """Returns the length at a sampling rate, without reading the whole file."""

    def read(self, side: str, sample_rate: int) -> Float[np.ndarray, " _"]:
        """Reads the "mixture" or the "source"; callers cut it to `samples`."""


class Batches:
    """Groups items of equal length into batches over all devices.

    All batches have the same number of rows: the last batch of a length repeats its last item.

    Attributes:
      items: all items.
      sample_rate: sampling rate at which they are read, in Hz.
      mesh: the devices.
      size: rows of a batch, over all devices.
      places: for each batch, the positions of its items in `items`, without padding.
      filled: the same, with the last position repeated up to `size`.
      samples: for each batch, the length of its items.
    """

    def __init__(
        self,
        items: Sequence[Item],
        lengths: Sequence[int],
        sample_rate: int,
        rows_of_core: int = 1,
    ):
        """Groups items by their lengths in samples, with `rows_of_core` rows per CPU device."""
        self.items = items
        self.sample_rate = sample_rate
        self.mesh = make_mesh()
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self.size = self.mesh.size * (rows_of_core if on_cpu else _ROWS_OF_ACCELERATOR)
        by_length = collections.defaultdict(list)
        for at, length in enumerate(lengths):
            by_length[length].append(at)
        self.places, self.filled, self.samples = [], [], []
        for samples, same in sorted(by_length.items()):
            for at, rows in in_batches(same, self.size):
                self.filled.append(np.array(at))
                self.places.append(np.array(at[:rows]))
                self.samples.append(samples)

    def put(self, rows: np.ndarray) -> Array:
        """Shards the rows of a batch over the devices."""
        sharding = batch_sharded(self.mesh)
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    def read(
        self, sides: Sequence[str], which: Sequence[int], what: str
    ) -> Iterator[tuple[int, list[Waveforms]]]:
        """Yields (batch number, waveforms of each side), reading ahead in threads.

        Args:
          sides: "mixture", "source" or both.
          which: batch numbers to read.
          what: label of the progress bar.
        """

        def load(number: int) -> list[Waveforms]:
            items = [self.items[at] for at in self.places[number]]
            waveforms = []
            for side in sides:
                read = [i.read(side, self.sample_rate)[: self.samples[number]] for i in items]
                waveforms.append(np.stack(filled(read, self.size)))
            return waveforms

        loaded = _ahead(load, which)
        yield from tqdm(zip(which, loaded, strict=True), what, len(which), disable=None)


def _ahead(function: Callable[[int], Any], arguments: Sequence[int]) -> Iterator[Any]:
    """Maps a function over arguments in order, computing a few results ahead in threads."""
    threads = min(_READERS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        running: collections.deque = collections.deque()
        for argument in arguments:
            running.append(pool.submit(function, argument))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def on_host(rows: Array, mesh: Mesh) -> np.ndarray:
    """Gathers rows sharded over devices onto every host."""
    if rows.is_fully_addressable:
        return np.asarray(rows)
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(mesh))(rows))


def require_sound(
    name: str, mixture: Float[np.ndarray, " t"], source: Float[np.ndarray, " t"]
) -> None:
    """Raises a UserError if a mixture is silent though its source is not."""
    if is_silent(mixture) and not is_silent(source):
        raise UserError(f"{name} is silent, but its source is not; make the pair again")


def samples_digest(waveform: Float[np.ndarray, " s"]) -> str:
    """Returns the SHA-256 of the samples as little-endian float32."""
    return hashlib.sha256(waveform.astype("<f4").tobytes()).hexdigest()
