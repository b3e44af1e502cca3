import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from uss_jax.data.tfrecord import scan_records
from uss_jax.training.writer import MetricsWriter


def _write(workdir, start, steps, total=10):
    with MetricsWriter(workdir, start, total, "toy") as writer:
        for step in steps:
            writer.write(step, {"loss": step / 4, "grad_norm": 1.0})


def _steps(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_line_for_each_report(tmp_path, capsys):
    _write(tmp_path, 0, [2, 4])
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 2, "loss": 0.5, "grad_norm": 1.0}\n{"step": 4, "loss": 1.0, "grad_norm": 1.0}\n'
    )
    assert "toy 4/10: loss 1, grad_norm 1, " in capsys.readouterr().out


def test_lines_are_on_disk_before_the_end(tmp_path):
    with MetricsWriter(tmp_path, 0, 10, "toy") as writer:
        writer.write(1, {"loss": 1.0})
        assert _steps(tmp_path) == [1]


@pytest.mark.parametrize("cut", ["", '{"step": 7, "lo', "{", "\n"])
def test_resuming_drops_later_lines_and_a_cut_one(tmp_path, cut):
    _write(tmp_path, 0, [2, 4, 6])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(cut)
    _write(tmp_path, 4, [5, 6])
    assert _steps(tmp_path) == [2, 4, 5, 6]


def test_tensorboard_events_hold_the_values_and_purge_what_is_done_again(tmp_path):
    _write(tmp_path, 0, [2, 4, 6])
    _write(tmp_path, 4, [6])
    files = sorted(tmp_path.glob("events.out.tfevents.*"))
    assert files
    events = [
        Event.FromString(payload)
        for path in files
        if path.stat().st_size
        for *_, payload in scan_records(path)
    ]
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert {(2, "loss", 0.5), (4, "loss", 1.0), (6, "loss", 1.5)} <= set(values)
    assert 5 in [event.step for event in events]  # TensorBoard forgets what it read from there on
