"""The training loop, the same for every net: runs steps, writes metrics and checkpoints."""

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.devices.hosts import StopNotice
from uss_jax.errors import Stopped, UserError
from uss_jax.training.feed import DeviceFeed
from uss_jax.training.state import TrainState
from uss_jax.training.step import Step
from uss_jax.training.throughput import Throughput, Trace
from uss_jax.training.writer import MetricsWriter

# Steps dispatched but not finished: enough that the devices never wait for the host, few enough to
# stop in time when asked to.
_STEPS_AHEAD = 2
# Metrics kept from every step for the next report.
_EVERY_STEP = ("loss", "grad_norm", "spike")

# Maps a state and a function that says whether to break off to metrics; None if broken off.
Evaluate = Callable[[TrainState, Callable[[], bool]], Mapping[str, float] | None]


@dataclasses.dataclass(frozen=True)
class Pace:
    """Tells when a run reports, saves, evaluates and ends.

    Attributes:
      total_steps: number of steps of the whole run.
      log_every_steps: steps between reports; each checkpoint has one too.
      checkpoint_every_steps: steps between checkpoints; the last step always has one.
      max_skipped_steps: number of consecutive skipped updates up to a report that ends the run with
        an error.
      evaluate_every_steps: steps between evaluations, each with a checkpoint; 0 for none.
    """

    total_steps: int
    log_every_steps: int
    checkpoint_every_steps: int
    max_skipped_steps: int = 1
    evaluate_every_steps: int = 0

    def evaluates(self, done: int) -> bool:
        """Returns whether an evaluation is due after step `done`."""
        return self.evaluate_every_steps > 0 and done % self.evaluate_every_steps == 0

    def saves(self, done: int) -> bool:
        """Returns whether a checkpoint is due after step `done`."""
        return done % self.checkpoint_every_steps == 0 or done == self.total_steps


@dataclasses.dataclass(frozen=True)
class Reports:
    """Groups the outputs of a run's reports.

    Attributes:
      writer: writer of metrics; None on all hosts but the first.
      throughput: throughput meter of the run.
      trace: profiler trace.
      learning_rate: maps the number of updates done to the next learning rate.
    """

    writer: MetricsWriter | None
    throughput: Throughput
    trace: Trace
    learning_rate: Callable[[int], Any]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step, on the first host."""
        if self.writer is not None:
            self.writer.write(step, dict(values))


def fit(
    step: Step,
    state: TrainState,
    frozen: Any,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    key: jax.Array,
    mesh: Mesh,
    pace: Pace,
    checkpoints: Checkpoints,
    position: Callable[[int], dict[str, Any]],
    reports: Reports,
    evaluate: Evaluate | None = None,
) -> TrainState:
    """Trains from the state's step to the last one; returns the final state.

    Args:
      step: training step.
      state: initial state, on the devices of the mesh; its buffers are donated.
      frozen: variables of the nets that are not trained, on the devices.
      batches: this host's rows of each step's batch, starting at the state's step; read in a
        separate thread and closed at the end.
      key: random key of the run, on the devices.
      mesh: mesh of the devices.
      pace: when to report, save, evaluate and end.
      checkpoints: checkpoints of the run.
      position: maps the number of steps done to the data position saved in a checkpoint.
      reports: where to report.
      evaluate: returns metrics of a state, on all hosts.

    Raises:
      UserError: too many updates in a row were skipped; the last good state is saved.
      Stopped: the run was asked to stop; the state after the current step is saved.
    """
    recent: list[Mapping[str, jax.Array]] = []  # metrics of the steps since the last report
    idle = None  # returns whether every dispatched step is done
    compiled = None
    throughput, trace = reports.throughput, reports.trace
    feed = DeviceFeed(batches, mesh)
    with jax.set_mesh(mesh), StopNotice() as notice, trace, feed, _sparing_collector() as spare:
        start = int(state.step)
        if evaluate and start and pace.evaluates(start) and not checkpoints.figures(start):
            _make_up(evaluate, start, state, notice, checkpoints, reports)
        for done in range(start + 1, pace.total_steps + 1):
            batch = throughput.next_batch(feed, idle)
            if compiled is None:
                compiled = throughput.compile(_jitted(step, state), state, frozen, batch, key)
                spare()
            trace.before(done, state)
            state, metrics = compiled(state, frozen, batch, key)
            throughput.step()
            idle = metrics["loss"].is_ready
            recent.append({name: metrics[name] for name in _EVERY_STEP if name in metrics})
            if len(recent) > _STEPS_AHEAD:
                jax.block_until_ready(recent[-1 - _STEPS_AHEAD])

            stopping = notice.heard() and done < pace.total_steps
            evaluating = evaluate is not None and pace.evaluates(done) and not stopping
            # Each checkpoint follows a report, so that a run that went wrong is detected first.
            due = pace.saves(done) or evaluating or stopping
            if not (due or done % pace.log_every_steps == 0):
                continue
            values = _report(recent, metrics, done, reports)
            if (in_a_row := int(values["skipped_in_a_row"])) >= pace.max_skipped_steps:
                # The state is that of the last good step, the position is after the clips read.
                checkpoints.save(done, state.parts(), position(done))
                checkpoints.wait()  # here SIGTERM does no harm
                raise UserError(_gone_wrong(done, in_a_row, bool(recent[-1].get("spike"))))
            figures = evaluate(state, notice.heard) if evaluating else {}
            if figures is None:
                figures, stopping = {}, True
            reports.write(done, values | _named(figures))
            if due:
                checkpoints.save(done, state.parts(), position(done), figures)
            if stopping:
                checkpoints.wait()
                raise Stopped(_stopped(done))
            recent = []
            throughput.go()
        checkpoints.wait()
    return state


def _make_up(
    evaluate: Evaluate,
    start: int,
    state: TrainState,
    notice: StopNotice,
    checkpoints: Checkpoints,
    reports: Reports,
) -> None:
    """Makes the evaluation before or in which the run was stopped."""
    if (figures := evaluate(state, notice.heard)) is None:
        raise Stopped(_stopped(start))
    reports.write(start, _named(figures))
    checkpoints.add_figures(start, figures)


def _named(figures: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics of an evaluation by their names in the reports."""
    return {f"eval/{name}": value for name, value in figures.items()}


