import jax
import numpy as np
import pytest

from uss_jax.training import cost, throughput
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
        with timed.waiting():
            compiled(x)
        timed.step()
    metrics = timed.report(8)
    (entry,) = read_ledger(tmp_path)
    assert entry["flops_per_step"] == 2 * 8 * 8 * 4
    assert (entry["start_step"], entry["step"], entry["parameters"]) == (5, 8, 1000)
    assert entry["step_seconds"] == metrics["step_seconds"]
    assert 0 < metrics["input_wait_share"] <= 1
    if peak is None:
        assert "flop_utilisation" not in metrics | entry
    else:
        per_second = entry["flops_per_step"] / metrics["step_seconds"]
        assert metrics["flop_utilisation"] == pytest.approx(
            per_second / (jax.device_count() * peak)
        )


def test_what_is_between_reports_and_steps_does_not_count(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 11.0, 17.0, 20.0, 25.0])
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(clock))
    timed = Throughput(tmp_path, 0, 4, 1, "float32", gram)  # 0
    with timed.waiting():  # 1, 3
        pass
    timed.step()
    first = timed.report(1)  # 10
    assert (first["step_seconds"], first["input_wait_share"]) == (10.0, 0.2)
    assert first["items_per_second"] == 0.4
    timed.go()  # 11
    timed.step()
    timed.step()
    assert timed.report(3)["step_seconds"] == 3.0  # 17
    (entry,) = read_ledger(tmp_path)
    assert entry["step_seconds"] == pytest.approx(16 / 3)
    assert entry["input_wait_share"] == 2 / 16
