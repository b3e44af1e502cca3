"""What every run opens at its start: devices, records, workdir, position."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from uss_jax.atomic import replacing
from uss_jax.data.metadata import read_sample_rate
from uss_jax.data.sampling import BalancedOrder, UniformOrder
from uss_jax.data.tfrecord import ClipReader, RecordIndex, load_index
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.training.bundle import FORMAT_VERSION
from uss_jax.training.checkpoints import Checkpoints
from uss_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Records:
    """The opened records of a run.

    Attributes:
      index: of the split.
      reader: of its clips.
      order: which clip and class stand at which position.
    """

    index: RecordIndex
    reader: ClipReader
    order: BalancedOrder | UniformOrder


def open_records(section: ConfigDict, sample_rate: int, seed: int) -> Records:
    """Opens a config's `data` section: `records`, `split` and `order`.

    Raises:
      UserError: no records, or of another sample rate than the config's.
    """
    if not section.records:
        raise UserError("config.data.records is empty; give the folder that `prepare` wrote")
    directory = pathlib.Path(section.records)
    index = load_index(directory, section.split)
    found = read_sample_rate(directory)
    if found != sample_rate:
        raise UserError(
            f"{directory} holds clips of {found} Hz, config.sample_rate is {sample_rate}; "
            "prepare the records at that rate or choose the config made for them"
        )
    if section.order == "uniform":
        order = UniformOrder(index.label_row, index.label_class, seed)
    elif section.order == "balanced":
        order = BalancedOrder(index.label_row, index.label_class, seed)
        if order.missing.size:
            names = load_ontology().class_names
            shown = ", ".join(names[i] for i in order.missing[:3])
            print(
                f"{order.missing.size} of {len(names)} classes have no clip in {directory} "
                f"({section.split}) and are left out: {shown} ..."
            )
    else:
        raise UserError(f"config.data.order is {section.order!r}, expected balanced or uniform")
    return Records(index, ClipReader(directory, index), order)


def check_division(global_batch: int, group_size: int = 1) -> None:
    """Raises a UserError where the batch does not divide into groups, hosts and devices."""
    devices = jax.device_count()
    if global_batch % devices:
        lower = global_batch // devices * devices
        raise UserError(
            f"config.global_batch={global_batch} is not divisible by {devices} devices; use "
            f"{' or '.join(str(n) for n in (lower, lower + devices) if n)}"
        )
    if global_batch % group_size:
        raise UserError(
            f"config.global_batch={global_batch} is not divisible by "
            f"config.mixing.group_size={group_size}; change one of them"
        )


def resume(checkpoints: Checkpoints, state: TrainState, position: Mapping[str, Any]) -> TrainState:
    """The newest checkpoint's state, or the given one when there is none.

    Args:
      checkpoints: of the run.
      state: fresh, on the devices.
      position: `seed`, `global_batch` and `index_digest` of this start, which must be those saved.

    Raises:
      UserError: one of them differs; the next data would not be what it would have been.
    """
    step = checkpoints.latest_step
    if step is None:
        return state
    saved = checkpoints.position(step)
    keys = {"seed": "config.seed", "global_batch": "config.global_batch"}
    for key, value in position.items():
        if saved[key] == value:
            continue
        if key in keys:
            raise UserError(
                f"this run was started with {keys[key]}={saved[key]}, not {value}; resume with "
                f"--{keys[key]}={saved[key]} or start in a new workdir"
            )
        raise UserError(
            "the records have changed since this run was started; start in a new workdir"
        )
    print(f"resuming after step {step}")
    return checkpoints.restore(step, state)


def open_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """Makes the workdir where needed, and sees that it can be written to."""
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: {error.strerror or error}") from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"--workdir {workdir} cannot be written to")
    return workdir


def write_config(
    workdir: pathlib.Path, kind: str, config: ConfigDict, nets: Mapping[str, Any]
) -> None:
    """Writes config.json, which makes the workdir readable as a bundle."""
    content = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "sample_rate": config.sample_rate,
        "segment_seconds": config.segment_seconds,
        **nets,
        "training": json.loads(config.to_json_best_effort()),
    }
    with replacing(workdir / "config.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
