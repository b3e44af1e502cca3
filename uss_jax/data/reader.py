"""Random access to clips through their index."""

import os

import numpy as np
from jaxtyping import Int16

from uss_jax.data.encodings import SAMPLE_BYTES, decode
from uss_jax.data.index import RecordIndex, check_size
from uss_jax.data.storage import open_folder
from uss_jax.data.tfrecord import CHECKSUM, HEADER, DamagedRecord, damage, masked_crc
from uss_jax.errors import UserError


class ClipReader:
    """Random access to the samples of indexed clips; many threads may read at once.

    Attributes:
      index: the index it reads through.
    """

    def __init__(
        self, directory: str | os.PathLike, index: RecordIndex, verify_parts: bool = False
    ):
        """
        Args:
          directory: where the shards are.
          index: of a split.
          verify_parts: read all of a record and check it where only a part is asked for.
        """
        self.index = index
        self._verify_parts = verify_parts
        self._folder = open_folder(directory)
        self._shards: list[str] = index.shards.tolist()
        self._checked: set[int] = set()

    def read(
        self, record: int, begin: int = 0, length: int | None = None
    ) -> Int16[np.ndarray, " t"]:
        """The samples of a clip, or `length` of them from `begin`.

        Whole clips are checked against their checksum; parts cannot be, unless all is read (as is
        needed for FLAC and the like); they are checked against the size of the file. Damage is a
        UserError that names shard and byte.
        """
        samples = int(self.index.samples[record])
        length = samples - begin if length is None else length
        if not 0 <= begin <= begin + length <= samples:
            raise ValueError(f"samples {begin} to {begin + length} of a clip of {samples}")
        encoding = self.index.encoding
        width = SAMPLE_BYTES.get(encoding)
        if width is not None and length < samples and not self._verify_parts:
            offset = int(self.index.audio_offset[record]) + begin * width
            return decode(self._pread(record, offset, length * width), encoding)
        try:
            whole = decode(self._read_whole(record), encoding)
        except ValueError as error:
            raise self._damage(record, str(error)) from error
        if len(whole) != samples:
            raise self._damage(record, f"holds {len(whole)} samples, {samples} were indexed")
        return whole[begin : begin + length]

    def _read_whole(self, record: int) -> memoryview:
        index = self.index
        offset, size = int(index.record_offset[record]), int(index.record_bytes[record])
        payload = self._pread(record, offset, size)
        if masked_crc(payload) != CHECKSUM.unpack(self._pread(record, offset + size, 4))[0]:
            raise self._damage(record, "has a wrong checksum")
        begin = int(index.audio_offset[record]) - offset
        return memoryview(payload)[begin : begin + int(index.audio_bytes[record])]

    def _pread(self, record: int, offset: int, size: int) -> bytes:
        index, number = self.index, int(self.index.record_shard[record])
        shard = self._shards[number]
        try:
            if number not in self._checked:
                expected = int(index.shard_bytes[number])
                check_size(self._folder, shard, self._folder.size(shard), expected)
                self._checked.add(number)
            data = self._folder.read(shard, offset, size)
        except OSError as error:
            raise UserError(
                f"{self._path(record)} cannot be read ({error.strerror}); copy it again"
            ) from error
        if len(data) < size:
            raise self._damage(record, "is cut off")
        return data

    def _damage(self, record: int, what: str) -> DamagedRecord:
        begin = int(self.index.record_offset[record]) - HEADER.size
        return damage(self._path(record), begin, what)

    def _path(self, record: int) -> str:
        return f"{self._folder}/{self.index.shards[self.index.record_shard[record]]}"

    def close(self) -> None:
        """Closes the shards; reading opens them again."""
        self._folder.close()
