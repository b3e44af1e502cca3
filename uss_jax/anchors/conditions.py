"""Mined conditions: the query net's vector of every mined anchor, beside the table of anchors.

A frozen query net gives an anchor the same vector in every epoch, so `mine --query` computes it
once. What is stored is the output of the tagging net, before class vectors or an adaptor. A table
of anchors and its conditions have the same rows. The conditions are a folder: `header.json`, and an
array of float16 for the rows of each record shard, which is mapped into memory and read by row.

Letters: `r` rows of the table, `k` anchors of a row, `n` rows to read, `w` width of a vector, `b`
clips of a batch, `t` samples of a clip.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int16, Integer

from uss_jax.anchors.table import AnchorTable
from uss_jax.bundles.nets import build_tagger
from uss_jax.data.index import RecordIndex
from uss_jax.devices.batching import in_batches
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_json import list_of, record, text, whole
from uss_jax.disk.checked_npz import Column, map_npy
from uss_jax.disk.folder import HEADER, read_header, require_stamp, sha256_of, stamp_of
from uss_jax.errors import UserError
from uss_jax.models.query import probabilities_of, weights_of
from uss_jax.models.tagging import TaggingNet
from uss_jax.ontology import load_ontology

FORMAT_VERSION = 1
# Outputs of a tagging net that are conditions, see models/query.py.
OUTPUTS = ("clipwise", "embedding")
_AGAIN = "mine again with `uss-jax mine --query`"
_SHARDS_KEPT = 128  # open maps, each of which holds a file descriptor
_HEADER = record(
    {
        "format_version": whole(FORMAT_VERSION, FORMAT_VERSION),
        "query_hash": text(),
        "query_model": record({}, others=True),
        "output": text(*OUTPUTS),
        "width": whole(1, 100_000),
        "anchors_digest": text(),
        "shard_digests": list_of(text()),
    },
    others=True,
)


def folder_of(table: str | os.PathLike) -> pathlib.Path:
    """Returns the folder of the conditions that are mined with a table."""
    return pathlib.Path(table).with_suffix(".conditions")


@dataclasses.dataclass(frozen=True)
class ConditionTable:
    """The vectors of every anchor of a table.

    Shards are opened when they are read, in each process anew.

    Attributes:
      path: the folder.
      header: `query_hash`, `query_model`, `output`, `width`, `anchors_digest`, and the SHA-256 of
        each shard's file, `shard_digests`.
      first_row: [shards + 1] first row of each record shard, and the number of rows.
      anchors: anchors of a row, k.
      stamp: what tells the header's file from that of a later mining.
    """

    path: pathlib.Path
    header: dict[str, Any]
    first_row: Integer[np.ndarray, "_"]
    anchors: int
    stamp: tuple[int, ...]

    @property
    def width(self) -> int:
        """Width of a vector."""
        return self.header["width"]

    def mined_with(self, tagger: TaggingNet, tagger_hash: str) -> bool:
        """Returns whether the vectors are of this tagging net, with variables of this hash."""
        # Built again, so that fields which older versions did not write have their defaults.
        model = build_tagger(self.header["query_model"], "query", f"{self.path}: query_model")
        return model == tagger and tagger_hash == self.header["query_hash"]

    @property
    def digest(self) -> str:
        """Hash of the header, and so of all vectors; a resumed run must use the same."""
        return hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()

    def read(
        self, rows: Integer[np.ndarray, " n"], chosen: Integer[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n w"]:
        """Returns the vectors of one anchor of each row, as float32.

        Raises:
          UserError: a vector is not finite.
        """
        shards = np.searchsorted(self.first_row, rows, side="right") - 1
        vectors = np.empty((len(rows), self.width), np.float32)
        for shard in np.unique(shards):
            at = shards == shard
            vectors[at] = self._shards(int(shard))[rows[at] - self.first_row[shard], chosen[at]]
        if not np.isfinite(vectors).all():
            raise UserError(f"{self.path} is damaged: it holds NaN or infinite values; {_AGAIN}")
        return vectors

    def require_shards(self, verify: bool = False) -> None:
        """Opens every shard once.

        Args:
          verify: whether to read the shards too, and compare their digests.

        Raises:
          UserError: a shard is missing, damaged, or not of its shape.
        """
        for number in range(len(self.first_row) - 1):
            self._open(number)
            path = _shard(self.path, number)
            if verify and path.exists() and sha256_of(path) != self.header["shard_digests"][number]:
                raise UserError(f"{path} does not match its digest in {HEADER}; {_AGAIN}")

    @functools.cached_property
    def _shards(self) -> Callable[[int], np.ndarray]:
        return functools.lru_cache(_SHARDS_KEPT)(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _open(self, number: int) -> Float[np.ndarray, "r k w"]:
        """Maps the vectors of a record shard into memory."""
        path = _shard(self.path, number)
        rows = int(self.first_row[number + 1] - self.first_row[number])
        lengths = {"r": rows, "k": self.anchors, "w": self.width}
        if not rows:
            return np.zeros(tuple(lengths.values()), np.float16)
        try:
            found = map_npy(path, "vectors", Column("f2", "r k w"), lengths)
            require_stamp(self.path, self.stamp, "its vectors were")
            return found
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing; copy the folder again, or {_AGAIN}") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({error}); {_AGAIN}") from error


def open_conditions(
    path: str | os.PathLike, table: AnchorTable, index: RecordIndex, *, verify: bool = False
) -> ConditionTable:
    """Opens the conditions of a table's anchors.

    Args:
      path: their folder.
      table: the table.
      index: index of the records.
      verify: whether to read all vectors, and compare their digests.

    Raises:
      UserError: they cannot be read, are damaged, or are of other anchors.
    """
    path = pathlib.Path(path)
    stamp, header = stamp_of(path), read_conditions_header(path)
    shards = len(index.shards)
    if header["anchors_digest"] != table.digest or len(header["shard_digests"]) != shards:
        raise UserError(
            f"{path} holds the conditions of other anchors than those of config.anchors.table; "
            f"give the table that it was mined with, or {_AGAIN}"
        )
    of_shard = np.searchsorted(index.record_shard, np.arange(shards + 1))
    first_row = index.label_row[of_shard].astype(np.int64)
    found = ConditionTable(path, header, first_row, table.begin_sample.shape[1], stamp)
    found.require_shards(verify)
    return found


def class_means(
    conditions: ConditionTable,
    index: RecordIndex,
    usable: Bool[np.ndarray, "_"],
    weighs: bool = False,
) -> Float[np.ndarray, "k w"]:
    """Averages the vectors of the best usable anchors of each class; 0 for a class without one.

    Reads the vectors of all best anchors: of AudioSet's 5 M labels, 5 GB of probabilities.

    Args:
      conditions: the vectors.
      index: index of the records.
      usable: marks the labels whose anchors are averaged.
      weighs: return the probabilities whose weights are the mean weights. Their condition is then
        the mean of the conditions, where these are made of weights.
    """
    classes = len(load_ontology().class_mids)
    total = np.zeros((classes, conditions.width), np.float64)
    label_class = index.label_class.astype(np.int64)
    for begin, end in zip(conditions.first_row[:-1], conditions.first_row[1:], strict=True):
        rows = begin + np.flatnonzero(usable[begin:end])
        if not rows.size:
            continue
        rows = rows[np.argsort(label_class[rows], kind="stable")]
        of_shard, first = np.unique(label_class[rows], return_index=True)
        vectors = conditions.read(rows, np.zeros_like(rows)).astype(np.float64)
        vectors = weights_of(vectors, np) if weighs else vectors
        total[of_shard] += np.add.reduceat(vectors, first)
    count = np.bincount(label_class[usable], minlength=classes)
    mean = total / np.maximum(count, 1)[:, None]
    return (probabilities_of(mean, np) if weighs else mean).astype(np.float32)


def read_conditions_header(path: pathlib.Path) -> dict[str, Any]:
    """Reads the header of a folder of conditions.

    Raises:
      UserError: it cannot be read.
    """
    return read_header(path, _HEADER, "a folder of mined conditions", _AGAIN)


def write_header(path: pathlib.Path, header: Mapping[str, Any]) -> None:
    """Writes the header into a folder whose shards are all there."""
    with replacing(path / HEADER) as temporary:
        temporary.write_text(json.dumps(header, indent=2) + "\n")


def write_shard(path: pathlib.Path, number: int, vectors: Float[np.ndarray, "r k w"]) -> str:
    """Writes the vectors of a record shard atomically, and returns the file's SHA-256."""
    file = _shard(path, number)
    with replacing(file) as temporary:
        np.save(temporary, vectors)
    return sha256_of(file)


