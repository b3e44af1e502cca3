"""Batches put on the devices ahead of the steps that ask for them."""

import collections
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from uss_jax.training.mesh import to_devices

# Batches on the devices, or on their way there, that no step has asked for yet. One would do if all
# took the same time to read; the second bridges what a slow one loses.
BATCHES_AHEAD = 2


class DeviceFeed:
    """A thread that fetches a host's batches and copies them to the devices.

    The loop's own thread neither reads nor copies: a batch is handed out once it is on the devices.
    At most `BATCHES_AHEAD` batches lie there, beside those of the steps dispatched. This host holds
    its rows of one until they are copied, beside what `batches` itself reads ahead.

    Used as a context manager; when it is left, the thread has ended and `batches` is closed.
    """

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh):
        """
        Args:
          batches: this host's rows of the batch of each step, in order; only the feed's thread
            touches it from now on.
          mesh: the devices.
        """
        self._batches, self._mesh = batches, mesh
        self._ready: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._error: BaseException | None = None  # that ends the batches, after those ready
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
        """Returns the next batch, or None where it is not on the devices in time.

        Raises:
          Exception: what `batches` raised in place of this batch.
          StopIteration: there are no more.
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
        except BaseException as error:  # whatever it is, the loop's thread is to raise it
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            close = getattr(self._batches, "close", None)
            if close is not None:
                close()

    def _has_room(self) -> bool:
        """Waits until another batch is wanted; False once the feed is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < BATCHES_AHEAD)
            return not self._closed
