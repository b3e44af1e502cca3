"""Resuming a run: from its last checkpoint, if that is intact and of the same nets and data."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import uss_jax
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import read_bundle
from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.bundles.failures import DamagedCheckpoint
from uss_jax.bundles.fingerprint import by_path, fingerprint
from uss_jax.data.index import RecordIndex
from uss_jax.devices.hosts import say
from uss_jax.disk.checked_json import record, text, whole
from uss_jax.errors import UserError
from uss_jax.training.guard import no_norms
from uss_jax.training.records import Records
from uss_jax.training.sections import default_of
from uss_jax.training.settings import RunSettings
from uss_jax.training.state import TrainState

# Keys that may change when a run is resumed; all others of these sections determine the data of
# each step. Records, split and anchors are compared by their digests.
_COMPARED = ("data", "mixing", "anchors", "mixup_alpha")
_MAY_CHANGE = frozenset(
    f"{section}.{key}"
    for section, keys in {
        "data": ("records", "split", "threads", "workers", "max_corrupt", "verify"),
        "mixing": ("gain_db", "silent_share", "pan"),
        "anchors": ("source", "table"),
    }.items()
    for key in keys
)
# Keys of a config, at any depth, that hold paths, and those that each host has for itself.
_PATHS = ("records", "table", "groups", "captions", "text_encoder", "pairs", "init_from")
_PATHS += ("sed_bundle", "query_bundle")
_OF_HOST = ("threads", "workers", "verify", "profile")
# Schema of a checkpoint's data position, see `position_of`.
_POSITION = record(
    {"seed": whole(0, 2**64), "global_batch": whole(1, 2**31), "index_digest": text()},
    dict.fromkeys(("anchors_digest", "asked_digest", "frozen_digest"), text())
    | {"examples_seen": whole(0, 2**63)},
    others=True,
)


def position_of(records: Records, settings: RunSettings, frozen: Any) -> dict[str, Any]:
    """Returns what every checkpoint records about the data: seed, batch size and digests."""
    position = {
        "seed": settings.seed,
        "global_batch": settings.global_batch,
        "index_digest": records.index.digest,
        "frozen_digest": fingerprint(frozen),
    }
    if records.places is not None:
        position["anchors_digest"] = records.places.table.digest
    if records.asks is not None:
        position["asked_digest"] = records.asks.digest
    return position


def config_of_hosts(config: ConfigDict) -> dict[str, Any]:
    """Returns what the configs of all hosts must have alike, for `require_same`.

    A path may be another on each host; whether there is one must be alike.
    """
    written = json.loads(config.to_json_best_effort())
    return {"version": uss_jax.__version__, "config": _without_paths(written)}


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        if key in _OF_HOST:
            continue
        if isinstance(value, Mapping):
            value = _without_paths(value)
        found[key] = bool(value) if key in _PATHS else value
    return found


def data_of_hosts(position: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the data and frozen nets of all hosts must have alike, for `require_same`."""
    digests = ("index_digest", "frozen_digest", "anchors_digest", "asked_digest")
    of_data = {name.replace("_digest", ""): position.get(name) for name in digests}
    return {"seed": position["seed"], **of_data}


def resume(
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    like: TrainState,
    about: Mapping[str, Any],
    position: Mapping[str, Any],
    index: RecordIndex,
    settings: RunSettings,
) -> tuple[int, TrainState] | None:
    """Restores the newest intact checkpoint, with the shardings of `like`.

    Args:
      workdir: folder of the run.
      checkpoints: its checkpoints.
      like: shapes and shardings of the state.
      about: content of config.json as this start would write it.
      position: as `position_of` returns it.
      index: index of the records.
      settings: settings of the run.

    Returns:
      The number of steps done and the state; None if there is no checkpoint.

    Raises:
      UserError: the run has other nets, data or seed, or its checkpoint is damaged and the one
        before is missing or not to be used.
    """
    while step := checkpoints.latest_step:
        say(f"resuming after step {step}")
        saved = read_bundle(workdir).config
        try:
            saved_position = checkpoints.position(step, _POSITION)
            _require_same_nets(nets.completed(saved), nets.completed(about))
            _require_same_data(saved_position, position, index)
            _require_same_drawing(type(settings), saved["training"], about["training"])
            state = restore_state(checkpoints, step, like)
        except DamagedCheckpoint as error:
            _set_aside(checkpoints, step, error, settings)
            continue
        before, now = saved["training"].get("precision", "default"), settings.precision
        if before != now:
            say(f"config.precision is {now} from here on; up to here it was {before}")
        return step, state
    return None


def started_from(workdir: pathlib.Path, settings: RunSettings) -> dict[str, Any]:
    """Returns `init_from` and `init_partly` of a run that goes on; says if others are given."""
    saved = read_bundle(workdir).config["training"]
    started = {name: saved[name] for name in ("init_from", "init_partly") if name in saved}
    before = started.get("init_from", "")
    if settings.init_from not in ("", before):
        say(
            f"config.init_from={settings.init_from} has no effect: this run started from "
            f"{before or 'new parameters'} and goes on"
        )
    return started


