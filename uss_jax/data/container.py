"""Describes containers of records: files of payloads one after another, each at a known byte.

Another container is a module with a `Container` and a row in `CONTAINERS` of data/shards.py.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from uss_jax.errors import UserError


class Writer(Protocol):
    """Writes payloads to one shard."""

    def write(self, payload: bytes) -> None: ...


@dataclasses.dataclass(frozen=True)
class Container:
    """A kind of shard.

    Attributes:
      name: its name in those of shards, and in TFDS's metadata.
      head, tail: number of bytes around a payload that belong to its record.
      scan: maps the path of a shard to (byte offset of the payload, its length, payload) of each
        record; raises a DamagedRecord, or a UserError if the shard is empty or cannot be read.
      defect: maps a payload and its tail, read into one or more buffers, to what is wrong with
        them; None if they are intact.
      writer: maps the path of a new shard to the context of its writer.
    """

    name: str
    head: int
    tail: int
    scan: Callable[[str | os.PathLike], Iterator[tuple[int, int, bytes]]]
    defect: Callable[[Sequence[Any]], str | None]
    writer: Callable[[str | os.PathLike], contextlib.AbstractContextManager[Writer]]


class DamagedRecord(UserError):
    """A single record is damaged; others may be intact."""


def damage(path: str | os.PathLike, begin: int, what: str) -> DamagedRecord:
    """Returns the error for a damaged record that begins at byte `begin`."""
    return DamagedRecord(
        f"{path}: the record at byte {begin} {what}; copy or prepare the shard again"
    )
