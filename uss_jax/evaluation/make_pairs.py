"""Makes evaluation pairs from records: mixtures of two anchors, and the anchor to separate.

The layout is the published one, `class_id=K/<i>.source.wav` and `<i>.mixture.wav`, plus a
`manifest.csv` with the clips of each pair and checksums of its samples.

Letters: `n` pairs, `s` samples of a segment.
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Integer
from tqdm import tqdm

from uss_jax.anchors.mix import matching_gain
from uss_jax.audio.files import PEAK_LIMIT, write_wav
from uss_jax.bundles.model import Model
from uss_jax.data.chosen import Chosen
from uss_jax.data.index import RecordIndex
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.reader import ClipReader
from uss_jax.disk.atomic import replacing_folder
from uss_jax.errors import UserError, counted
from uss_jax.evaluation.clips import MIN_DBFS, MinedAnchors, anchors_of_clips, read_segments
from uss_jax.evaluation.items import samples_digest
from uss_jax.ontology import load_ontology

MANIFEST = "manifest.csv"
PAIRINGS = ("conflict_free", "reference")
_COLUMNS = (
    "file",
    "class_index",
    "class_name",
    "id",
    "begin_sample",
    "partner_id",
    "partner_class_index",
    "partner_begin_sample",
    "group",
    "source_sha256",
    "mixture_sha256",
)
_PAIRS_AT_A_TIME = 64
_REFERENCE_BATCH = 32  # batch size of the reference, whose mixer pairs neighbours in a batch
_MOST_PAIRS = 10_000_000  # 2.5 TB of files


@dataclasses.dataclass(frozen=True)
class MadePairs:
    """Counts returned by `make_pairs`.

    Attributes:
      pairs: number of pairs written.
      classes: number of their classes.
      without_partner: number of clips left out because the split has no clip of unrelated classes.
      silent: number of pairs left out because an anchor is below -60 dBFS; always 0 with the
        pairing "reference", which keeps them.
    """

    pairs: int
    classes: int
    without_partner: int
    silent: int


def make_pairs(
    reader: ClipReader,
    model: Model,
    out: str | os.PathLike,
    *,
    per_class: int,
    seed: int,
    groups: dict[str, str],
    overwrite: bool,
    pairing: str = PAIRINGS[0],
) -> MadePairs:
    """Makes the same number of pairs for each class of a split; writes the folder atomically.

    A pair's source is the anchor of a clip's class, found as in training. Its mixture adds the
    anchor of another clip, scaled to the same energy over the segment, so that nearly all mixtures
    have 0 dB SDR.

    Args:
      reader: reader of the split's records.
      model: model with the detector, the sampling rate and the segment length.
      out: folder to make.
      per_class: pairs per class, before those counted in `MadePairs` are left out.
      seed: seed of all random choices.
      groups: id of a clip -> its group, for the manifest; may be empty.
      overwrite: whether to replace an existing folder of pairs.
      pairing: one of PAIRINGS, see `draw_pairs`.
    """
    out = pathlib.Path(out)
    _check_free(out, overwrite)
    classes = len(np.unique(reader.index.label_class))
    if per_class * classes > _MOST_PAIRS:
        raise UserError(
            f"{per_class} pairs for each of {counted(classes, 'class', 'classes')} exceed the "
            f"limit of {_MOST_PAIRS:,} pairs; give a smaller --per-class"
        )
    source, partner, without_partner = draw_pairs(reader.index, per_class, seed, pairing)
    min_dbfs = None if pairing == "reference" else MIN_DBFS
    table = _mine_distinct(reader, model, min_dbfs, source, partner)
    with replacing_folder(out) as unfinished:
        unfinished.mkdir()
        rows, silent = [], 0
        ranges = range(0, len(source.records), _PAIRS_AT_A_TIME)
        for first in tqdm(ranges, desc="make-pairs", disable=None):
            some = slice(first, first + _PAIRS_AT_A_TIME)
            made = _write_some(
                reader, model, unfinished, table, min_dbfs, source, partner, some, first
            )
            rows += made
            silent += len(source.records[some]) - len(made)
        if not rows:
            raise UserError("every anchor of the split is silent; check its recordings")
        for row in rows:
            row["group"] = groups.get(row["id"], "")
        _write_manifest(unfinished / MANIFEST, rows)
    classes = len({row["class_index"] for row in rows})
    return MadePairs(len(rows), classes, without_partner, silent)


def draw_pairs(
    index: RecordIndex, per_class: int, seed: int, pairing: str = PAIRINGS[0]
) -> tuple[Chosen, Chosen, int]:
    """Draws (sources, partners, number of sources left out because they have no partner).

    Sources follow the balanced order: all classes equally often, and no clip of a class twice
    before every other one once. With the pairing "conflict_free" the partner's class is drawn
    first, to balance partners too, then a clip with no label equal to, above or below a label of
    the source's clip in the ontology. With "reference" the partner is the next source in a batch of
    32, whatever its classes; the last source of a batch is paired with the first.
    """
    order = BalancedOrder(index.label_row, index.label_class, seed)
    wanted = per_class * order.round_length
    if pairing == "reference":
        batches = -(-wanted // _REFERENCE_BATCH)
        return _next_ones(*order.draw(np.arange(batches * _REFERENCE_BATCH)), wanted)
    records, classes = order.draw(np.arange(wanted))
    arranged = np.argsort(classes, kind="stable")  # pairs are numbered class by class
    records, classes = records[arranged], classes[arranged]
    clips = _Clips(index)
    partners = [
        clips.draw_unrelated(int(record), np.random.default_rng([seed, at]))
        for at, record in enumerate(records)
    ]
    found = np.array([partner is not None for partner in partners])
    if not found.any():
        raise UserError(
            "no two clips of the split have unrelated classes; a mixture needs two such clips"
        )
    chosen = np.array([partner for partner in partners if partner is not None])
    return (
        Chosen(records[found].astype(np.int64), classes[found].astype(np.int64)),
        Chosen(chosen[:, 0], chosen[:, 1]),
        int((~found).sum()),
    )


def _next_ones(
    records: Integer[np.ndarray, " n"], classes: Integer[np.ndarray, " n"], wanted: int
) -> tuple[Chosen, Chosen, int]:
    """Pairs the first `wanted` sources with the next in their batch; n is a multiple of 32."""
    records, classes = records.astype(np.int64), classes.astype(np.int64)
    batches = np.arange(len(records)).reshape(-1, _REFERENCE_BATCH)
    partners = np.roll(batches, -1, axis=1).ravel()[:wanted]
    arranged = np.argsort(classes[:wanted], kind="stable")
    chosen = partners[arranged]
    return (
        Chosen(records[arranged], classes[arranged]),
        Chosen(records[chosen], classes[chosen]),
        0,
    )


class _Clips:
    """Indexes clips by class, to draw partners."""

    def __init__(self, index: RecordIndex):
        self._labels = [frozenset(index.labels(record).tolist()) for record in range(len(index))]
        self._of_class: dict[int, list[int]] = {}
        for record, labels in enumerate(self._labels):
            for label in labels:
                self._of_class.setdefault(label, []).append(record)

    def draw_unrelated(self, record: int, rng: np.random.Generator) -> tuple[int, int] | None:
        """Draws the (record, class) of a partner with unrelated labels; None if there is none."""
        relatives = load_ontology().relatives
        related = frozenset().union(*(relatives(label) for label in self._labels[record]))
        for label in rng.permutation(sorted(self._of_class.keys() - related)).tolist():
            for partner in rng.permutation(self._of_class[label]).tolist():
                if not self._labels[partner] & related:
                    return partner, label
        return None


def _mine_distinct(
    reader: ClipReader, model: Model, min_dbfs: float | None, *chosen: Chosen
) -> dict[tuple[int, int], tuple[int, int]]:
    """Mines each distinct (record, class) once; returns its anchor's (begin sample, samples)."""
    keys = {key for some in chosen for key in zip(some.records, some.classes, strict=True)}
    keys = sorted((int(record), int(label)) for record, label in keys)
    records, classes = np.array(keys).T
    anchors = anchors_of_clips(
        reader, Chosen(records, classes), model.sed, model.segment_samples, min_dbfs=min_dbfs
    )
    places = zip(anchors.begin_sample.tolist(), anchors.samples.tolist(), strict=True)
    return dict(zip(keys, places, strict=True))


