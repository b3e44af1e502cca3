"""Records of a training run: opened, with their training order and anchors."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from uss_jax.anchors.conditions import ConditionTable, class_means, open_conditions
from uss_jax.anchors.table import Placement, read_table, usable, without
from uss_jax.data.grouping import GroupedOrder
from uss_jax.data.index import RecordIndex, load_index
from uss_jax.data.metadata import read_sample_rate
from uss_jax.data.orders import BalancedOrder, Order, UniformOrder
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.devices.hosts import say
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.training.asking import Asking, Recordings, alone, recording_of
from uss_jax.training.settings import (
    AnchorSettings,
    AskingSettings,
    Data,
    MixingSettings,
    RunSettings,
)
from uss_jax.training.texts import Texts, with_captions


@dataclasses.dataclass(frozen=True)
class Records:
    """The opened records of a run.

    Attributes:
      index: index of the split's records.
      reader: reader of its clips.
      order: maps positions in the training order to clip and class.
      classes: class indexes that are drawn.
      places: anchors of a table; None if whole clips are read.
      asks: what items are asked with; None if with conditions of their own that the step computes.
    """

    index: RecordIndex
    reader: ClipReader
    order: Order
    classes: tuple[int, ...]
    places: Placement | None = None
    asks: Asking | None = None


def open_records(
    settings: RunSettings,
    anchors: AnchorSettings | None = None,
    mixing: MixingSettings | None = None,
    asking: AskingSettings | None = None,
    texts: Texts | None = None,
    weighs: bool = False,
    with_means: bool = False,
) -> Records:
    """Opens the records of a run and builds their training order.

    Args:
      settings: settings of the run.
      anchors: with source `table`, only labels with a usable anchor are drawn.
      mixing: how the order is arranged in mixing groups; None without mixing.
      asking: what items are asked with; None without a query.
      texts: sentence vectors of texts on items; None if none is asked with a text.
      weighs: whether conditions are made of weights of mined vectors, see `class_means`.
      with_means: whether to average mined vectors by class though none is asked with the mean.

    Raises:
      UserError: records or anchor table are missing, or do not match the settings.
    """
    data, seed = settings.data, settings.seed
    if not data.records:
        raise UserError("config.data.records is empty; give the folder that `prepare` wrote")
    index = load_index(data.records, data.split)
    found, wanted = read_sample_rate(data.records), settings.sample_rate
    if found != wanted:
        raise UserError(
            f"{data.records} holds clips of {found} Hz, config.sample_rate is {wanted}; "
            f"run `uss-jax prepare` with --sample-rate {wanted}, or choose a config for {found} Hz"
        )
    drawn, places = _of_share(index, data.share, seed), None
    if anchors is not None and anchors.source == "table":
        places, usable_anchors = _open_table(anchors, index, settings.segment_samples, seed)
        drawn &= usable_anchors
    elif anchors is not None:
        _say_without_effect(anchors)
    order = _order(data, *without(index, drawn), seed)
    classes = tuple(order.classes.tolist())
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
    reader = ClipReader(data.records, index, data.verify == "always")
    if texts is not None and asking.captions:
        texts = with_captions(texts, asking.captions, index)
        share = texts.captions.share
        say(f"{share:.1%} of the clips have a caption in {asking.captions}, and are asked with it")
    asks = asking and _open_asking(*(asking, index, drawn, places, texts, weighs, with_means, seed))
    return Records(index, reader, order, classes, places, asks)


def read_batches(
    records: Records, settings: RunSettings, clips_per_step: int, start: int, labels: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's batches after step `start`.

    Args:
      records: the records.
      settings: settings of the run.
      clips_per_step: clips per step, over all hosts.
      start: number of steps done.
      labels: whether to yield all labels of the clips.
    """
    data = settings.data
    return batches(
        records.reader,
        records.order,
        start_step=start,
        stop_step=settings.total_steps,
        batch_size=clips_per_step,
        clip_samples=settings.read_samples,
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=data.threads,
        workers=data.workers,
        labels=labels,
        places=records.places,
        asks=records.asks,
        around_samples=settings.read_samples - settings.segment_samples,
        max_corrupt=data.max_corrupt,
    )


