"""Batches come from the feed in order, ahead of being asked for, and it leaves nothing behind."""

import contextlib
import threading
import time

import numpy as np
import pytest

from uss_jax.devices.mesh import batch_sharded, make_mesh
from uss_jax.errors import UserError
from uss_jax.training.feed import BATCHES_AHEAD, DeviceFeed

LONG = 60.0  # seconds after which a wait for what must happen is given up


class Source:
    """Counts its batches; can be told to raise in place of one; knows whether it was closed."""

    def __init__(self, fail_at=None, error=None, end=10**9):
        self.made, self.closed = 0, False
        self.fail_at, self.error, self.end = fail_at, error, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.made == self.fail_at:
            raise self.error
        if self.made == self.end:
            raise StopIteration
        self.made += 1
        return {"x": np.full((8, 2), self.made, np.int16)}

    def close(self):
        self.closed = True


def _until(condition):
    """Waits for what another thread will make true."""
    gone = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < gone
        time.sleep(0.001)


def _feed_threads():
    return [thread for thread in threading.enumerate() if thread.name == "device-feed"]


def _numbers(feed, count):
    return [int(feed.get(LONG)["x"][0, 0]) for _ in range(count)]


def test_batches_come_in_order_on_all_devices():
    mesh = make_mesh()
    with DeviceFeed(Source(), mesh) as feed:
        batch = feed.get(LONG)
        assert batch["x"].sharding == batch_sharded(mesh)
        assert _numbers(feed, 20) == list(range(2, 22))


def test_the_next_batches_are_on_the_devices_before_they_are_asked_for():
    source = Source()
    with DeviceFeed(source, make_mesh()) as feed:
        for asked in range(3):
            # No `get` in between: the feed works by itself, and no further than it may.
            _until(lambda asked=asked: source.made == asked + BATCHES_AHEAD)
            assert feed.get(0.0) is not None
    assert source.made <= 3 + BATCHES_AHEAD


def test_a_batch_that_is_late_is_none():
    gate = threading.Event()

    def batches():
        gate.wait(LONG)
        yield {"x": np.zeros(8)}

    with DeviceFeed(batches(), make_mesh()) as feed:
        assert feed.get(0.0) is None
        assert feed.get(0.001) is None
        gate.set()
        assert feed.get(LONG) is not None


def test_an_error_comes_in_place_of_its_batch_and_not_before():
    error = UserError("a shard is gone")
    source = Source(fail_at=2, error=error)
    with DeviceFeed(source, make_mesh()) as feed:
        assert _numbers(feed, 1) == [1]
        _until(lambda: source.closed)  # the error is there, and the second batch before it
        assert _numbers(feed, 1) == [2]
        for _ in range(2):
            with pytest.raises(UserError) as raised:
                feed.get(LONG)
            assert raised.value is error


def test_the_end_is_said_after_the_last_batch():
    with DeviceFeed(Source(end=3), make_mesh()) as feed:
        assert _numbers(feed, 3) == [1, 2, 3]
        with pytest.raises(StopIteration):
            feed.get(LONG)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_feed_that_is_left_has_ended_its_thread_and_closed_its_batches(taken):
    source = Source()
    with contextlib.suppress(KeyboardInterrupt), DeviceFeed(source, make_mesh()) as feed:
        _numbers(feed, taken)
        raise KeyboardInterrupt
    assert source.closed
    assert not _feed_threads()
