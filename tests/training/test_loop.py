import contextlib
import gc
import itertools
import json
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.devices.mesh import make_mesh, on_all_devices
from uss_jax.errors import Stopped, UserError
from uss_jax.training.loop import Pace, Reports, fit
from uss_jax.training.state import TrainState
from uss_jax.training.throughput import Throughput, Trace, read_ledger
from uss_jax.training.writer import MetricsWriter


def _step(state, frozen, batch, key):
    """Adds the batch's mean; metrics come with the batch."""
    del frozen, key
    params = {"total": state.params["total"] + jnp.mean(batch["x"])}
    metrics = {name: jnp.mean(values) for name, values in batch.items() if name != "x"}
    return TrainState(state.step + 1, params, state.batch_stats, state.opt_state), metrics


def _batch(i, loss=None, skipped=None, norms=None, spikes=()):
    """Has x = i; metrics of a step can be given."""
    loss, skipped, norms = loss or {}, skipped or {}, norms or {}
    values = {"x": i, "loss": loss.get(i, i), "grad_norm": norms.get(i, 1)}
    values["spike"] = i in spikes
    values["skipped_spikes"] = sum(at <= i for at in spikes)
    values["skipped_in_a_row"] = skipped.get(i, 0)
    values["skipped_steps"] = sum(at <= i for at in skipped if at not in spikes)
    return {name: np.full(8, value, np.float32) for name, value in values.items()}


def _fit(
    workdir,
    *,
    total=12,
    log=100,
    checkpoint=100,
    loss=None,
    skipped=None,
    norms=None,
    spikes=(),
    stop=10,
    trace=(0, 0),
    batches=None,
    **options,
):
    """Runs on batches 1, 2, ... or those given."""
    mesh = make_mesh()
    start = options.pop("start", 0)
    tree = lambda: {"total": jnp.float32(0)}  # noqa: E731
    state = TrainState(jnp.int32(start), tree(), tree(), tree())
    with (
        Checkpoints(
            workdir / "checkpoints", keep=options.pop("keep", 100), keep_best=1
        ) as checkpoints,
        MetricsWriter(workdir, start, total, "toy") as writer,
    ):
        return fit(
            _step,
            on_all_devices(state, mesh),
            {},
            batches or (_batch(i, loss, skipped, norms, spikes) for i in itertools.count(1)),
            key=jax.random.key(0),
            mesh=mesh,
            pace=Pace(total, log, checkpoint, stop, options.pop("evaluate_every_steps", 0)),
            checkpoints=checkpoints,
            position=lambda done: {"done": done},
            reports=Reports(
                writer,
                Throughput(workdir, 0, 8, 1, "float32", _step),
                Trace(workdir / "profile", *trace),
                options.pop("learning_rate", lambda done: 1 / (1 + done)),
            ),
            **options,
        )


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_reports_means_since_the_last_report_at_logs_checkpoints_and_the_end(tmp_path):
    state = _fit(tmp_path, total=11, log=4, checkpoint=6)
    assert (int(state.step), float(state.params["total"])) == (11, 66.0)
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [
        (4, 2.5),
        (6, 5.5),
        (8, 7.5),
        (11, 10.0),
    ]
    assert _saved(tmp_path) == [6, 11]
    for line in _lines(tmp_path):
        assert line["items_per_second"] == pytest.approx(8 / line["step_seconds"])
        assert line["learning_rate"] == pytest.approx(1 / line["step"])
        assert 0 <= line["input_wait_share"] <= 1


def test_a_run_gone_wrong_stops_with_the_last_good_state_saved(tmp_path):
    skipped = {8: 1, 9: 2, 10: 3, 11: 4}
    with pytest.raises(
        UserError, match=r"NaN or infinite in 4 consecutive steps up to step 11; .* saved"
    ):
        _fit(tmp_path, log=1, checkpoint=5, skipped=skipped, stop=4)
    assert _saved(tmp_path) == [5, 10, 11]
    with Checkpoints(tmp_path / "checkpoints", keep=100) as checkpoints:
        assert checkpoints.position(11) == {"done": 11}


