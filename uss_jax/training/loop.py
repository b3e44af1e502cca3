"""The loop around a step: batches in, metrics and checkpoints out, the same for every net."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from uss_jax.errors import UserError
from uss_jax.training.checkpoints import Checkpoints
from uss_jax.training.mesh import to_devices
from uss_jax.training.metrics import MetricsWriter
from uss_jax.training.state import TrainState
from uss_jax.training.step import Step


def fit(
    step: Step,
    state: TrainState,
    frozen: Any,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    key: jax.Array,
    mesh: Mesh,
    total_steps: int,
    checkpoints: Checkpoints,
    position: Callable[[int], dict[str, Any]],
    writer: MetricsWriter | None,
    log_every_steps: int,
    checkpoint_every_steps: int,
    max_skipped_steps: int = 1,
) -> TrainState:
    """Steps until `total_steps`, from wherever the state stands.

    Args:
      step: the training step.
      state: on the devices of the mesh; it is consumed.
      frozen: variables of the nets that do not train, on the devices too.
      batches: this host's rows of the batch of each step, from the state's step on.
      key: the run's random key, on the devices too.
      mesh: the devices.
      total_steps: where to stop.
      checkpoints: of the run.
      position: what a checkpoint says of the data after so many steps.
      writer: of metrics; None on all hosts but the first.
      log_every_steps: steps between reports, beside one at each checkpoint; the loss reported is
        the mean since the last, of steps that were not skipped.
      checkpoint_every_steps: steps between checkpoints; the last step always has one.
      max_skipped_steps: so many in a row that the step had to skip are an error.

    Raises:
      UserError: too many steps were skipped; there is a checkpoint of the last good state.
    """
    jitted = jax.jit(step, donate_argnums=0)
    losses: list[jax.Array] = []
    began, waited = time.monotonic(), 0.0
    with jax.set_mesh(mesh):
        for done in range(int(state.step) + 1, total_steps + 1):
            asked = time.monotonic()
            batch = to_devices(next(batches), mesh)
            waited += time.monotonic() - asked
            state, metrics = jitted(state, frozen, batch, key)
            losses.append(metrics["loss"])

            # Only now are the devices waited for: steps in between overlap with reading.
            # Before a checkpoint too, so that none is written of a run that has gone wrong.
            due = done % checkpoint_every_steps == 0 or done == total_steps
            if due or done % log_every_steps == 0:
                values = {name: float(value) for name, value in metrics.items()}
                finite = [loss for loss in jax.device_get(losses) if math.isfinite(loss)]
                values["loss"] = float(np.mean(finite)) if finite else math.nan
                if values["skipped_in_a_row"] >= max_skipped_steps:
                    # The state is that of the last good step, and goes on after the clips read.
                    checkpoints.save(done, state, position(done))
                    raise UserError(
                        f"loss or gradient were no numbers in {values['skipped_in_a_row']:.0f} "
                        f"steps up to step {done}, which were skipped; the last good state is "
                        "saved: lower config.schedule.learning_rate or look for broken clips, "
                        "and resume"
                    )
                elapsed = time.monotonic() - began
                values["steps_per_second"] = len(losses) / elapsed
                values["input_wait_share"] = waited / elapsed
                if writer is not None:
                    writer.write(done, values)
                losses, began, waited = [], time.monotonic(), 0.0

            if due:
                checkpoints.save(done, state, position(done))
    return state
