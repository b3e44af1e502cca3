"""The index of a split: location and labels of each clip, stored beside the shards.

It gives the shard and byte offset of each clip's samples, so that a clip, or two seconds of it, is
one read; see data/reader.py. data/indexing.py builds it.
"""

import dataclasses
import functools
import hashlib
import os
import re
import struct

import numpy as np

from uss_jax.data.container import Container
from uss_jax.data.encodings import ENCODINGS, SAMPLE_BYTES
from uss_jax.data.shards import container_of, shards_of_split
from uss_jax.data.storage import Folder, open_folder
from uss_jax.data.tfrecord import masked_crc
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """Locations and labels of all clips of a split. Letters: s shards, r records, l labels.

    Attributes:
      shards: [s] file names, in order.
      shard_bytes: [s] file sizes, in bytes.
      shard_digest: [s] SHA-256 over every frame's offset, length and checksum.
      record_shard: [r] shard number of each record.
      record_offset, record_bytes: [r] byte range of its payload (a tf.train.Example) in the shard.
      audio_offset, audio_bytes: [r] byte range of its samples in the shard.
      samples: [r] number of samples.
      ids: [r] clip names, fixed-width bytes.
      label_row: [r + 1] record i has the labels label_class[label_row[i]:label_row[i + 1]].
      label_class: [l] class indexes, ascending within a record.
      encoding: encoding of the samples, see data/encodings.py.
    """

    shards: np.ndarray
    shard_bytes: np.ndarray
    shard_digest: np.ndarray
    record_shard: np.ndarray
    record_offset: np.ndarray
    record_bytes: np.ndarray
    audio_offset: np.ndarray
    audio_bytes: np.ndarray
    samples: np.ndarray
    ids: np.ndarray
    label_row: np.ndarray
    label_class: np.ndarray
    encoding: str = "pcm_s16le"

    def __len__(self) -> int:
        return len(self.record_shard)

    def labels(self, record: int) -> np.ndarray:
        """Returns the class indexes of a record."""
        return self.label_class[self.label_row[record] : self.label_row[record + 1]]

    def clip_ids(self) -> list[str]:
        """Returns the name of each record's clip."""
        return [id.decode(errors="surrogateescape") for id in self.ids]

    @property
    def container(self) -> Container:
        """Container of the shards."""
        return container_of(str(self.shards[0]))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the encoding and all columns; identifies the index."""
        digest = hashlib.sha256(self.encoding.encode())
        for name in COLUMNS:
            column = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
            digest.update(column.tobytes())
        return digest.hexdigest()

    def has_digest(self, digest: str) -> bool:
        """Returns whether a digest stored with a run or a table is that of this index.

        Also accepts the older digest, which covered only the shards.
        """
        return digest in (self.digest, self._digest_of_shards)

    @functools.cached_property
    def _digest_of_shards(self) -> str:
        parts = zip(self.shards.tolist(), self.shard_digest.tolist(), strict=True)
        return hashlib.sha256(repr(list(parts)).encode()).hexdigest()


COLUMNS = {
    "shards": Column("U", "s"),
    "shard_bytes": Column("u8", "s"),
    "shard_digest": Column("U", "s"),
    "record_shard": Column("u4", "r"),
    "record_offset": Column("u8", "r"),
    "record_bytes": Column("u4", "r"),
    "audio_offset": Column("u8", "r"),
    "audio_bytes": Column("u4", "r"),
    "samples": Column("u4", "r"),
    "ids": Column("S", "r"),
    "label_row": Column("u8", "q"),
    "label_class": Column("u2", "l"),
}
_FILE = {**COLUMNS, "encoding": Column("U", optional=True)}
# Upper bound for a valid index; the densest known encoding is silence in FLAC.
_MOST_SAMPLES_A_BYTE = 8192


def index_name(split: str) -> str:
    """Returns the file name of a split's index."""
    return f"index-{split}.npz"


def indexed_splits(folder: Folder) -> set[str]:
    """Returns the splits that have an index in a folder, which need not exist."""
    try:
        names = folder.sizes()
    except OSError:
        return set()
    found = (re.fullmatch(r"index-(.+)\.npz", name) for name in names)
    return {match[1] for match in found if match}


def frame_stamp(offset: int, length: int, payload: bytes) -> bytes:
    """Returns what `shard_digest` covers of a record: its payload's place and checksum."""
    return struct.pack("<QQI", offset, length, masked_crc(payload))