def _write_some(
    reader: ClipReader,
    model: Model,
    folder: pathlib.Path,
    table: dict[tuple[int, int], tuple[int, int]],
    min_dbfs: float | None,
    source: Chosen,
    partner: Chosen,
    some: slice,
    first: int,
) -> list[dict[str, object]]:
    """Writes the pairs of a slice except silent ones; returns their manifest rows."""
    keys, segments = [], []
    for side in (source, partner):
        pairs = zip(side.records[some].tolist(), side.classes[some].tolist(), strict=True)
        keys.append(list(pairs))
        begin, samples = np.array([table[key] for key in keys[-1]]).T
        segments.append(
            read_segments(
                reader, side.records[some], MinedAnchors(begin, samples), model.segment_samples
            )
        )
    mixtures = mixed_pairs(*segments)
    segments[0], mixtures = within_full_scale(segments[0], mixtures)
    written = np.ones(len(mixtures), bool)
    if min_dbfs is not None:
        for side in segments:
            written &= np.mean(np.square(side), axis=1) >= 10 ** (min_dbfs / 10)
    rows = []
    for row in np.flatnonzero(written).tolist():
        (record, label), (other, other_label) = keys[0][row], keys[1][row]
        name = f"class_id={label}/{first + row:06d}"
        (folder / f"class_id={label}").mkdir(exist_ok=True)
        digests = {}
        for what, waveform in (("source", segments[0][row]), ("mixture", mixtures[row])):
            write_wav(folder / f"{name}.{what}.wav", waveform[None], model.sample_rate)
            # Not a checksum of the file, which contains the time of writing.
            digests[f"{what}_sha256"] = samples_digest(waveform)
        rows.append(
            {
                "file": name,
                "class_index": label,
                "class_name": load_ontology().class_names[label],
                "id": _id(reader, record),
                "begin_sample": table[record, label][0],
                "partner_id": _id(reader, other),
                "partner_class_index": other_label,
                "partner_begin_sample": table[other, other_label][0],
                **digests,
            }
        )
    return rows