def test_reports_give_the_largest_norm_since_the_last_and_each_absurd_one(tmp_path):
    norms = {2: 3.0, 3: np.inf, 5: 700.0, 7: 900.0}
    spikes = {5: 1, 7: 1}
    _fit(tmp_path, total=12, log=4, norms=norms, spikes=spikes, skipped={3: 1, **spikes})
    lines = _lines(tmp_path)
    assert [(x["step"], x["grad_norm"]) for x in lines if "loss" in x] == [
        (4, 3),
        (8, 900),
        (12, 1),
    ]
    absurd = [x for x in lines if "loss" not in x]
    assert absurd == [{"step": at, "skipped_grad_norm": norms[at]} for at in spikes]
    # Three of eleven updates were left out before the last.
    assert lines[-1]["learning_rate"] == pytest.approx(1 / (12 - 3))


def test_a_run_of_absurd_gradients_stops_and_says_what_may_be_wrong(tmp_path):
    spikes = {8: 1, 9: 2, 10: 3}
    with pytest.raises(
        UserError, match=r"max_norm_ratio .* in 3 consecutive steps up to step 10; .* saved"
    ):
        _fit(
            tmp_path, log=1, skipped=spikes, spikes=spikes, norms=dict.fromkeys(spikes, 1e4), stop=3
        )
    assert _saved(tmp_path) == [10]
    assert [x["step"] for x in _lines(tmp_path) if "skipped_grad_norm" in x] == [8, 9, 10]


def test_the_loss_reported_is_of_the_steps_that_were_not_skipped(tmp_path):
    _fit(tmp_path, total=4, log=4, loss={2: np.nan, 3: np.inf}, skipped={2: 1, 3: 2})
    assert [line["loss"] for line in _lines(tmp_path)] == [2.5]


def test_the_ledger_has_an_entry_for_each_start(tmp_path):
    _fit(tmp_path, total=6, log=2)
    _fit(tmp_path, total=4, log=2)
    first, second = read_ledger(tmp_path)
    assert (first["step"], second["step"]) == (6, 4)
    for entry in (first, second):
        assert (entry["devices"], entry["hosts"], entry["global_batch"]) == (8, 1, 8)
        assert entry["items_per_second"] == pytest.approx(8 / entry["step_seconds"])
        assert entry["compile_seconds"] > 0
        assert 0 <= entry["input_wait_share"] <= 1


def test_evaluations_are_reported_and_the_best_state_is_kept(tmp_path):
    sdri = {2: 1.0, 4: 3.0, 6: 2.0, 8: 2.5}
    _fit(
        tmp_path,
        total=8,
        keep=1,
        evaluate=lambda state, stop: {"sdri": sdri[int(state.step)]},
        evaluate_every_steps=2,
    )
    lines = _lines(tmp_path)
    assert {line["step"]: line["eval/sdri"] for line in lines} == sdri
    assert _saved(tmp_path) == [4, 8]
    with Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints:
        assert [checkpoints.figures(step) for step in (4, 8)] == [{"sdri": 3.0}, {"sdri": 2.5}]


def test_sigterm_breaks_off_an_evaluation_and_saves(tmp_path):
    asked = []

    def evaluate(state, stop):
        asked.append(stop())
        if len(asked) == 2:
            signal.raise_signal(signal.SIGTERM)
        return None if stop() else {"sdri": 1.0}

    with pytest.raises(Stopped, match="saved after step 4; run the same command again"):
        _fit(tmp_path, evaluate=evaluate, evaluate_every_steps=2)
    assert asked == [False, False]
    assert _saved(tmp_path)[-1] == 4
    assert [line.get("eval/sdri") for line in _lines(tmp_path)] == [1.0, None]


