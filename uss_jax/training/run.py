"""The run around a training step: config checks, records, workdir, resuming and the loop."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uss_jax.anchors.detect import RULES
from uss_jax.anchors.table import Placement, read_table, usable, without
from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.bundles.bundle import FORMAT_VERSION, read_bundle
from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.bundles.failures import DamagedCheckpoint
from uss_jax.bundles.fingerprint import fingerprint
from uss_jax.data.index import RecordIndex, load_index
from uss_jax.data.metadata import read_sample_rate
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.data.sampling import BalancedOrder, GroupedOrder, UniformOrder
from uss_jax.devices.mesh import create, on_all_devices, shapes
from uss_jax.devices.precision import check_precision
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_json import Rule, anything, number, record, text, whole
from uss_jax.disk.lock import only_one
from uss_jax.errors import UserError
from uss_jax.models.norm import MOMENTUM
from uss_jax.ontology import load_ontology
from uss_jax.training.loop import Evaluate, fit
from uss_jax.training.state import TrainState, parameter_count, restore_state
from uss_jax.training.step import Step
from uss_jax.training.throughput import Throughput, Trace
from uss_jax.training.writer import MetricsWriter

# Config keys that determine the data of each step, besides seed, batch, records and anchors.
_DRAWING = ("data.order", "data.class_weights", "data.share", "data.clip_seconds", "mixup_alpha")
_DRAWING += ("mixing.sources", "mixing.group_size", "mixing.order", "mixing.match_energy")
_DRAWING += ("mixing.all_targets",)
_DRAWING += ("anchors.min_score", "anchors.min_dbfs", "anchors.top_k", "anchors.jitter_samples")
_DRAWING += ("anchors.rule",)
# Values of keys that older config.json files lack.
_BEFORE_THE_KEY = {
    "anchors.rule": RULES[0],
    "separator.net": "resunet",
    "query.model.net": "cnn14",
    "sed.model.net": "cnn14",
}

# Default. The largest ratio in a healthy float32 run of 827 steps was 10.
_MAX_NORM_RATIO = 100.0

_MOST = 2**31 - 1  # step counters are int32
# Rules for required config keys, by dotted name.
_REQUIRED = {
    "seed": whole(0, 2**32 - 1),
    "sample_rate": whole(LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE),
    "segment_seconds": number(0.01, 600),
    "data.clip_seconds": number(0.01, 3600),
    "data.threads": whole(1, 256),
    "keep_checkpoints": whole(1, _MOST),
    "schedule.name": text(),
    "profile.steps": anything(),
    **dict.fromkeys(("data.records", "data.split", "data.order"), text()),
    **dict.fromkeys(
        (
            *("total_steps", "global_batch", "max_skipped_steps"),
            *("log_every_steps", "checkpoint_every_steps"),
        ),
        whole(1, _MOST),
    ),
}
# Rules for optional config keys.
_OPTIONAL = {
    "accumulate": whole(1, _MOST),
    "keep_best": whole(0, _MOST),
    "weight_decay": number(0, 1e3),
    "clip_norm": number(0, 1e30),
    "schedule.learning_rate": number(0, 1e3),
    "schedule.warm_up_steps": whole(0, _MOST),
    "data.workers": whole(0, 1024),
    "data.max_corrupt": whole(0, _MOST),
    "mixing.group_size": whole(1, _MOST),
    "mixing.sources": whole(1, _MOST),
    "mixing.gain_db": number(0, 200),
    "anchors.min_dbfs": number(-1000, 0),
}
# Schema of a checkpoint's data position, see `_position`.
_POSITION = record(
    {"seed": whole(0, 2**64), "global_batch": whole(1, _MOST), "index_digest": text()},
    dict.fromkeys(("anchors_digest", "frozen_digest"), text()) | {"examples_seen": whole(0, 2**63)},
    others=True,
)
_ABSENT = object()
# Rules for the arguments of the functions in training/augment.py.
_SPEED = number(0.1, 10)
_DECIBELS = number(-200, 200)
_AUGMENTATIONS = {
    "speed": record({"least": _SPEED, "most": _SPEED}),
    "noise": record({"least_snr_db": _DECIBELS, "most_snr_db": _DECIBELS}),
    "spec_augment": record(
        {f"{axis}_width": whole(1, 100_000) for axis in ("time", "mel")}
        | {f"{axis}_stripes": whole(0, 1000) for axis in ("time", "mel")}
    ),
    "mixup_alpha": number(1e-3, 1e3),
}


@dataclasses.dataclass(frozen=True)
class Records:
    """The opened records of a run.

    Attributes:
      index: index of the split's records.
      reader: reader of its clips.
      order: maps positions in the training order to clip and class.
      places: anchors of a table; None if whole clips are read.
    """

    index: RecordIndex
    reader: ClipReader
    order: BalancedOrder | UniformOrder | GroupedOrder
    places: Placement | None = None


def say(text: str) -> None:
    """Prints a line, on the first host only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def check(config: ConfigDict, keys: Sequence[str], remedy: str) -> None:
    """Raises a UserError if config values are invalid, inconsistent or do not suit the devices.

    Args:
      config: config of the run.
      keys: dotted names that this kind of run needs besides those of every run.
      remedy: what to do if one is missing, for the message.
    """
    values = config.to_dict()
    _require_values(values, "config")
    for key in keys:
        if _value(values, key, _ABSENT) is _ABSENT:
            raise UserError(f"config.{key} is missing; {remedy}")
    for key, rule in (_REQUIRED | _OPTIONAL).items():
        value = _value(values, key, _ABSENT)
        if value is not _ABSENT:
            _follow(rule, value, f"config.{key}")
        elif key in _REQUIRED:
            raise UserError(f"config.{key} is missing; set it (every shipped config does)")
    _check_augmentations(values)
    precision_of(config)
    on_damage = _on_damage(config)
    if on_damage not in ("set_aside", "stop"):
        raise UserError(f"config.damaged_checkpoint is {on_damage!r}, expected set_aside or stop")
    ratio = max_norm_ratio_of(config)
    if not (ratio == 0 or ratio > 1):
        raise UserError(
            f"config.max_norm_ratio is {ratio}, expected more than 1, or 0 for no limit: an update "
            "is skipped if its gradient norm exceeds that multiple of the running median"
        )
    if not 0 < config.get("norm_momentum", MOMENTUM) <= 1:
        raise UserError(
            f"config.norm_momentum is {config.norm_momentum}, expected above 0 and at most 1"
        )
    steps = config.profile.steps
    integers = all(isinstance(step, int) for step in steps)
    if steps and not (integers and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(
            f"config.profile.steps is {tuple(steps)}, expected (first, last): the first "
            "and the last step to trace, from 1"
        )
    if config.segment_seconds > config.data.clip_seconds:
        raise UserError(
            f"config.segment_seconds={config.segment_seconds} is longer than "
            f"config.data.clip_seconds={config.data.clip_seconds}; change one of them"
        )
    parts = config.get("accumulate", 1)
    divisor, said = jax.device_count() * parts, f"{jax.device_count()} devices"
    if parts > 1:
        said += f" times config.accumulate={parts}"
    if config.global_batch % divisor:
        lower = config.global_batch // divisor * divisor
        raise UserError(
            f"config.global_batch={config.global_batch} is not divisible by {said}; use "
            f"{' or '.join(str(n) for n in (lower, lower + divisor) if n)}"
        )
    group_size = config.mixing.group_size if "mixing" in config else 1
    if config.global_batch % (group_size * parts):
        in_parts = f" times config.accumulate={parts}" if parts > 1 else ""
        raise UserError(
            f"config.global_batch={config.global_batch} is not divisible by "
            f"config.mixing.group_size={group_size}{in_parts}; change one of them"
        )


def _require_values(section: Mapping[str, Any], where: str) -> None:
    """Raises a UserError if a key is None, except augmentations, which None turns off."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            _require_values(value, f"{where}.{key}")
        elif value is None and not (where == "config" and key in _AUGMENTATIONS):
            off = ", ".join(_AUGMENTATIONS)
            raise UserError(f"{where}.{key} is None; give it a value (only {off} may be None)")


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns the value of a dotted key, or the default if it is missing."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def _check_augmentations(config: Mapping[str, Any]) -> None:
    """Raises a UserError for invalid arguments to the functions in training/augment.py."""
    for key, rule in _AUGMENTATIONS.items():
        arguments = config.get(key)
        if arguments is None:
            continue
        _follow(rule, arguments, f"config.{key}")
        if isinstance(arguments, Mapping):
            for name in (name for name in arguments if name.startswith("least")):
                least = arguments[name]
                most = name.replace("least", "most")
                if least > arguments[most]:
                    raise UserError(
                        f"config.{key}.{name}={least} is above config.{key}.{most}="
                        f"{arguments[most]}; change one of them"
                    )


def _follow(rule: Rule, value: Any, key: str) -> None:
    """Raises a UserError if a config value breaks its rule."""
    try:
        rule(value, key)
    except ValueError as error:
        raise UserError(str(error)) from None


def open_records(
    section: ConfigDict,
    sample_rate: int,
    seed: int,
    *,
    anchors: ConfigDict | None = None,
    mixing: ConfigDict | None = None,
    segment_samples: int = 0,
) -> Records:
    """Opens the records of a config and builds their training order.

    Args:
      section: the config's `data` section.
      sample_rate: required sampling rate of the records, in Hz.
      seed: seed of the order.
      anchors: the `anchors` section; with source `table`, only labels with a usable anchor are
        drawn.
      mixing: the `mixing` section, to arrange the order in mixing groups.
      segment_samples: length of an anchor, in samples.

    Raises:
      UserError: records or anchor table are missing, or do not match the config.
    """
    if not section.records:
        raise UserError("config.data.records is empty; give the folder that `prepare` wrote")
    directory = section.records
    index = load_index(directory, section.split)
    found = read_sample_rate(directory)
    if found != sample_rate:
        raise UserError(
            f"{directory} holds clips of {found} Hz, config.sample_rate is {sample_rate}; "
            f"run `uss-jax prepare` with --sample-rate {sample_rate}, or choose a config for "
            f"{found} Hz"
        )
    drawn, places = _of_share(index, section.get("share", 1.0), seed), None
    if anchors is not None and anchors.source == "table":
        places, usable_anchors = _open_table(anchors, index, segment_samples, seed)
        drawn &= usable_anchors
    label_row, label_class = without(index, drawn)
    if section.order == "uniform":
        order = UniformOrder(label_row, label_class, seed)
    elif section.order == "balanced":
        weights = _class_weights(section.get("class_weights"))
        order = BalancedOrder(label_row, label_class, seed, weights)
        names = load_ontology().class_names
        weighted = () if weights is None else np.flatnonzero(weights != 1)
        for missing in np.intersect1d(weighted, order.missing).astype(int):
            say(
                f"config.data.class_weights[{names[missing]!r}] has no effect: no clip of "
                f"{directory} ({section.split}) has the class"
            )
        if order.missing.size:
            shown = ", ".join(names[i] for i in order.missing[:3])
            say(
                f"{order.missing.size} of {len(names)} classes have no clip in {directory} "
                f"({section.split}) and are left out: {shown} ..."
            )
    else:
        raise UserError(f"config.data.order is {section.order!r}, expected balanced or uniform")
    if mixing is not None:
        order = GroupedOrder(
            order,
            index.label_row,
            index.label_class,
            seed,
            group_size=mixing.group_size,
            sources=mixing.sources,
            conflict_free=mixing.order == "conflict_free",
            sets=mixing.all_targets,
        )
    verify_parts = section.get("verify", "whole") == "always"
    return Records(index, ClipReader(directory, index, verify_parts), order, places)


def _open_table(
    section: ConfigDict, index: RecordIndex, segment_samples: int, seed: int
) -> tuple[Placement, np.ndarray]:
    """Returns the table's anchors, and a mask of the index's labels that have a usable one."""
    if not section.table:
        raise UserError("config.anchors.table is empty; give the file that `uss-jax mine` wrote")
    table = read_table(section.table, index, segment_samples)
    stored = table.begin_sample.shape[1]
    if not 1 <= section.top_k <= stored:
        raise UserError(
            f"config.anchors.top_k={section.top_k} is not between 1 and {stored}, the number of "
            f"anchors per label in {section.table}; mine with more --candidates"
        )
    if section.jitter_samples < 0:
        raise UserError(f"config.anchors.jitter_samples={section.jitter_samples} is below 0")
    keep = usable(table, min_score=section.min_score, min_dbfs=section.min_dbfs)
    say(
        f"anchors of {section.table}: {int(keep.sum())} of {len(keep)} labels usable "
        f"(min_score {section.min_score:g}, min_dbfs {section.min_dbfs}), "
        f"top_k {section.top_k}, jitter_samples {section.jitter_samples}"
    )
    if not keep.any():
        raise UserError(
            f"{section.table}: no anchor reaches config.anchors.min_score={section.min_score:g} "
            f"and config.anchors.min_dbfs={section.min_dbfs}; lower them"
        )
    places = Placement(
        table,
        index,
        seed,
        top_k=section.top_k,
        min_score=section.min_score,
        jitter_samples=section.jitter_samples,
    )
    return places, keep


def _of_share(index: RecordIndex, share: float, seed: int) -> np.ndarray:
    """Returns a mask of the labels of a random share of clips; it grows with the share."""
    if not 0 < share <= 1:
        raise UserError(f"config.data.share is {share}, expected above 0 and at most 1")
    drawn = np.random.default_rng(seed).random(len(index)) < share
    if not drawn.any():
        raise UserError(f"config.data.share={share} selects none of {len(index)} clips; raise it")
    return np.repeat(drawn, np.diff(index.label_row.astype(np.int64)))


def _class_weights(places: ConfigDict | None) -> np.ndarray | None:
    """Returns each class's places in a round, 1 by default; None if no weights are given."""
    if not places:
        return None
    ontology = load_ontology()
    weights = np.ones(len(ontology.class_mids), np.int64)
    said: dict[int, str] = {}
    for label, count in places.items():
        try:
            whole(0, 10_000)(count, f"config.data.class_weights[{label!r}]")
        except ValueError as error:
            raise UserError(f"{error}: the draws of the class per round") from None
        index = ontology.resolve(label)
        if index in said:
            raise UserError(
                f"config.data.class_weights has {said[index]!r} and {label!r}, which are "
                "the same class; keep one of them"
            )
        said[index] = label
        weights[index] = count
    return weights


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Creates the workdir if needed and locks it against other runs, on all hosts together.

    Raises:
      UserError: the workdir cannot be created or written to, or is in use by another run.
    """
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir} cannot be created ({error.strerror or error}); choose another"
        ) from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"--workdir {workdir} cannot be written to; choose another")
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:  # one lock for all hosts of a run
            try:
                remedy = "wait until it has ended, or choose another --workdir"
                stack.enter_context(only_one(workdir, remedy))
            except UserError as error:
                refusal = error
        if multihost_utils.broadcast_one_to_all(np.bool(refusal is not None)):
            raise refusal or UserError(f"{workdir} is in use by another run")
        yield workdir


def train_on(
    records: Records,
    step: Step,
    fresh: Callable[..., TrainState],
    fresh_from: tuple[Any, ...],
    frozen: Any,
    *,
    config: ConfigDict,
    workdir: pathlib.Path,
    mesh: Mesh,
    key: jax.Array,
    kind: str,
    nets: Mapping[str, Any],
    clips_per_step: int,
    learning_rate: Callable[[int], Any],
    dtype: str,
    labels: bool = False,
    counted: Step | None = None,
    evaluation: Callable[[Any], Evaluate] | None = None,
) -> None:
    """Trains until `config.total_steps`, from the workdir's last checkpoint if it has one.

    Args:
      records: training records.
      step: the training step.
      fresh: pure function that creates the initial state.
      fresh_from: arguments of `fresh`, the same on every host.
      frozen: variables of the nets that do not train.
      config: config of the run.
      workdir: folder of the run.
      mesh: the devices.
      key: the run's random key.
      kind: `separator` or `tagger`.
      nets: sections of config.json that make the workdir readable as a bundle.
      clips_per_step: clips per step, over all hosts.
      learning_rate: maps the number of updates done to the next learning rate.
      dtype: main compute dtype of the trained net.
      labels: whether the step needs all labels of the clips.
      counted: the step without `remat`, for counting FLOPs; None to count those of `step`.
      evaluation: maps the frozen variables on the devices to the function that computes a state's
        evaluation metrics every `config.eval.every_steps`; None for no evaluation.

    Raises:
      UserError: the workdir's run has other nets, data or seed.
    """
    state = shapes(fresh, *fresh_from, rules=config.get("sharding", ()), mesh=mesh)
    parameters = parameter_count(state.params)
    say(
        f"{kind} of {parameters / 1e6:.1f} M parameters, "
        f"{len(records.index)} clips, global batch {config.global_batch} on "
        f"{jax.device_count()} devices ({jax.devices()[0].device_kind})"
    )
    about = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "sample_rate": config.sample_rate,
        "segment_seconds": config.segment_seconds,
        **nets,
        "training": json.loads(config.to_json_best_effort()),
    }
    position = {**_position(records, config), "frozen_digest": fingerprint(frozen)}
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints", config.keep_checkpoints, config.get("keep_best", 0)
            )
        )
        start, saved_state = 0, None
        while saved_state is None and checkpoints.latest_step:
            start = checkpoints.latest_step
            say(f"resuming after step {start}")
            saved = read_bundle(workdir).config
            try:
                saved_position = checkpoints.position(start, _POSITION)
                _require_same_run(saved, about, saved_position, position, records.index)
                saved_state = restore_state(checkpoints, start, state)
            except DamagedCheckpoint as error:
                _set_aside(checkpoints, start, error, config)
                continue
            _say_other_precision(saved["training"], config)
        state = saved_state or create(fresh, *fresh_from, like=state)
        writer = None
        if jax.process_index() == 0:
            with replacing(workdir / "config.json") as temporary:
                temporary.write_text(json.dumps(about, indent=2) + "\n")
            writer = stack.enter_context(MetricsWriter(workdir, start, config.total_steps, kind))
        throughput = Throughput(
            workdir, start, config.global_batch, parameters, dtype, counted or step
        )
        if not throughput.knows_device:
            say(
                "flop_utilisation is not reported: the peak FLOP/s of "
                f"{jax.devices()[0].device_kind} is not known (devices/cost.py lists those of "
                "accelerators)"
            )
        frozen = on_all_devices(frozen, mesh)
        multihost_utils.sync_global_devices("the workdir is written")
        fit(
            step,
            state,
            frozen,
            _feed(records, config, start, clips_per_step, labels),
            key=on_all_devices(key, mesh),
            mesh=mesh,
            total_steps=config.total_steps,
            checkpoints=checkpoints,
            position=lambda done: {**position, "examples_seen": done * clips_per_step},
            writer=writer,
            throughput=throughput,
            trace=Trace(workdir / "profile", *(config.profile.steps or (0, 0))),
            learning_rate=learning_rate,
            log_every_steps=config.log_every_steps,
            checkpoint_every_steps=config.checkpoint_every_steps,
            max_skipped_steps=config.max_skipped_steps,
            evaluate=evaluation and evaluation(frozen),
            evaluate_every_steps=config.eval.every_steps if evaluation else 0,
        )


def _set_aside(
    checkpoints: Checkpoints, step: int, error: DamagedCheckpoint, config: ConfigDict
) -> None:
    """Moves a damaged checkpoint aside, or raises its error if the config says stop."""
    if _on_damage(config) == "stop":
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


def _position(records: Records, config: ConfigDict) -> dict[str, Any]:
    """Returns what a checkpoint records about the data: seed, batch size and digests."""
    position = {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "index_digest": records.index.digest,
    }
    if records.places is not None:
        position["anchors_digest"] = records.places.table.digest
    return position


def _feed(
    records: Records, config: ConfigDict, start: int, clips_per_step: int, labels: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's batches after step `start`."""
    seconds = config.data.clip_seconds if records.places is None else config.segment_seconds
    return batches(
        records.reader,
        records.order,
        start_step=start,
        stop_step=config.total_steps,
        batch_size=clips_per_step,
        clip_samples=round(seconds * config.sample_rate),
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=config.data.threads,
        workers=config.data.get("workers", 0),
        labels=labels,
        places=records.places,
        max_corrupt=config.data.get("max_corrupt", 0),
    )


def max_norm_ratio_of(config: ConfigDict) -> float:
    """Returns `config.max_norm_ratio`, or its default for configs older than the key."""
    return config.get("max_norm_ratio", _MAX_NORM_RATIO)


def _on_damage(config: ConfigDict) -> str:
    """Returns `config.damaged_checkpoint`, or its default for configs older than the key."""
    return config.get("damaged_checkpoint", "set_aside")


def anchor_rule_of(config: ConfigDict) -> str:
    """Returns `config.anchors.rule`, or its default for configs older than the key."""
    return config.anchors.get("rule", RULES[0])


def precision_of(config: ConfigDict | Mapping[str, Any]) -> str:
    """Returns `config.precision`, the precision of trained nets; "default" if it is missing."""
    return check_precision(config.get("precision", "default"), "config.precision")


def _say_other_precision(saved: Mapping[str, Any], config: ConfigDict) -> None:
    before, now = precision_of(saved), precision_of(config)
    if before != now:
        say(f"config.precision is {now} from here on; up to here it was {before}")


def _require_same_run(
    saved: Mapping[str, Any],
    about: Mapping[str, Any],
    saved_position: Mapping[str, Any],
    position: Mapping[str, Any],
    index: RecordIndex,
) -> None:
    """Raises a UserError if the saved run has other nets or would read other data."""
    _require_same_nets(saved, json.loads(json.dumps(about)))
    _require_same_data(saved_position, position, index)
    _require_same_drawing(saved["training"], about["training"])


def _require_same_data(
    saved: Mapping[str, Any], position: Mapping[str, Any], index: RecordIndex
) -> None:
    """Raises a UserError if seed, batch size, records, frozen nets or anchors have changed."""
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
    # Missing from checkpoints of older versions.
    if saved.get("frozen_digest", position.get("frozen_digest")) != position.get("frozen_digest"):
        raise UserError(
            "the nets in the workdir's folder `frozen` are not those that this run was started "
            "with; copy them back or start in a new workdir"
        )
    if saved.get("anchors_digest") != position.get("anchors_digest"):
        raise UserError(
            "this run was started with another anchor source or table; resume with config.anchors "
            "as it was or start in a new workdir"
        )


def _require_same_drawing(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a UserError that names the first key of `_DRAWING` that differs."""
    for key in _DRAWING:
        values = [_value(config, key, _BEFORE_THE_KEY.get(key)) for config in (saved, wanted)]
        if values[0] != values[1]:
            raise UserError(
                f"this run was started with config.{key}={values[0]}, not {values[1]}; resume with "
                "the config it was started with or start in a new workdir"
            )


def _require_same_nets(saved: Any, wanted: Any, where: str = "") -> None:
    """Raises a UserError that names the first entry of config.json that differs.

    Parameter shapes do not suffice: nets with another hop or condition can have the same.
    """
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in saved if key not in wanted)]:
            if where or key != "training":
                name = f"{where}.{key}".strip(".")
                before = saved.get(key, _BEFORE_THE_KEY.get(name))
                _require_same_nets(before, wanted.get(key), name)
    elif saved != wanted:
        saved, wanted = ("{...}" if isinstance(x, dict) else x for x in (saved, wanted))
        raise UserError(
            f"this run was started with {where}={saved}, not {wanted}; resume with the config it "
            "was started with or start in a new workdir"
        )
