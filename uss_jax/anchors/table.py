"""Mined anchors: a table of the anchors of every label of every clip, and how they are drawn.

A table has one row per (clip, label), in the order of the index, so that a label has the same
position in both.

Letters: `r` rows, `k` anchors of a row, `n` positions of the training order.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.bundles.nets import build_tagger
from uss_jax.data.index import RecordIndex
from uss_jax.data.permutation import ANCHORS, JITTER, uniform
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_json import either, nothing, number, parse_json, record, text, whole
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError
from uss_jax.models.tagging import TaggingNet, as_detector

FORMAT_VERSION = 1
COLUMNS = {
    "record": Column("u4", "r"),
    "class": Column("u2", "r"),
    "begin_sample": Column("u4", "r k"),
    "score": Column("f4", "r k"),
    "purity": Column("f2", "r"),
    "rms_db": Column("f2", "r"),
}
_AGAIN = "mine again with `uss-jax mine`"
_SAMPLES = whole(1, 2**31)
_HEADER = record(
    {
        "sed_hash": text(),
        "index_digest": text(),
        "sample_rate": whole(LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE),
        "segment_samples": _SAMPLES,
        "clip_samples": _SAMPLES,
    },
    {
        "candidates": whole(1, 10**6),
        "min_dbfs": either(nothing(), number()),
        "rule": text(),
        "sed_model": record({}, others=True),
    },
    others=True,
)


@dataclasses.dataclass(frozen=True)
class AnchorTable:
    """The anchors of every label of every clip.

    Attributes:
      header: `sed_hash`, `index_digest`, `sample_rate` in Hz, `segment_samples`, `clip_samples` and
        further settings of the mining; `sed_model`, the detector's fields, which tables of older
        versions lack.
      begin_sample: [r, k] first sample of the best anchor, then of non-overlapping runners-up.
      score: [r, k] mean probability of the label; -1 if there is no such anchor.
      purity: [r] in the best anchor, the largest mean probability of a class that is no label of
        the clip, nor an ancestor or descendant of one; small is pure.
      rms_db: [r] level of the best anchor, in dB of full scale.
    """

    header: dict[str, Any]
    begin_sample: Integer[np.ndarray, "r k"]
    score: Float[np.ndarray, "r k"]
    purity: Float[np.ndarray, " r"]
    rms_db: Float[np.ndarray, " r"]

    @classmethod
    def of(cls, header: dict[str, Any], columns: dict[str, np.ndarray]) -> "AnchorTable":
        """Returns the table that these columns are when stored."""
        names = (field.name for field in dataclasses.fields(cls) if field.name != "header")
        return cls(header, **{name: columns[name].astype(COLUMNS[name].dtype) for name in names})

    def __len__(self) -> int:
        return len(self.score)

    def rows(self, index: RecordIndex, records: Integer[np.ndarray, "_"]) -> dict[str, np.ndarray]:
        """Returns all columns of the rows of consecutive records."""
        first, end = (int(index.label_row[at]) for at in (records[0], records[-1] + 1))
        counts = np.diff(index.label_row.astype(np.int64))[records]
        names = (field.name for field in dataclasses.fields(self) if field.name != "header")
        return {
            "record": np.repeat(records, counts).astype(np.uint32),
            "class": index.label_class[first:end],
            **{name: getattr(self, name)[first:end] for name in names},
        }

    def mined_with(self, detector: TaggingNet, detector_hash: str) -> bool:
        """Returns whether the anchors are of this detector, with variables of this hash."""
        model = self.header.get("sed_model")
        if model is not None and build_tagger(model, "sed", "sed_model") != as_detector(detector):
            return False
        return detector_hash == self.header["sed_hash"]

    @property
    def digest(self) -> str:
        """Hash of header and anchors, the same in versions that state no `sed_model`.

        A resumed run must use the same.
        """
        header = {name: value for name, value in self.header.items() if name != "sed_model"}
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for column in (self.begin_sample, self.score, self.rms_db):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


def typed(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Casts the columns of a table to the dtypes in which they are stored."""
    return {name: columns[name].astype(column.dtype) for name, column in COLUMNS.items()}


