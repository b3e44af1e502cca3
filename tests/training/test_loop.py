import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uss_jax.errors import UserError
from uss_jax.training.checkpoints import Checkpoints
from uss_jax.training.loop import fit
from uss_jax.training.mesh import make_mesh, on_all_devices
from uss_jax.training.metrics import MetricsWriter
from uss_jax.training.state import TrainState


def _step(state, frozen, batch, key):
    """Adds the batch's mean; metrics come with the batch."""
    del frozen, key
    params = {"total": state.params["total"] + jnp.mean(batch["x"])}
    metrics = {name: jnp.mean(batch[name]) for name in ("loss", "grad_norm", "skipped_in_a_row")}
    return TrainState(state.step + 1, params, state.batch_stats, state.opt_state), metrics


def _fit(workdir, *, total=12, log=100, checkpoint=100, loss=None, skipped=None, stop=10):
    """Runs on batches of which number i has x = i; metrics of a step can be given."""
    mesh = make_mesh()
    loss, skipped = loss or {}, skipped or {}

    def batch(i):
        values = {"x": i, "loss": loss.get(i, i), "grad_norm": 1}
        values["skipped_in_a_row"] = skipped.get(i, 0)
        return {name: np.full(8, value, np.float32) for name, value in values.items()}

    tree = lambda: {"total": jnp.float32(0)}  # noqa: E731
    state = TrainState(jnp.int32(0), tree(), tree(), tree())
    with (
        Checkpoints(workdir / "checkpoints", keep=100) as checkpoints,
        MetricsWriter(workdir, 0, total, "toy") as writer,
    ):
        return fit(
            _step,
            on_all_devices(state, mesh),
            {},
            map(batch, itertools.count(1)),
            key=jax.random.key(0),
            mesh=mesh,
            total_steps=total,
            checkpoints=checkpoints,
            position=lambda done: {"done": done},
            writer=writer,
            log_every_steps=log,
            checkpoint_every_steps=checkpoint,
            max_skipped_steps=stop,
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
        assert line["steps_per_second"] > 0
        assert 0 <= line["input_wait_share"] <= 1


def test_a_run_gone_wrong_stops_with_the_last_good_state_saved(tmp_path):
    skipped = {8: 1, 9: 2, 10: 3, 11: 4}
    with pytest.raises(UserError, match=r"no numbers in 4 steps up to step 11, .* saved"):
        _fit(tmp_path, log=1, checkpoint=5, skipped=skipped, stop=4)
    assert _saved(tmp_path) == [5, 10, 11]
    with Checkpoints(tmp_path / "checkpoints", keep=100) as checkpoints:
        assert checkpoints.position(11) == {"done": 11}


def test_the_loss_reported_is_of_the_steps_that_were_not_skipped(tmp_path):
    _fit(tmp_path, total=4, log=4, loss={2: np.nan, 3: np.inf}, skipped={2: 1, 3: 2})
    assert [line["loss"] for line in _lines(tmp_path)] == [2.5]
