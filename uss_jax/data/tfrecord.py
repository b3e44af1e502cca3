"""TFRecord shards: framing with checksums.

A shard is a sequence of frames: length (8 bytes), checksum of the length (4), payload, checksum of
the payload (4), all little-endian. The checksum is a masked crc32c.
"""

import os
import struct
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np

from uss_jax.data.container import Container, damage
from uss_jax.data.storage import open_folder, split_path
from uss_jax.errors import UserError

HEADER = struct.Struct("<QI")  # length, its checksum
CHECKSUM = struct.Struct("<I")


def masked_crc(*parts: bytes | np.ndarray) -> int:
    """Returns TFRecord's checksum: crc32c, rotated and offset so that data may contain checksums.

    Args:
      *parts: the data, in one or more pieces: bytes or contiguous arrays.
    """
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class RecordWriter:
    """Writes payloads to a shard, one frame each; a context manager."""

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115, closed in __exit__

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def write(self, payload: bytes) -> None:
        length = struct.pack("<Q", len(payload))
        self._file.write(length + CHECKSUM.pack(masked_crc(length)))
        self._file.write(payload)
        self._file.write(CHECKSUM.pack(masked_crc(payload)))


def scan_records(path: str | os.PathLike) -> Iterator[tuple[int, int, bytes]]:
    """Yields (byte offset of the payload, its length, payload) and verifies every checksum.

    Raises:
      DamagedRecord: a frame is damaged; names the shard and the byte where the frame begins.
      UserError: the shard is empty or cannot be read.
    """
    directory, name = split_path(path)
    folder = open_folder(directory)
    try:
        size = folder.size(name)
        file = folder.open(name)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a TFRecord file") from None
    with file:
        if size == 0:
            raise UserError(f"{path} is empty (0 bytes); copy or prepare it again")
        begin = 0
        while begin < size:
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                raise damage(path, begin, "is cut off inside its header")
            length, crc = HEADER.unpack(header)
            if masked_crc(header[:8]) != crc:
                what = "has a wrong length checksum" if begin else "is not a TFRecord frame"
                raise damage(path, begin, what)
            offset = begin + HEADER.size
            end = offset + length + CHECKSUM.size
            if end > size:
                raise damage(path, begin, f"is cut off (it should end at byte {end} of {size})")
            payload = file.read(length)
            if masked_crc(payload) != CHECKSUM.unpack(file.read(CHECKSUM.size))[0]:
                raise damage(path, begin, "has a wrong checksum")
            yield offset, length, payload
            begin = end


def _defect(buffers: Sequence[np.ndarray]) -> str | None:
    *before, last = buffers
    checksum = CHECKSUM.unpack(last[-CHECKSUM.size :])[0]
    intact = masked_crc(*before, last[: -CHECKSUM.size]) == checksum
    return None if intact else "has a wrong checksum"


TFRECORD = Container(
    name="tfrecord",
    head=HEADER.size,
    tail=CHECKSUM.size,
    scan=scan_records,
    defect=_defect,
    writer=RecordWriter,
)