def mixed_pairs(
    source: Float[np.ndarray, "n s"], partner: Float[np.ndarray, "n s"]
) -> Float[np.ndarray, "n s"]:
    """Adds partners to sources at equal energy, with the gain clipped to [0.02, 50]."""
    energy, other = (np.mean(np.square(side), axis=1) for side in (source, partner))
    gain = matching_gain(energy, other, np)
    return source + partner * gain[:, None].astype(np.float32)


def within_full_scale(
    source: Float[np.ndarray, "n s"], mixture: Float[np.ndarray, "n s"]
) -> tuple[Float[np.ndarray, "n s"], Float[np.ndarray, "n s"]]:
    """Scales a pair to a peak of 1 if its mixture is so loud that no reader would accept it."""
    peak = np.abs(mixture).max(axis=1, keepdims=True)
    scale = np.where(peak > PEAK_LIMIT, 1 / np.maximum(peak, 1), 1).astype(np.float32)
    return source * scale, mixture * scale


def _id(reader: ClipReader, record: int) -> str:
    return reader.index.ids[record].decode(errors="surrogateescape")


def _check_free(out: pathlib.Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is not a folder of pairs; choose another name")
    if not overwrite:
        raise UserError(f"{out} already holds pairs; give --overwrite to replace them")


def _write_manifest(path: pathlib.Path, rows: Iterable[dict[str, object]]) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