def load_index(directory: str | os.PathLike, split: str, verify: bool = False) -> RecordIndex:
    """Loads a split's index and checks that the shards still have their indexed sizes.

    Args:
      directory: directory of the shards.
      split: split name, such as "train".
      verify: also read every shard, verify its checksums and compare its digest.

    Raises:
      UserError: the index is missing or damaged, or does not match the shards.
    """
    folder = open_folder(directory)
    path = f"{folder}/{index_name(split)}"
    again = f"run `uss-jax index {folder}`"
    try:
        with folder.open(index_name(split)) as file:
            version = int(read_npz(file, {"format_version": Column("i8")})["format_version"])
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path} has format {version}, this program reads {FORMAT_VERSION}; {again}"
                )
            stored = read_npz(file, _FILE)
        index = RecordIndex(**{**stored, "encoding": str(stored.get("encoding", "pcm_s16le"))})
        _check(index)
    except (FileNotFoundError, NotADirectoryError):
        shards_of_split(directory, split)  # raises its own error if there are no shards
        raise UserError(f"{path} does not exist; {again}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {again}") from error
    sizes = folder.sizes()
    for shard, size in zip(index.shards.tolist(), index.shard_bytes.tolist(), strict=True):
        check_size(folder, shard, sizes.get(shard), size)
    if verify:
        for shard, expected in zip(index.shards, index.shard_digest, strict=True):
            digest = hashlib.sha256()
            for frame in index.container.scan(f"{folder}/{shard}"):
                digest.update(frame_stamp(*frame))
            if digest.hexdigest() != expected:
                raise UserError(f"{folder}/{shard} changed since it was indexed; {again}")
    return index


def _check(index: RecordIndex) -> None:
    """Raises a ValueError if an index of valid types and shapes is inconsistent."""
    records, row = len(index), index.label_row.astype(np.int64)
    width = SAMPLE_BYTES.get(index.encoding)
    if not len(index.shards) or len(set(index.shards.tolist())) < len(index.shards):
        raise ValueError("it lists no shards, or a shard twice")
    order = index.record_shard.astype(np.int64)
    sized = index.shard_bytes[np.minimum(order, len(index.shards) - 1)]
    # Cannot overflow: offsets are below the size of a real file, sizes have 32 bits.
    end = index.record_offset + index.record_bytes
    into_record = index.audio_offset - index.record_offset
    head, tail = index.container.head, index.container.tail
    for what, right in {
        "encoding": index.encoding in ENCODINGS,
        "shards": all(
            name and "/" not in name and name not in (".", "..") for name in index.shards.tolist()
        ),
        "record_shard": (order < len(index.shards)).all() and (np.diff(order) >= 0).all(),
        "shard_bytes": ((sized >= head + tail) & (sized < 2**63)).all(),
        "record_offset": (index.record_offset >= head).all()
        and (index.record_offset < sized).all()
        and (end <= sized - tail).all(),
        "audio_offset": (index.audio_offset >= index.record_offset).all()
        and (into_record + index.audio_bytes <= index.record_bytes).all()
        and (into_record < 2**32).all(),
        "samples": (index.samples > 0).all()
        and (
            (index.samples * np.uint64(width) == index.audio_bytes).all()
            if width
            else (index.samples <= index.audio_bytes * np.uint64(_MOST_SAMPLES_A_BYTE)).all()
        ),
        "label_row": len(row) == records + 1
        and row[0] == 0
        and row[-1] == len(index.label_class)
        and (np.diff(row) >= 0).all(),
        "label_class": (index.label_class < len(load_ontology().class_mids)).all(),
    }.items():
        if not right:
            raise ValueError(f"invalid {what}")
    ascending = np.diff(index.label_class.astype(np.int64)) > 0
    ascending[np.setdiff1d(row[1:-1], [0, len(index.label_class)]) - 1] = True
    if not ascending.all():
        raise ValueError("the labels of a record are not in ascending order")


def check_size(folder: Folder, shard: str, size: int | None, expected: int) -> None:
    """Raises a UserError if a shard is missing or its size differs from the indexed one."""
    if size is None:
        raise UserError(
            f"{folder}/{shard} is in the index but does not exist; copy the shard there or run "
            f"`uss-jax index {folder}`"
        )
    if size != expected:
        raise UserError(
            f"{folder}/{shard} has {size} bytes, it had {expected} when it was indexed; copy the "
            f"shard again or run `uss-jax index {folder}`"
        )
