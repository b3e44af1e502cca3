"""Sentence vectors of the captions of a split's clips, for training with texts.

A folder: `header.json`; `row.npy`, the row of each record's vector, -1 for a record without a
caption; `vectors.npy`, float16, which is mapped into memory and read by row.

Letters: `n` records or captions to read, `t` width of a sentence vector.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from uss_jax.data.index import RecordIndex
from uss_jax.data.storage import open_folder
from uss_jax.data.tf_example import caption_of
from uss_jax.devices.batching import in_batches
from uss_jax.disk.atomic import replacing_folder
from uss_jax.disk.checked_json import record, text, whole
from uss_jax.disk.checked_npz import Column, map_npy
from uss_jax.disk.folder import HEADER, read_header, require_stamp, sha256_of, stamp_of
from uss_jax.errors import UserError

FORMAT_VERSION = 1
_ROW, VECTORS = "row.npy", "vectors.npy"
_AGAIN = "make it again with `uss-jax captions`"
# Different captions encoded at a time; each encoder batch has sentences of about one length.
_AT_A_TIME = 4096
_HEADER = record(
    {
        "format_version": whole(FORMAT_VERSION, FORMAT_VERSION),
        "encoder": text(),
        "index_digest": text(),
        "captions": whole(1, 1 << 40),
        "width": whole(1, 1 << 16),
        "digest": text(),
    },
    others=True,
)


@dataclasses.dataclass(frozen=True)
class CaptionTable:
    """The vectors of the captions; files are opened when they are read, in each process anew.

    Attributes:
      path: the folder.
      header: `encoder`, hash of the sentence encoder; `index_digest`; `captions`, their number;
        `width` of a vector; `digest`, the SHA-256 of both arrays' files.
      records: number of records.
      stamp: what tells the header's file from a later one.
    """

    path: pathlib.Path
    header: dict[str, Any]
    records: int
    stamp: tuple[int, ...]

    def read(
        self, records: Integer[np.ndarray, " n"]
    ) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, "_ t"]]:
        """Returns which records have a caption, and the vectors of these, as float32.

        Raises:
          UserError: the folder is damaged.
        """
        rows, vectors = self._arrays
        at = np.asarray(rows[records])
        there = at >= 0
        if (at >= len(vectors)).any():
            raise UserError(f"{self.path} is damaged: {_ROW} has too large a row; {_AGAIN}")
        found = np.asarray(vectors[at[there]], np.float32)
        if not np.isfinite(found).all():
            raise UserError(f"{self.path} is damaged: it holds NaN or infinite values; {_AGAIN}")
        return there, found

    @property
    def share(self) -> float:
        """Share of the records that have a caption."""
        return float(np.mean(self._arrays[0] >= 0))

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        shape = {"r": self.records, "n": self.header["captions"], "t": self.header["width"]}
        try:
            rows = map_npy(self.path / _ROW, "row", Column("i8", "r"), shape)
            vectors = map_npy(self.path / VECTORS, "vectors", Column("f2", "n t"), shape)
            require_stamp(self.path, self.stamp, "it was")
            return rows, vectors
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path} cannot be read ({words}); {_AGAIN}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def open_captions(path: str | os.PathLike, index: RecordIndex, encoder: str) -> CaptionTable:
    """Opens the captions of a split, and compares the digest of their files.

    Args:
      path: the folder.
      index: index of the split.
      encoder: hash of the sentence encoder of the run.

    Raises:
      UserError: it cannot be read, is damaged, or is of other records or another encoder.
    """
    path = pathlib.Path(path)
    stamp, header = stamp_of(path), read_captions_header(path)
    try:
        digest = _digest(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    if digest != header["digest"]:
        raise UserError(f"{path} does not match its digest in {HEADER}; {_AGAIN}")
    if not index.has_digest(header["index_digest"]):
        raise UserError(
            f"{path} holds the captions of other records than those of this run; {_AGAIN}"
        )
    if header["encoder"] != encoder:
        raise UserError(
            f"{path} was made with another sentence encoder than the names of the classes; give "
            "config.query.text_encoder that one"
        )
    table = CaptionTable(path, header, len(index), stamp)
    table.read(np.zeros(1, np.int64))
    return table


def read_captions_header(path: pathlib.Path) -> dict[str, Any]:
    """Reads the header of a folder of captions.

    Raises:
      UserError: it cannot be read.
    """
    return read_header(path, _HEADER, "a folder of captions", _AGAIN)


def captions_of(
    directory: str | os.PathLike, index: RecordIndex, feature: str, progress: Callable[[], object]
) -> Iterator[str]:
    """Yields the caption of each record in order; calls `progress` after each.

    It is "" for none, also for one without a letter or digit. Of several, it is the first.

    Args:
      directory: directory of the shards.
      index: index of the split.
      feature: name of the feature that holds captions.
      progress: called after each record.

    Raises:
      UserError: a record cannot be read, or its caption is not text.
    """
    folder = open_folder(directory)
    for shard in index.shards.tolist():
        for offset, _, payload in index.container.scan(f"{folder}/{shard}"):
            try:
                caption = " ".join(caption_of(payload, feature).split())
            except ValueError as error:
                raise UserError(f"{folder}/{shard}: the record at byte {offset} {error}") from error
            yield caption if any(map(str.isalnum, caption)) else ""
            progress()


def write_captions(
    path: str | os.PathLike,
    captions: Sequence[str],
    encode: Callable[[Sequence[str]], Float[np.ndarray, "n t"]],
    width: int,
    encoder: str,
    index: RecordIndex,
    progress: Callable[[int], object],
) -> int:
    """Encodes captions, each different one once, and writes the folder.

    Args:
      path: the folder, which is replaced.
      captions: caption of each record, "" for none.
      encode: maps sentences to vectors.
      width: width of a vector.
      encoder: hash of the sentence encoder.
      index: index of the records.
      progress: called with the number of captions encoded.

    Returns:
      The number of different captions; nothing is written if it is 0.
    """
    row_of: dict[str, int] = {}
    rows = [row_of.setdefault(caption, len(row_of)) if caption else -1 for caption in captions]
    if not row_of:
        return 0
    vectors, done = np.zeros((len(row_of), width), np.float16), 0
    for some, count in in_batches(list(row_of), _AT_A_TIME):
        vectors[done : done + count] = encode(some[:count])
        done += count
        progress(count)
    with replacing_folder(path) as unfinished:
        unfinished.mkdir()
        np.save(unfinished / _ROW, np.array(rows, np.int64))
        np.save(unfinished / VECTORS, vectors)
        header = {
            "format_version": FORMAT_VERSION,
            "encoder": encoder,
            "index_digest": index.digest,
            "captions": len(vectors),
            "width": width,
            "digest": _digest(unfinished),
        }
        (unfinished / HEADER).write_text(json.dumps(header, indent=2) + "\n")
    return len(vectors)


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for name in (_ROW, VECTORS):
        digest.update(bytes.fromhex(sha256_of(path / name)))
    return digest.hexdigest()
