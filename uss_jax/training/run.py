"""A run from its last checkpoint, or from the start, to its last step; the same for every net."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uss_jax.bundles.bundle import FORMAT_VERSION
from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.devices.hosts import require_same, say
from uss_jax.devices.mesh import create, idle_rules, on_all_devices, shapes
from uss_jax.errors import counted
from uss_jax.training.loop import Evaluate, Pace, Reports, fit
from uss_jax.training.optim import unfinished_warm_up
from uss_jax.training.records import Records, read_batches
from uss_jax.training.resuming import data_of_hosts, position_of, resume, started_from
from uss_jax.training.settings import RunSettings
from uss_jax.training.starting import find_start, started_with
from uss_jax.training.state import TrainState, parameter_count
from uss_jax.training.step import Step
from uss_jax.training.throughput import Throughput, Trace
from uss_jax.training.workdir import write_config
from uss_jax.training.writer import MetricsWriter


@dataclasses.dataclass(frozen=True)
class Trained:
    """Describes what a run trains.

    Attributes:
      kind: `separator` or `tagger`.
      sections: sections of config.json that make the workdir readable as a bundle.
      step: the training step.
      counted: the step without `remat`, whose FLOPs are those of the model; None if the step
        itself recomputes nothing.
      fresh: pure function that creates the initial state.
      fresh_from: arguments of `fresh`, the same on every host.
      frozen: variables of the nets that do not train.
      learning_rate: maps the number of updates done to the next learning rate.
      dtype: main compute dtype of the trained net.
      clips_per_step: clips read for a step, over all hosts.
      labels: whether the step needs all labels of the clips.
      evaluation: maps the frozen variables on the devices to the function that computes a state's
        evaluation metrics; None for no evaluation.
      evaluate_every_steps: steps between evaluations.
    """

    kind: str
    sections: Mapping[str, Any]
    step: Step
    counted: Step | None
    fresh: Callable[..., TrainState]
    fresh_from: tuple[Any, ...]
    frozen: Any
    learning_rate: Callable[[int], Any]
    dtype: str
    clips_per_step: int
    labels: bool = False
    evaluation: Callable[[Any], Evaluate] | None = None
    evaluate_every_steps: int = 0


def run(
    trained: Trained,
    records: Records,
    settings: RunSettings,
    config: ConfigDict,
    workdir: pathlib.Path,
    mesh: Mesh,
) -> None:
    """Trains until `config.total_steps`, from the workdir's last checkpoint if it has one.

    Args:
      trained: what to train.
      records: training records.
      settings: settings of the run.
      config: the config they were read from, for config.json.
      workdir: folder of the run, locked.
      mesh: the devices.

    Raises:
      UserError: the workdir's run has other nets, data or seed.
    """
    like = shapes(trained.fresh, *trained.fresh_from, rules=settings.sharding, mesh=mesh)
    about = {
        "format_version": FORMAT_VERSION,
        "kind": trained.kind,
        "sample_rate": settings.sample_rate,
        "segment_seconds": settings.segment_seconds,
        **trained.sections,
        "training": json.loads(config.to_json_best_effort()),
    }
    position = position_of(records, settings, trained.frozen)
    require_same(data_of_hosts(position))
    _introduce(trained, records, settings, like)
    with contextlib.ExitStack() as stack:
        folder = workdir / "checkpoints"
        keep = settings.keep_checkpoints, settings.keep_best, settings.best_by
        checkpoints = Checkpoints(folder, *keep)
        stack.enter_context(checkpoints)

        # The state: of the last checkpoint, else a fresh one.
        resumed = resume(workdir, checkpoints, like, about, position, records.index, settings)
        if resumed:
            about["training"] |= started_from(workdir, settings)
        start, state = resumed or (0, _first_state(trained, settings, like, about))

        write_config(workdir, about)
        reports = _reports(trained, settings, workdir, start, parameter_count(like.params), stack)
        frozen = on_all_devices(trained.frozen, mesh)
        multihost_utils.sync_global_devices("the workdir is written")
        fit(
            trained.step,
            state,
            frozen,
            read_batches(records, settings, trained.clips_per_step, start, trained.labels),
            key=on_all_devices(jax.random.key(settings.seed), mesh),
            mesh=mesh,
            pace=Pace(
                settings.total_steps,
                settings.log_every_steps,
                settings.checkpoint_every_steps,
                settings.max_skipped_steps,
                trained.evaluate_every_steps,
            ),
            checkpoints=checkpoints,
            position=lambda done: {**position, "examples_seen": done * trained.clips_per_step},
            reports=reports,
            evaluate=trained.evaluation and trained.evaluation(frozen),
        )


def _first_state(
    trained: Trained, settings: RunSettings, like: TrainState, about: Mapping[str, Any]
) -> TrainState:
    state = create(trained.fresh, *trained.fresh_from, like=like)
    if settings.init_from:
        taken, said = find_start(
            *(state, settings.init_from, settings.init_partly), about, trained.frozen
        )
        for line in said:
            say(line)
        state = started_with(state, taken)
    return state


def _introduce(trained: Trained, records: Records, settings: RunSettings, like: TrainState) -> None:
    say(
        f"{trained.kind} of {parameter_count(like.params) / 1e6:.1f} M parameters, "
        f"{counted(len(records.index), 'clip')}, global batch {settings.global_batch} on "
        f"{counted(jax.device_count(), 'device')} ({jax.devices()[0].device_kind})"
    )
    for pattern in idle_rules(like, settings.sharding):
        say(f"config.sharding: no array has a name like {pattern!r}, so this rule has no effect")
    # The schedule has settings of its own, which a shorter run may leave as they are.
    if unfinished := unfinished_warm_up(settings.schedule, settings.total_steps):
        say(unfinished)


def _reports(
    trained: Trained,
    settings: RunSettings,
    workdir: pathlib.Path,
    start: int,
    parameters: int,
    stack: contextlib.ExitStack,
) -> Reports:
    """Opens metrics, ledger and trace; the first host writes the metrics."""
    writer = None
    if jax.process_index() == 0:
        total = settings.total_steps
        writer = stack.enter_context(MetricsWriter(workdir, start, total, trained.kind))
    batch = settings.global_batch
    throughput = Throughput(workdir, start, batch, parameters, trained.dtype, trained.counted)
    if not throughput.knows_device:
        say(
            "flop_utilisation is not reported: the peak FLOP/s of "
            f"{jax.devices()[0].device_kind} is not known (devices/cost.py lists those of "
            "accelerators)"
        )
    trace = Trace(workdir / "profile", *(settings.profile.steps or (0, 0)))
    return Reports(writer, throughput, trace, trained.learning_rate)