def write_table(
    path: str | os.PathLike, header: dict[str, Any], columns: dict[str, np.ndarray]
) -> None:
    """Writes a table atomically."""
    with replacing(path) as temporary:
        np.savez(
            temporary, format_version=FORMAT_VERSION, header=json.dumps(header), **typed(columns)
        )


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the header of a table.

    Raises:
      UserError: the table cannot be read.
    """
    return _read(pathlib.Path(path))[0]


def read_table(
    path: str | os.PathLike,
    index: RecordIndex,
    segment_samples: int,
    asker: str = "the config",
    remedy: str = "change config.segment_seconds",
) -> AnchorTable:
    """Reads a table that was mined for these records and this segment length.

    Args:
      path: the table.
      index: index of the records.
      segment_samples: length of the segments, in samples.
      asker: what has this length, for the message.
      remedy: what to do if the table's is another, apart from mining again, for the message.

    Raises:
      UserError: the table cannot be read, is damaged, or has other records or segment length.
    """
    path = pathlib.Path(path)
    header, columns = _read(path)
    if not index.has_digest(header["index_digest"]):
        raise UserError(
            f"{path} was mined from other records (index digest {header['index_digest'][:12]}, "
            f"here {index.digest[:12]}); {_AGAIN}"
        )
    if header["segment_samples"] != segment_samples:
        raise UserError(
            f"{path} has anchors of {header['segment_samples']} samples, {asker} asks for "
            f"{segment_samples}; {remedy} or {_AGAIN}"
        )
    _check(path, columns, index, segment_samples)
    return AnchorTable.of(header, columns)


def _check(
    path: pathlib.Path, columns: dict[str, np.ndarray], index: RecordIndex, segment_samples: int
) -> None:
    """Raises a UserError if rows do not match the labels or values are out of range."""
    rows, labels = len(columns["record"]), len(index.label_class)
    if rows != labels:
        raise UserError(f"{path} is damaged: it has {rows} rows for {labels} labels; {_AGAIN}")
    record = np.repeat(np.arange(len(index)), np.diff(index.label_row.astype(np.int64)))
    latest = np.maximum(index.samples[record].astype(np.int64) - segment_samples, 0)
    score = columns["score"]
    for name, right in {
        "record": columns["record"] == record,
        "class": columns["class"] == index.label_class,
        "begin_sample": columns["begin_sample"] <= latest[:, None],
        # Mean probabilities, with a margin for rounding; -1 if there is no such anchor.
        "score": (score == -1) | ((score >= 0) & (score <= 1.001)),
        "purity": (columns["purity"] >= 0) & (columns["purity"] <= 1.001),
        "rms_db": ~np.isnan(columns["rms_db"]),
    }.items():
        if not right.all():
            raise UserError(f"{path} is damaged: invalid {name}; {_AGAIN}")


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with open(path, "rb", opener=at_once) as file:
            version = int(read_npz(file, {"format_version": Column("i8")})["format_version"])
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path} has format {version}, this program reads {FORMAT_VERSION}; {_AGAIN}"
                )
            columns = read_npz(file, {"header": Column("U"), **COLUMNS})
        header = parse_json(str(columns.pop("header")), _HEADER)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {_AGAIN}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a table of anchors ({error}); {_AGAIN}") from error
    return header, columns


def usable(
    table: AnchorTable, *, min_score: float, min_dbfs: float | None
) -> Bool[np.ndarray, "r"]:
    """Returns a mask of the rows whose best anchor is likely and loud enough to be drawn."""
    keep = table.score[:, 0] >= max(min_score, 0.0)
    return keep if min_dbfs is None else keep & (table.rms_db >= np.float16(min_dbfs))


def without(
    index: RecordIndex, keep: Bool[np.ndarray, "r"]
) -> tuple[Integer[np.ndarray, " _"], Integer[np.ndarray, " _"]]:
    """Returns the index's `label_row` and `label_class`, restricted to the labels kept."""
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    return kept_before[index.label_row.astype(np.int64)], index.label_class[keep]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Draws a label's anchor at a position, as a function of seed and position.

    Attributes:
      table: anchors of the records.
      index: index of the records.
      seed: seed of the run.
      top_k: number of best anchors to draw from, in proportion to their scores.
      min_score: lowest score at which a runner-up is drawn.
      jitter_samples: largest random shift, in samples, in either direction, inside the clip.
    """

    table: AnchorTable
    index: RecordIndex
    seed: int
    top_k: int = 1
    min_score: float = 0.0
    jitter_samples: int = 0

    def place(
        self,
        positions: Integer[np.ndarray, " n"],
        records: Integer[np.ndarray, " n"],
        classes: Integer[np.ndarray, " n"],
    ) -> tuple[Integer[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Returns begin sample and score of one anchor for each record and class."""
        rows, chosen = self.choose(positions, records, classes)
        begin = self.table.begin_sample[rows, chosen].astype(np.int64)
        if self.jitter_samples:
            width = 2 * self.jitter_samples + 1
            move = np.floor(uniform(self.seed, JITTER, positions) * width).astype(np.int64)
            samples = self.index.samples[records].astype(np.int64)
            latest = np.maximum(samples - self.table.header["segment_samples"], 0)
            begin = np.clip(begin + move - self.jitter_samples, 0, latest)
        return begin, self.table.score[rows, chosen]

    def choose(
        self,
        positions: Integer[np.ndarray, " n"],
        records: Integer[np.ndarray, " n"],
        classes: Integer[np.ndarray, " n"],
    ) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
        """Returns the table's row of each record and class, and the anchor drawn of it."""
        rows = self._rows(records, classes)
        chosen = np.zeros(len(rows), np.int64)
        if self.top_k > 1:
            score = self.table.score[rows, : self.top_k].astype(np.float64)
            weight = np.where(score >= max(self.min_score, 1e-9), score, 0.0).cumsum(axis=1)
            drawn = uniform(self.seed, ANCHORS, positions) * weight[:, -1]
            # If all weights are 0, the best anchor is taken.
            chosen = np.where(weight[:, -1] > 0, (drawn[:, None] >= weight).sum(axis=1), 0)
        return rows, chosen

    def _rows(self, records: np.ndarray, classes: np.ndarray) -> np.ndarray:
        first = self.index.label_row[records].astype(np.int64)
        longest = int((self.index.label_row[records + 1].astype(np.int64) - first).max())
        at = np.minimum(first[:, None] + np.arange(longest), len(self.index.label_class) - 1)
        return first + np.argmax(self.index.label_class[at] == classes[:, None], axis=1)
