"""Blocks of clips: the unit of work of `prepare`, each converted to one shard.

A block's file is written atomically, and a finished block is not done again.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tqdm import tqdm

from uss_jax.data.conversion import ClipSettings, Record, Skipped, prepare_clip
from uss_jax.data.encodings import CLIPPED_SHARE
from uss_jax.data.labels import LabelledFile
from uss_jax.data.shards import WRITTEN
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_json import list_of, mapping_of, number, parse_json, record, text

_CLIPS_IN_FLIGHT = 256
# Kinds of skipped clips that another content of the file may change.
_OF_THE_FILE = ("unreadable", "cut off", "silent", "not its segment")


class Outcome(NamedTuple):
    """The result of a block, by the clips' numbers in it.

    Attributes:
      skipped: reason for each skipped clip.
      clipped: share of clipped samples, where above 0.1 %.
    """

    skipped: dict[int, Skipped]
    clipped: dict[int, float]


_OUTCOME = record(
    {
        "skipped": mapping_of(list_of(text(), least=2, most=2)),
        "clipped": mapping_of(number(0, 1)),
    }
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of clips to convert to one shard, on any machine that sees the folders.

    Attributes:
      folder: folder of unfinished work.
      number: block number.
      items: clips of the block.
      audio: folder that the clips' paths are relative to.
      settings: conversion settings.
    """

    folder: pathlib.Path
    number: int
    items: list[LabelledFile]
    audio: str | os.PathLike
    settings: ClipSettings

    @property
    def path(self) -> pathlib.Path:
        """Path of the shard, which does not exist if no clip of the block can be used."""
        return self.folder / f"block-{self.number:05d}"

    @property
    def _done(self) -> pathlib.Path:
        return self.folder / f".block-{self.number:05d}.json"

    def outcome(self) -> Outcome | None:
        """Returns the result of the block, or None if it is not finished."""
        try:
            # Our own file: of a big block in which half is missing, it has tens of MB.
            data = self._done.read_bytes()
            stored = parse_json(data, _OUTCOME, max_bytes=len(data))
            skipped = {int(at): Skipped(*why) for at, why in stored["skipped"].items()}
            outcome = Outcome(skipped, {int(at): x for at, x in stored["clipped"].items()})
        except (OSError, ValueError):
            return None
        return outcome if self.path.exists() or len(skipped) == len(self.items) else None

    def is_due(self) -> bool:
        """Returns whether the block is not finished, or skipped a clip that may be usable now.

        Its file was missing and is there, or has changed since the block was finished.
        """
        outcome = self.outcome()
        if outcome is None:
            return True
        finished = self._done.stat().st_mtime_ns
        for at, why in outcome.skipped.items():
            with contextlib.suppress(OSError, ValueError):  # such as a name with a zero byte
                about = os.stat(os.path.join(self.audio, self.items[at].file))
                changed = max(about.st_mtime_ns, about.st_ctime_ns) > finished
                if why.kind == "missing" or (why.kind in _OF_THE_FILE and changed):
                    return True
        return False

    def make(self, pool: concurrent.futures.Executor, progress: Callable[[], object]) -> None:
        """Makes the shard, reading clips with `pool`; calls `progress` after each."""

        def make(item: LabelledFile) -> Record | Skipped:
            path = os.path.join(self.audio, item.file)
            about = item.segment, item.shared, item.caption
            return prepare_clip(path, item.id, item.labels, self.settings, *about)

        outcome = Outcome({}, {})
        with replacing(self.path) as temporary, WRITTEN.writer(temporary) as writer:
            for number, made in enumerate(_map_in_order(pool, make, self.items)):
                progress()
                if isinstance(made, Skipped):
                    outcome.skipped[number] = made
                    continue
                writer.write(made.data)
                if made.clipped > CLIPPED_SHARE:
                    outcome.clipped[number] = made.clipped
        if len(outcome.skipped) == len(self.items):
            self.path.unlink()
        with replacing(self._done) as temporary:
            temporary.write_text(json.dumps(outcome._asdict()))


# Makes blocks, anywhere.
Engine = Callable[[list[Block]], None]


def run_here(blocks: list[Block], workers: int) -> None:
    """Makes blocks with as many threads of this process; shows progress."""
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(
            total=sum(len(b.items) for b in blocks), desc="prepare", unit="clip", disable=None
        ) as bar,
    ):
        for block in blocks:
            block.make(pool, bar.update)


def _map_in_order(
    pool: concurrent.futures.Executor,
    make: Callable[[LabelledFile], Record | Skipped],
    items: list[LabelledFile],
) -> Iterator[Record | Skipped]:
    """Like `pool.map`, but limits the results held in memory."""
    for begin in range(0, len(items), _CLIPS_IN_FLIGHT):
        yield from pool.map(make, items[begin : begin + _CLIPS_IN_FLIGHT])