@pytest.mark.parametrize("total", [4, 6])
def test_a_run_that_goes_on_makes_the_evaluation_that_a_stop_broke_off(tmp_path, total):
    """Also the last one, after which no step is left."""
    worth = {2: 1.0, 4: 3.0, 6: 2.0}

    def broken(state, stop):
        if int(state.step) == 4:
            signal.raise_signal(signal.SIGTERM)
        return None if stop() else {"sdri": worth[int(state.step)]}

    options = {"total": total, "keep": 1, "evaluate_every_steps": 2}
    with pytest.raises(Stopped):
        _fit(tmp_path, evaluate=broken, **options)
    asked = []

    def whole(state, stop):
        asked.append(int(state.step))
        return {"sdri": worth[asked[-1]]}

    _fit(tmp_path, evaluate=whole, start=4, **options)
    assert asked == list(range(4, total + 1, 2))
    found = [(line["step"], line["eval/sdri"]) for line in _lines(tmp_path) if "eval/sdri" in line]
    assert found == [(step, worth[step]) for step in range(2, total + 1, 2)]
    assert _saved(tmp_path) == {4: [2, 4], 6: [4, 6]}[total]  # the best of all is kept
    with Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.figures(4) == {"sdri": 3.0}
    _fit(tmp_path, evaluate=whole, start=total, **options)
    assert asked == list(range(4, total + 1, 2))


def test_sigterm_waits_for_the_last_checkpoint(tmp_path, monkeypatch):
    """As long as it is written, the signal is heeded by nobody else."""
    heard = []
    wait = Checkpoints.wait

    def slow(self):
        heard.append(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
        wait(self)

    monkeypatch.setattr(Checkpoints, "wait", slow)
    _fit(tmp_path, total=2)
    assert heard == [True]


def test_the_profiler_traces_the_steps_asked_for(tmp_path):
    _fit(tmp_path, total=5, trace=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_sigterm_saves_after_the_step_and_says_so(tmp_path):
    def rate(done):
        if done == 3:
            signal.raise_signal(signal.SIGTERM)
        return 1.0

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="saved after step 5; run the same command again"):
        _fit(tmp_path, log=4, learning_rate=rate)
    assert _saved(tmp_path) == [5]
    assert [line["step"] for line in _lines(tmp_path)] == [4, 5]
    assert signal.getsignal(signal.SIGTERM) == before


def _feed_threads():
    return [thread for thread in threading.enumerate() if thread.name == "device-feed"]


def test_the_next_batch_is_on_the_devices_before_the_loop_asks_for_it(tmp_path):
    second_is_there = threading.Event()

    def batches():
        yield _batch(1)
        yield _batch(2)
        second_is_there.set()  # the feed asks for the third
        yield _batch(3)

    def rate(done):  # called by the report of the first step
        assert second_is_there.wait(60)
        return 1.0

    state = _fit(tmp_path, total=3, log=1, learning_rate=rate, batches=batches())
    assert float(state.params["total"]) == 6


def test_an_error_of_a_batch_ends_the_run_at_its_step(tmp_path):
    def batches():
        yield from map(_batch, (1, 2, 3))
        raise UserError("the record at byte 7 is damaged")

    with pytest.raises(UserError, match="the record at byte 7 is damaged"):
        _fit(tmp_path, checkpoint=1, batches=batches())
    assert _saved(tmp_path) == [1, 2, 3]
    assert not _feed_threads()


@pytest.mark.parametrize("ends", ["done", "stopped", "skipped too often"])
def test_a_run_that_ends_leaves_no_thread_and_closes_its_batches(tmp_path, ends):
    threads, closed = set(), []

    def batches():
        try:
            for i in itertools.count(1):
                threads.add(threading.current_thread().name)
                yield _batch(i, skipped={2: 1} if ends == "skipped too often" else {})
        finally:
            closed.append(threading.current_thread().name)

    def rate(done):
        if ends == "stopped" and done == 1:
            signal.raise_signal(signal.SIGTERM)
        return 1.0

    expected = {"stopped": Stopped, "skipped too often": UserError}.get(ends)
    with pytest.raises(expected) if expected else contextlib.nullcontext():
        _fit(tmp_path, total=4, log=1, stop=1, learning_rate=rate, batches=batches())
    assert threads == {"device-feed"}
    assert closed == ["device-feed"]
    assert not _feed_threads()


def test_the_collector_spares_what_a_run_keeps_and_only_while_it_runs(tmp_path):
    frozen = []

    def rate(done):
        frozen.append(gc.get_freeze_count())
        return 1.0

    _fit(tmp_path, total=2, log=1, learning_rate=rate)
    assert min(frozen) > 0
    assert gc.get_freeze_count() == 0
