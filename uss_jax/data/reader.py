"""Random access to clips through their index."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16

from uss_jax.data.container import DamagedRecord, damage
from uss_jax.data.encodings import SAMPLE_BYTES, decode_into
from uss_jax.data.index import RecordIndex, check_size
from uss_jax.data.storage import Range, open_folder
from uss_jax.errors import UserError


class ClipReader:
    """Random access to the samples of indexed clips; thread-safe.

    Attributes:
      index: index of the split.
    """

    def __init__(
        self, directory: str | os.PathLike, index: RecordIndex, verify_parts: bool = False
    ):
        """
        Args:
          directory: directory of the shards.
          index: index of the split.
          verify_parts: on partial reads, read the whole record and verify its checksum.
        """
        self.index = index
        self._verify_parts = verify_parts
        self._folder = open_folder(directory)
        self._shards: list[str] = index.shards.tolist()
        self._container = index.container
        self._checked: set[int] = set()

    def read(
        self, record: int, begin: int = 0, length: int | None = None
    ) -> Int16[np.ndarray, " t"]:
        """Returns `length` samples of a clip from `begin`, by default all; see `read_into`."""
        length = int(self.index.samples[record]) - begin if length is None else length
        row = np.empty((1, max(length, 0)), np.int16)
        for error in self.read_into(row, [record], [begin], [length]).values():
            raise error
        return row[0]

    def read_into(
        self,
        rows: Int16[np.ndarray, "b t"],
        records: Sequence[int],
        begin: Sequence[int],
        length: Sequence[int],
    ) -> dict[int, DamagedRecord]:
        """Reads a part of a clip into each row and fills the rest of the row with zeros.

        The checksum is verified where the whole record is read: for whole clips, for encodings
        without partial reads such as FLAC, and with `verify_parts`. Other partial reads are only
        checked against the size of the file.

        Args:
          rows: output buffer.
          records: record number of each row.
          begin, length: first sample and number of samples of each row.

        Returns:
          Maps the rows whose record is damaged to an error that names shard and byte.

        Raises:
          UserError: a shard cannot be read, or its size differs from the indexed one.
          ValueError: a part exceeds its clip or the row.
        """
        parts = [
            self._part(row, *of_row)
            for row, *of_row in zip(rows, records, begin, length, strict=True)
        ]
        for number in sorted({part.shard for part in parts} - self._checked):
            self._check_size(number)
        damaged = {}
        sizes = self._folder.read_into([part.range for part in parts])
        for row, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            if isinstance(size, OSError):
                raise self._unreadable(part.shard, size) from size
            rows[row, len(part.samples) :] = 0
            wrong = "is cut off" if size < part.range.size else self._finish(part)
            if wrong is not None:
                begins = int(self.index.record_offset[part.record]) - self._container.head
                damaged[row] = damage(self._path(part.shard), begins, wrong)
        return damaged

    def _part(self, row: Int16[np.ndarray, " t"], record: int, begin: int, length: int) -> "_Part":
        """Plans the read for a row: the byte range and its buffers."""
        index, encoding = self.index, self.index.encoding
        clip = int(index.samples[record])
        if not 0 <= begin <= begin + length <= clip:
            raise ValueError(
                f"samples {begin} to {begin + length} are not within a clip of {clip} samples"
            )
        if length > len(row):
            raise ValueError(f"{length} samples do not fit into a row of {len(row)}")
        shard, samples = int(index.record_shard[record]), row[:length]
        audio, width = int(index.audio_offset[record]), SAMPLE_BYTES.get(encoding)
        whole = width is None or length == clip or self._verify_parts
        # PCM is read directly into the output row.
        in_place = encoding == "pcm_s16le" and (length == clip or not whole)
        if not whole:
            offset = audio + begin * width
            own = samples.view(np.uint8) if in_place else np.empty(length * width, np.uint8)
            buffers = [own]
        else:
            offset = int(index.record_offset[record])
            size = int(index.record_bytes[record]) + self._container.tail
            if in_place:
                before = np.empty(audio - offset, np.uint8)
                after = np.empty(size - len(before) - samples.nbytes, np.uint8)
                buffers = [before, samples.view(np.uint8), after]
            else:
                buffers = [np.empty(size, np.uint8)]
        reads = Range(self._shards[shard], offset, buffers)
        return _Part(record, shard, begin, samples, reads, whole, in_place)

    def _finish(self, part: "_Part") -> str | None:
        """Verifies and decodes a part after reading; returns the defect, None if there is none."""
        data = part.range.buffers[-1]
        if part.whole and (defect := self._container.defect(part.range.buffers)) is not None:
            return defect
        if part.in_place:
            return None
        begin = 0
        if part.whole:
            at = int(self.index.audio_offset[part.record]) - part.range.offset
            data, begin = data[at : at + int(self.index.audio_bytes[part.record])], part.begin
        try:
            decode_into(part.samples, data.data, self.index.encoding, begin)
        except ValueError as error:
            return str(error)
        return None

    def _check_size(self, shard: int) -> None:
        """Raises a UserError if a shard's size differs from the indexed one."""
        name = self._shards[shard]
        try:
            size = self._folder.size(name)
        except OSError as error:
            raise self._unreadable(shard, error) from error
        check_size(self._folder, name, size, int(self.index.shard_bytes[shard]))
        self._checked.add(shard)

    def _unreadable(self, shard: int, error: OSError) -> UserError:
        return UserError(f"{self._path(shard)} cannot be read ({error.strerror}); copy it again")

    def _path(self, shard: int) -> str:
        return f"{self._folder}/{self._shards[shard]}"

    def close(self) -> None:
        """Closes the shards; reading opens them again."""
        self._folder.close()


@dataclasses.dataclass(frozen=True)
class _Part:
    """The part of a clip that fills one row.

    Attributes:
      record, shard: record and shard numbers.
      begin: first sample.
      samples: output buffer.
      range: bytes to read.
      whole: whether `range` covers the whole record and its checksum.
      in_place: whether the read fills `samples` directly, without decoding.
    """

    record: int
    shard: int
    begin: int
    samples: np.ndarray
    range: Range
    whole: bool
    in_place: bool
