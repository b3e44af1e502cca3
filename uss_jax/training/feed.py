"""Prefetches batches to the devices."""

import collections
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from uss_jax.devices.mesh import to_devices

# Batches on the devices, or being copied, that no step has taken yet. One would do if every batch
# took equally long to read; the second covers a slow one.
BATCHES_AHEAD = 2


class DeviceFeed:
    """A thread that reads this host's batches and copies them to the devices.

    The training loop's thread neither reads nor copies: it gets batches that are on the devices. At
    most `BATCHES_AHEAD` of them are there, besides those of dispatched steps. The host holds its
    rows of one batch until they are copied, besides what `batches` itself reads ahead.

    A context manager; on exit, the thread has ended and `batches` is closed.
    """

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh):
        """Starts no thread until the context is entered.

        Args:
          batches: this host's rows of each step's batch, in order; used only by the feed's thread.
          mesh: mesh of the devices.
        """
        self._batches, self._mesh = batches, mesh
        self._ready: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._error: BaseException | None = None  # raised once the ready batches are taken
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="device-feed", daemon=True)

    def __enter__(self) -> "DeviceFeed":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def get(self, timeout_seconds: float) -> dict[str, jax.Array] | None:
        """Returns the next batch, or None if it is not on the devices in time.

        Raises:
          Exception: what `batches` raised instead of this batch.
          StopIteration: there are no more batches.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._error, timeout_seconds):
                return None
            if not self._ready:
                raise self._error
            self._changed.notify_all()
            return self._ready.popleft()

    def _run(self) -> None:
        try:
            while self._has_room():
                batch = to_devices(next(self._batches), self._mesh)
                jax.block_until_ready(batch)
                with self._changed:
                    self._ready.append(batch)
                    self._changed.notify_all()
                del batch  # a step may free it while this thread waits
        except BaseException as error:  # raised again by `get`, in the loop's thread
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            close = getattr(self._batches, "close", None)
            if close is not None:
                close()

    def _has_room(self) -> bool:
        """Waits until there is room for another batch; returns False once the feed is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < BATCHES_AHEAD)
            return not self._closed
