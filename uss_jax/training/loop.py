"""The loop around a step: batches in, metrics and checkpoints out, the same for every net."""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from uss_jax.errors import Stopped, UserError
from uss_jax.training.checkpoints import Checkpoints
from uss_jax.training.feed import DeviceFeed
from uss_jax.training.hosts import StopNotice
from uss_jax.training.metrics import MetricsWriter
from uss_jax.training.state import TrainState
from uss_jax.training.step import Step
from uss_jax.training.throughput import Throughput, Trace

# Dispatched and not yet done: enough that the devices never wait for the host, and few enough that
# a notice to stop is heeded in time.
_STEPS_AHEAD = 2
# Metrics that are kept of every step.
_EVERY_STEP = ("loss", "grad_norm", "spike")

Evaluate = Callable[[TrainState], Mapping[str, float]]


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
    throughput: Throughput,
    trace: Trace,
    learning_rate: Callable[[int], Any],
    log_every_steps: int,
    checkpoint_every_steps: int,
    max_skipped_steps: int = 1,
    evaluate: Evaluate | None = None,
    evaluate_every_steps: int = 0,
) -> TrainState:
    """Steps until `total_steps`, from wherever the state stands.

    Args:
      step: the training step.
      state: on the devices of the mesh; it is consumed.
      frozen: variables of the nets that do not train, on the devices too.
      batches: this host's rows of the batch of each step, from the state's step on; read in a
        thread of its own and closed in the end.
      key: the run's random key, on the devices too.
      mesh: the devices.
      total_steps: where to stop.
      checkpoints: of the run.
      position: what a checkpoint says of the data after so many steps.
      writer: of metrics; None on all hosts but the first.
      throughput: of the run.
      trace: of the profiler.
      learning_rate: of the update after so many.
      log_every_steps: steps between reports, beside one at each checkpoint. They give the mean loss
        and the largest gradient norm since the last report, where these were finite, and step and
        norm of each update that was left out as absurdly large.
      checkpoint_every_steps: steps between checkpoints; the last step always has one.
      max_skipped_steps: number of updates in a row that, left out, end the run with an error.
      evaluate: figures of a state, on all hosts together; `sdri` is what makes a checkpoint best.
      evaluate_every_steps: steps between evaluations, each with a checkpoint; 0 for none.

    Raises:
      UserError: too many steps were skipped; there is a checkpoint of the last good state.
      Stopped: a notice to stop was heard; there is a checkpoint of the step it came in.
    """
    recent: list[Mapping[str, jax.Array]] = []  # metrics of the steps since the last report
    idle = None  # tells whether every step dispatched is done
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled = None
    feed = DeviceFeed(batches, mesh)
    with jax.set_mesh(mesh), StopNotice() as notice, trace, feed, _sparing_collector() as spare:
        for done in range(int(state.step) + 1, total_steps + 1):
            batch = throughput.next_batch(feed, idle)
            if compiled is None:
                jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
                compiled = throughput.compile(jitted, state, frozen, batch, key)
                spare()
            trace.before(done, state)
            state, metrics = compiled(state, frozen, batch, key)
            throughput.step()
            idle = metrics["loss"].is_ready
            recent.append({name: metrics[name] for name in _EVERY_STEP if name in metrics})
            if len(recent) > _STEPS_AHEAD:
                jax.block_until_ready(recent[-1 - _STEPS_AHEAD])

            stopping = notice.heard(done) and done < total_steps
            evaluating = evaluate_every_steps and done % evaluate_every_steps == 0 and not stopping
            # Before a checkpoint there is a report too, so that none is written of a run that has
            # gone wrong.
            due = done % checkpoint_every_steps == 0 or done == total_steps
            due = due or evaluating or stopping
            if not (due or done % log_every_steps == 0):
                continue
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            steps = jax.device_get(recent)
            spikes = _spikes(steps, done)
            values.pop("spike", None)
            if math.isnan(values.get("grad_norm_median", 0.0)):
                del values["grad_norm_median"]  # too few updates to know it
            values |= _summary(steps)
            left_out = int(values["skipped_steps"] + values.get("skipped_spikes", 0))
            values["learning_rate"] = float(learning_rate(done - 1 - left_out))
            if writer is not None:
                for at, norm in spikes.items():
                    writer.write(at, {"skipped_grad_norm": norm})
            if values["skipped_in_a_row"] >= max_skipped_steps:
                # The state is that of the last good step, and goes on after the clips read.
                checkpoints.save(done, state, position(done))
                raise UserError(_gone_wrong(done, int(values["skipped_in_a_row"]), done in spikes))
            values |= throughput.report(done)
            figures = evaluate(state) if evaluating else {}
            if writer is not None:
                writer.write(done, values | {f"eval/{name}": x for name, x in figures.items()})
            if due:
                checkpoints.save(done, state, position(done), figures)
            if stopping:
                checkpoints.wait()  # while a second notice still does no harm
                raise Stopped(f"stopped by SIGTERM and saved after step {done}; run it again")
            recent = []
            throughput.go()
    return state


def _summary(steps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Metrics of all steps since the last report: mean loss and largest gradient norm.

    Steps in which they were NaN or infinite do not count.
    """
    finite = {
        name: [float(x[name]) for x in steps if math.isfinite(x[name])]
        for name in ("loss", "grad_norm")
    }
    return {
        "loss": float(np.mean(finite["loss"])) if finite["loss"] else math.nan,
        "grad_norm": max(finite["grad_norm"], default=math.nan),
    }


def _spikes(steps: Sequence[Mapping[str, np.ndarray]], done: int) -> dict[int, float]:
    """Step and gradient norm of the updates since the last report that were absurdly large."""
    first = done - len(steps) + 1
    return {at: float(x["grad_norm"]) for at, x in enumerate(steps, first) if x.get("spike")}


def _gone_wrong(done: int, in_a_row: int, spiked: bool) -> str:
    """What to tell the user of a run whose last updates were all left out."""
    if spiked:
        return (
            f"the gradient was longer than config.max_norm_ratio times its running median in "
            f"{in_a_row} steps up to step {done}, which were skipped; the last good state is "
            "saved: lower config.schedule.learning_rate, or raise config.max_norm_ratio (0 for no "
            "limit) if gradients of this size are right, and resume"
        )
    return (
        f"loss or gradient were no numbers in {in_a_row} steps up to step {done}, which were "
        "skipped; the last good state is saved: lower config.schedule.learning_rate or look for "
        "broken clips, and resume"
    )


@contextlib.contextmanager
def _sparing_collector() -> Iterator[Callable[[], None]]:
    """Yields a function after which the garbage collector leaves existing objects alone.

    A step makes about a thousand arrays, enough to start a collection each time. The program and
    its trace are hundreds of thousands of objects that stay: looking through them is a quarter of
    the loop's CPU time, and now and then stops every thread for as long as several steps.
    """
    try:
        yield gc.freeze
    finally:
        gc.unfreeze()