def _shard(path: pathlib.Path, number: int) -> pathlib.Path:
    return path / f"{number:05d}.npy"


def vectors_of_anchors(
    compute: Callable[[Int16[np.ndarray, "n s"]], Float[np.ndarray, "n w"]],
    audio: Int16[np.ndarray, "b t"],
    clips: Integer[np.ndarray, " r"],
    begin_sample: Integer[np.ndarray, "r k"],
    score: Float[np.ndarray, "r k"],
    *,
    width: int,
    segment_samples: int,
    batch_size: int,
) -> Float[np.ndarray, "r k w"]:
    """Computes the vectors of the anchors of a batch of clips; zeros where there is no anchor.

    Labels of a clip often share an anchor, which is computed once.

    Args:
      compute: maps `batch_size` segments to their vectors.
      audio: the clips.
      clips: row in `audio` of each row of the table.
      begin_sample, score: columns of the table.
      width: width of a vector, w.
      segment_samples: length of an anchor, s.
      batch_size: segments computed at a time.

    Raises:
      UserError: a vector exceeds the range of float16.
    """
    row, anchor = np.nonzero(score >= 0)
    places = np.stack([clips[row], begin_sample[row, anchor].astype(np.int64)], axis=1)
    places, which = np.unique(places, axis=0, return_inverse=True)
    found = []
    for some, count in in_batches(places.tolist(), batch_size):
        segments = np.stack([audio[clip, begin : begin + segment_samples] for clip, begin in some])
        found.append(compute(segments)[:count])
    vectors = np.zeros((*score.shape, width), np.float16)
    if found:
        with np.errstate(over="ignore"):
            small = np.concatenate(found).astype(np.float16)
        if not np.isfinite(small).all():
            raise UserError(
                "the query net gives values that are NaN, or beyond the range of float16, +-65504; "
                "leave out --query, so that training computes its conditions"
            )
        vectors[row, anchor] = small[which.ravel()]
    return vectors