def _order(
    data: Data, label_row: np.ndarray, label_class: np.ndarray, seed: int
) -> BalancedOrder | UniformOrder:
    """Returns the order of the labels drawn, and reports classes without clips."""
    weights = _class_weights(data.class_weights)
    if data.order == "uniform":
        if weights is not None:
            say("config.data.class_weights has no effect with config.data.order=uniform")
        return UniformOrder(label_row, label_class, seed)
    order = BalancedOrder(label_row, label_class, seed, weights)
    names = load_ontology().class_names
    weighted = () if weights is None else np.flatnonzero(weights != 1)
    for missing in np.intersect1d(weighted, order.missing).astype(int):
        say(
            f"config.data.class_weights[{names[missing]!r}] has no effect: no clip of "
            f"{data.records} ({data.split}) has the class"
        )
    if order.missing.size:
        shown = ", ".join(names[i] for i in order.missing[:3])
        say(
            f"{data.records} ({data.split}) has no clip of {order.missing.size} of the "
            f"{len(names)} classes, which are left out: {shown} ..."
        )
    return order


def _open_table(
    section: AnchorSettings, index: RecordIndex, segment_samples: int, seed: int
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


def _say_without_effect(section: AnchorSettings) -> None:
    """Reports keys of a table's anchors that are set, though there is no table."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name in ("min_score", "top_k", "jitter_samples") and value != field.default:
            say(
                f"config.anchors.{field.name}={value} has no effect with "
                f"config.anchors.source={section.source}"
            )


def _open_asking(
    section: AskingSettings,
    index: RecordIndex,
    drawn: np.ndarray,
    places: Placement | None,
    texts: Texts | None,
    weighs: bool,
    with_means: bool,
    seed: int,
) -> Asking | None:
    """Returns what items are asked with; `drawn` masks the labels that are drawn."""
    shares = {name: share for name, share in section.source.items() if share}
    recordings = mean = conditions = None
    if section.table:
        # Hosts share the files, so one of them reads them for all.
        verify = jax.process_index() == 0
        conditions = open_conditions(section.table, places.table, index, verify=verify)
        if shares.keys() & {"other", "mix", "mean"}:
            examples = Recordings.of(index, drawn, recording_of(index, section.groups))
            if said := alone(examples):
                say(said)
            if shares.keys() & {"other", "mix"}:  # others draw none of them
                recordings = examples
        # Vectors of another output are refused later, with the query net.
        with_means &= conditions.header["output"] == "clipwise"
        if "mean" in shares or with_means:
            mean = _means_of_first_host(conditions, index, drawn, weighs)
        say(
            f"conditions of {section.table}, of the anchors as they are in the recordings; asked "
            f"with: " + ", ".join(f"{name} {share:g}" for name, share in shares.items())
        )
    elif shares.keys() <= {"own"} and texts is None:
        return None
    return Asking(shares, seed, conditions, places, recordings, mean, weighs, texts)


def _means_of_first_host(
    conditions: ConditionTable, index: RecordIndex, drawn: np.ndarray, weighs: bool
) -> np.ndarray:
    """Returns the class means on every host; the first one alone reads all vectors for them."""
    if jax.process_index() == 0:
        means = class_means(conditions, index, drawn, weighs)
    else:
        means = np.zeros((len(load_ontology().class_mids), conditions.width), np.float32)
    return np.asarray(multihost_utils.broadcast_one_to_all(means))


def _of_share(index: RecordIndex, share: float, seed: int) -> np.ndarray:
    """Returns a mask of the labels of a random share of clips; it grows with the share."""
    drawn = np.random.default_rng(seed).random(len(index)) < share
    if not drawn.any():
        raise UserError(f"config.data.share={share} selects none of {len(index)} clips; raise it")
    return np.repeat(drawn, np.diff(index.label_row.astype(np.int64)))


def _class_weights(places: Mapping[str, int]) -> np.ndarray | None:
    """Returns each class's places in a round, 1 by default; None if no weights are given."""
    if not places:
        return None
    ontology = load_ontology()
    weights = np.ones(len(ontology.class_mids), np.int64)
    said: dict[int, str] = {}
    for label, count in places.items():
        index = ontology.resolve(label)
        if index in said:
            raise UserError(
                f"config.data.class_weights has {said[index]!r} and {label!r}, which are "
                "the same class; keep one of them"
            )
        said[index] = label
        weights[index] = count
    return weights
