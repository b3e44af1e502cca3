import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uss_jax.devices import cost
from uss_jax.training import throughput
from uss_jax.training.feed import DeviceFeed
from uss_jax.training.throughput import Throughput, read_ledger


def gram(x):
    return x @ x.T


@pytest.mark.parametrize("peak", [1e9, None])
def test_utilisation_is_the_share_of_what_all_devices_can_do(tmp_path, monkeypatch, peak):
    for module in (cost, throughput):
        monkeypatch.setattr(module, "peak_flops", lambda device, way: peak)
    timed = Throughput(tmp_path, 5, 16, 1000, "float32", gram)
    x = np.ones((8, 4), np.float32)
    compiled = timed.compile(jax.jit(gram), x)
    for _ in range(3):
        compiled(x)
        timed.step()
    metrics = timed.report(8)
    (entry,) = read_ledger(tmp_path)
    assert entry["flops_per_step"] == 2 * 8 * 8 * 4
    assert (entry["start_step"], entry["step"], entry["parameters"]) == (5, 8, 1000)
    assert entry["step_seconds"] == metrics["step_seconds"]
    assert metrics["input_wait_share"] == 0
    if peak is None:
        assert "flop_utilisation" not in metrics | entry
    else:
        per_second = entry["flops_per_step"] / metrics["step_seconds"]
        assert metrics["flop_utilisation"] == pytest.approx(
            per_second / (jax.device_count() * peak)
        )


class ScriptedFeed(DeviceFeed):
    """Has its batch at the given time of a clock that its waits move."""

    def __init__(self, clock, at):
        self.clock, self.at, self.batch = clock, at, {"x": jnp.zeros(1)}

    def get(self, timeout_seconds):
        if self.clock.now < self.at:
            self.clock.now = min(self.clock.now + timeout_seconds, self.at)
        return self.batch if self.clock.now >= self.at else None


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput.time, "monotonic", clock)
    monkeypatch.setattr(throughput, "_POLL_SECONDS", 0.25)
    return clock


def _timed(tmp_path):
    timed = Throughput(tmp_path, 0, 4, 1, "float32", gram)
    timed.knows_device = False
    return timed


@pytest.mark.parametrize(
    ("batch_at", "devices_done_at", "waited"),
    [
        (0, 0, 0),  # a batch that is there costs nothing, whether or not the devices are done
        (0, 5, 0),
        (4, 5, 0),  # nor does one that comes while they compute
        (6, 4, 2),  # of a late one, what is after their last step
        (6, 0, 6),
    ],
)
def test_input_is_waited_for_when_the_devices_are_done_and_the_batch_is_not_there(
    tmp_path, clock, batch_at, devices_done_at, waited
):
    timed = _timed(tmp_path)
    feed = ScriptedFeed(clock, batch_at)
    assert timed.next_batch(feed, lambda: clock.now >= devices_done_at) is feed.batch
    timed.step()
    clock.now = 10.0
    assert timed.report(1)["input_wait_share"] == waited / 10


def test_what_is_between_reports_and_steps_does_not_count(tmp_path, clock):
    timed = _timed(tmp_path)
    clock.now = 1.0
    timed.next_batch(ScriptedFeed(clock, 3.0), idle=lambda: True)
    timed.step()
    clock.now = 10.0
    first = timed.report(1)
    assert (first["step_seconds"], first["input_wait_share"]) == (10.0, 0.2)
    assert first["items_per_second"] == 0.4
    clock.now = 11.0
    timed.go()
    timed.step()
    timed.step()
    clock.now = 17.0
    assert timed.report(3)["step_seconds"] == 3.0
    (entry,) = read_ledger(tmp_path)
    assert entry["step_seconds"] == pytest.approx(16 / 3)
    assert entry["input_wait_share"] == 2 / 16