def restore_state(checkpoints: Checkpoints, step: int, like: TrainState) -> TrainState:
    """Restores the state saved at a step, with the shardings of `like`.

    Checkpoints of older versions differ as follows:

    | they have | it becomes |
    |---|---|
    | no `ema`, though the run now keeps one | a copy of the parameters |
    | no `norms` | an empty record |
    | `opt_state` behind the empty state of gradient clipping | itself |

    Raises:
      UserError: the checkpoint is of another model.
      DamagedCheckpoint: it cannot be read, or its arrays differ from those saved.
    """
    saved, wanted = checkpoints.items(step), like.parts()
    absent = [name for name in ("ema", "norms") if name in wanted and name not in saved]
    asked = {name: tree for name, tree in wanted.items() if name not in absent}
    behind = "opt_state" in saved and _stands_behind(
        like.opt_state, checkpoints.shapes(step, "opt_state")
    )
    if behind:
        asked["opt_state"] = (optax.EmptyState(), like.opt_state)
    restored = checkpoints.restore(step, asked)
    if behind:
        restored["opt_state"] = restored["opt_state"][1]
    if "ema" in absent:
        restored["ema"] = jax.tree.map(jnp.copy, restored["params"])
    if "norms" in absent:
        place = lambda x, wanted: jax.device_put(x, wanted.sharding)  # noqa: E731
        restored["norms"] = jax.tree.map(place, no_norms(), like.norms)
    count = jax.device_put(jnp.int32(step), like.step.sharding)
    return like.replace(step=count, **restored)


def _stands_behind(state: Any, found: Any) -> bool:
    """Detects an optimiser state that was saved as the second of a chain."""
    shapes, saved = (
        {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()} for tree in (state, found)
    )
    return {f"1/{path}" for path in shapes} == saved.keys()


def _set_aside(
    checkpoints: Checkpoints, step: int, error: DamagedCheckpoint, settings: RunSettings
) -> None:
    """Moves a damaged checkpoint aside, or raises its error if the config says stop."""
    if settings.damaged_checkpoint == "stop":
        raise error
    place = checkpoints.set_aside(step)
    before = checkpoints.latest_step
    if before is None:
        raise UserError(
            f"{error.where} is damaged ({error.why}) and there is none before it; it was moved "
            f"to {place}. Run the same command again to start from step 0, or first put an intact "
            "copy in its old place"
        )
    say(f"{error.where} is damaged ({error.why}); it was moved to {place}")


def _require_same_data(
    saved: Mapping[str, Any], position: Mapping[str, Any], index: RecordIndex
) -> None:
    """Raises a UserError if seed, batch size, records, anchors or frozen nets have changed."""
    for key in ("seed", "global_batch"):
        if saved[key] != position[key]:
            raise UserError(
                f"this run was started with config.{key}={saved[key]}, not {position[key]}; resume "
                f"with --config.{key}={saved[key]} or start in a new workdir"
            )
    if not index.has_digest(saved["index_digest"]):
        raise UserError(
            "the records have changed since this run was started; start in a new workdir"
        )
    # Before the nets, of which another source may need others.
    if saved.get("anchors_digest") != position.get("anchors_digest"):
        raise UserError(
            "this run was started with another anchor source or table; resume with config.anchors "
            "as it was or start in a new workdir"
        )
    # Missing from checkpoints of older versions.
    if saved.get("frozen_digest", position.get("frozen_digest")) != position.get("frozen_digest"):
        raise UserError(
            "the nets in the workdir's folder `frozen` are not those that this run was started "
            "with; copy them back or start in a new workdir"
        )
    if saved.get("asked_digest") != position.get("asked_digest"):
        raise UserError(
            "this run was started with other conditions; resume with the keys of config.query as "
            "they were or start in a new workdir"
        )


def _require_same_drawing(
    kind: type[RunSettings], saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raises a UserError that names the first key that determines the data and differs."""
    before = _drawing(kind, saved)
    for key, value in _drawing(kind, wanted).items():
        if before[key] != value:
            raise UserError(
                f"this run was started with config.{key}={before[key]}, not {value}; resume with "
                "the config it was started with or start in a new workdir"
            )


def _drawing(kind: type[RunSettings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that determine the data of each step, by dotted name.

    Args:
      kind: class of the settings.
      values: a config as a dict, perhaps of an older version: missing keys have their defaults.
    """
    found = {}
    for section in dataclasses.fields(kind):
        if section.name not in _COMPARED:
            continue
        value = values.get(section.name)
        if dataclasses.is_dataclass(section.type):
            for key in dataclasses.fields(section.type):
                given = (value or {}).get(key.name)
                found[f"{section.name}.{key.name}"] = default_of(key) if given is None else given
        else:
            found[section.name] = value
    return {key: value for key, value in found.items() if key not in _MAY_CHANGE}


def _require_same_nets(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a UserError that names the first entry of config.json that differs.

    Parameter shapes do not suffice: nets with another hop or condition can have the same. What it
    is trained on is compared with the data.
    """
    ignored = ("training", *nets.TRAINS_ON)
    for name, before, now in nets.differences(saved, wanted, ignored=ignored):
        before, now = ("{...}" if isinstance(x, dict) else x for x in (before, now))
        raise UserError(
            f"this run was started with {name}={before}, not {now}; resume with the config it "
            "was started with or start in a new workdir"
        )