def _stopped(done: int) -> str:
    return f"stopped by SIGTERM and saved after step {done}; run the same command again to resume"


def _jitted(step: Step, state: TrainState) -> Callable:
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _report(
    recent: Sequence[Mapping[str, jax.Array]],
    last: Mapping[str, jax.Array],
    done: int,
    reports: Reports,
) -> dict[str, float]:
    """Reports the updates skipped as spikes; returns the metrics since the last report.

    The loss is the mean of the steps and the gradient norm their largest, over finite values;
    the other metrics are those of `last`, the last step.
    """
    values = {name: float(value) for name, value in jax.device_get(last).items()}
    steps = jax.device_get(recent)
    values.pop("spike", None)
    # NaN: too few updates; no silent target, or nothing but silent ones.
    undefined = ["grad_norm_median", "silent_db"]
    if values.get("silent_share") == 1:
        undefined.append("sdri")
    for name in undefined:
        if math.isnan(values.get(name, 0.0)):
            del values[name]
    values |= _summary(steps)
    left_out = int(values["skipped_steps"] + values.get("skipped_spikes", 0))
    values["learning_rate"] = float(reports.learning_rate(done - 1 - left_out))
    for at, norm in _spikes(steps, done).items():
        reports.write(at, {"skipped_grad_norm": norm})
    return values | reports.throughput.report(done)


def _summary(steps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns the mean loss and largest gradient norm of all steps since the last report.

    Values that are NaN or infinite are excluded.
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
    """Maps the steps of spikes since the last report to their gradient norms."""
    first = done - len(steps) + 1
    return {at: float(x["grad_norm"]) for at, x in enumerate(steps, first) if x.get("spike")}


def _gone_wrong(done: int, in_a_row: int, spiked: bool) -> str:
    """Returns the error message for a run whose last updates were all skipped."""
    if spiked:
        return (
            f"the gradient norm exceeded config.max_norm_ratio times its running median in "
            f"{in_a_row} consecutive steps up to step {done}; the updates were skipped and the "
            "last good state saved. Lower config.schedule.learning_rate or, if gradients of this "
            "size are expected, raise config.max_norm_ratio (0 for no limit), then resume"
        )
    return (
        f"loss or gradient was NaN or infinite in {in_a_row} consecutive steps up to step {done}; "
        "the updates were skipped and the last good state saved. Lower "
        "config.schedule.learning_rate or look for broken clips, then resume"
    )


@contextlib.contextmanager
def _sparing_collector() -> Iterator[Callable[[], None]]:
    """Yields a function that makes the garbage collector ignore all existing objects.

    A step allocates about a thousand arrays, enough to trigger a collection. The compiled program
    and its trace are hundreds of thousands of permanent objects: scanning them takes a quarter of
    the loop's CPU time, and occasionally blocks every thread for the length of several steps.
    """
    try:
        yield gc.freeze
    finally:
        gc.unfreeze()
