"""Compiles a training step and reports its cost without running it: `uss-jax train --dry-run`."""

import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uss_jax import errors
from uss_jax.bundles.nets import fields_of
from uss_jax.devices.cost import BFLOAT16, device_bytes, flops_by_way, least_seconds
from uss_jax.devices.mesh import batch_sharded, laid_out, make_mesh, replicated, shapes
from uss_jax.devices.precision import PRECISIONS
from uss_jax.models.query import TEXT_WIDTH
from uss_jax.models.separator import SeparatorNet
from uss_jax.training.condition_nets import ConditionNets, shapes_of_condition_nets
from uss_jax.training.settings import SeparatorSettings, separator_settings
from uss_jax.training.starting import find_start
from uss_jax.training.state import TrainState, parameter_count
from uss_jax.training.step import Step
from uss_jax.training.train_separator import build_separator, fresh_state, make_step

_WAYS = {BFLOAT16: "bfloat16", **{word: f"float32 at {word} precision" for word in PRECISIONS}}


def dry_run(config: ConfigDict) -> list[str]:
    """Compiles a config's training step for the available devices, without data or workdir.

    A net without a bundle gets the published architecture named by `sed_net` or `query_net`.

    Returns:
      Lines that report what a new run would take from `init_from`, mesh, parameters, FLOPs, memory
      and input size.
    """
    mesh = make_mesh()
    settings = separator_settings(config)
    around = shapes_of_condition_nets(settings)
    separator = build_separator(settings, around)
    fresh = functools.partial(fresh_state, settings, separator)
    key = jax.random.key(settings.seed)
    state = shapes(fresh, key, around.trained, rules=settings.sharding, mesh=mesh)
    said = _start(settings, separator, around, state)
    from_table, asking = settings.anchors.source == "table", settings.asking
    batch = clip_batch(
        settings.global_batch,
        settings.read_samples,
        from_table=from_table,
        vector=around.query.output_width if asking.table else 0,
        masked=asking.source.get("masked", 0) > 0,
        text=TEXT_WIDTH if around.query.takes.texts else 0,
    )
    step = functools.partial(make_step, settings, separator, around, mesh)
    return said + describe(
        step(),
        state,
        around.frozen,
        batch,
        counted=step(remat=False) if settings.remat else None,
        mesh=mesh,
    )


def _start(
    settings: SeparatorSettings, separator: SeparatorNet, around: ConditionNets, state: TrainState
) -> list[str]:
    """Returns what a run says of the model that it starts from, if it does."""
    if not settings.init_from:
        return []
    about = {"kind": "separator", "sample_rate": settings.sample_rate}
    about |= {"separator": fields_of(separator), **around.sections(settings)}
    return find_start(state, settings.init_from, settings.init_partly, about, {})[1]


def clip_batch(
    items: int,
    samples: int,
    *,
    from_table: bool,
    vector: int = 0,
    masked: bool = False,
    text: int = 0,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of clips, or of anchors from a table, of `samples` samples.

    `vector` is the width of mined conditions and `text` that of sentence vectors, 0 without them;
    `masked` is whether items may be asked with their class in the mixture.
    """
    shape = lambda dtype, *more: jax.ShapeDtypeStruct((items, *more), dtype)  # noqa: E731
    batch = {name: shape(np.int32) for name in ("samples", "class_index", "record")}
    batch |= {name: shape(np.uint8) for name in ("conflict", "absent")}
    if from_table:
        batch |= {name: shape(np.int32) for name in ("begin_sample", "anchor_sample")}
        batch["score"] = shape(np.float32)
    if vector:
        batch["vector"] = shape(np.float32, vector)
    if masked:
        batch["masked"] = shape(np.uint8)
    if text:
        batch |= {"text": shape(np.float32, text), "by_text": shape(np.uint8)}
    return {"audio": shape(np.int16, samples), **batch}


def describe(
    step: Step,
    state: TrainState,
    frozen: Any,
    batch: dict[str, jax.ShapeDtypeStruct],
    *,
    counted: Step | None,
    mesh: Mesh,
) -> list[str]:
    """Compiles a step for the devices of the mesh; returns lines that report its cost.

    Args:
      step: the training step.
      state: shapes and shardings of the state.
      frozen, batch: shapes of the frozen variables and the batch.
      counted: the same step without `remat`, for counting FLOPs; None if it recomputes nothing.
      mesh: the devices.
    """
    key = jax.random.key(0)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda x: x.sharding, state)
        whole = replicated(mesh)
        arguments = (
            state,
            jax.tree.map(lambda x: laid_out(x, whole), frozen),
            {name: laid_out(x, batch_sharded(mesh)) for name, x in batch.items()},
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        traced = jitted.trace(*arguments, key)
        compiled = traced.lower().compile()
        seconds = time.monotonic() - began
        by_way = flops_by_way(counted, *arguments, key) if counted else flops_by_way(traced)

    device = mesh.devices.flat[0]
    items = batch["audio"].shape[0]
    read = sum(x.size * x.dtype.itemsize for x in batch.values())
    flops = sum(by_way.values())
    ways = ", ".join(f"{_WAYS[way]} {count / 1e12:.4g}" for way, count in sorted(by_way.items()))
    trained, other = parameter_count(state.params), parameter_count(_params(frozen))
    lines = [
        f"mesh: {mesh.size} x {device.device_kind} along {mesh.axis_names[0]}, "
        f"{errors.counted(jax.process_count(), 'process', 'processes')}",
        f"parameters: {trained / 1e6:.2f} M trained, {other / 1e6:.2f} M frozen",
        f"batch: {errors.counted(items, 'item')}, {items // mesh.size} per device",
        f"operations: {flops / 1e12:.4g} TFLOP per step, {flops / items / 1e12:.4g} per item, "
        f"in matrix products and convolutions: {ways}",
        _memory(compiled, device),
        f"input: {read / 1e6:.4g} MB per step",
        f"compiled in {seconds:.1f} s",
    ]
    least = least_seconds(by_way, device.device_kind)
    if least is None:
        return [
            *lines,
            f"no upper bound on the speed: the peak FLOP/s of {device.device_kind} is not known "
            "(devices/cost.py lists those of accelerators)",
        ]
    steps = mesh.size / least
    return [
        *lines,
        f"upper bound at the peak FLOP/s of {device.device_kind}: {items * steps:.4g} items/s, "
        f"reading {read * steps / 1e6:.4g} MB/s",
    ]


def _params(frozen: Any) -> list[Any]:
    return [net["params"] for net in frozen.values()]


def _memory(compiled: jax.stages.Compiled, device: jax.Device) -> str:
    found = device_bytes(compiled)
    if found is None:
        return f"memory: not reported by {device.platform}"
    total, given, temporary = (found[k] / 1e9 for k in ("total", "arguments", "temporary"))
    line = (
        f"memory per device: {total:.3f} GB ({given:.3f} for state, frozen nets and batch, "
        f"{temporary:.3f} temporary)"
    )
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f"{line}; limit {limit / 1e9:.1f} GB" if limit else line
