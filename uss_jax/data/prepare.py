"""Audio files and labels to records: shards, index, metadata, and a list of what was left out.

A clip becomes a record by one pure function, `prepare_clip`. Whatever runs it, a thread pool here
or Apache Beam on many machines, the shards are the same: record order is the label file's order,
and a shard holds the clips of one block of its lines. A block is the unit of work: its file appears
whole, and a finished one is not done again.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from uss_jax.atomic import replacing
from uss_jax.audio.files import flac_bytes, read_mono
from uss_jax.data.encodings import to_int16
from uss_jax.data.examples import serialise
from uss_jax.data.index import RecordIndex, build_index
from uss_jax.data.labels import LabelledFile
from uss_jax.data.metadata import check_format, write_metadata
from uss_jax.data.schema import Schema
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.errors import UserError

# No sample of a silent clip reaches -60 dBFS, below which anchors are not drawn.
_SILENT_PEAK = 1e-3
_SHARD_BYTES = 200e6
_CLIPS_IN_FLIGHT = 256


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What a clip is made into.

    Attributes:
      sample_rate: in Hz.
      clip_seconds: longer recordings are cut to their first so many seconds; shorter keep theirs.
      encoding: `pcm_s16le`, of which a part can be read, or `flac`, half as large and slower.
    """

    sample_rate: int = 32000
    clip_seconds: float = 10.0
    encoding: str = "pcm_s16le"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Why there is no record of a clip."""

    reason: str


def prepare_clip(
    path: str | os.PathLike, id: str, labels: tuple[int, ...], settings: ClipSettings
) -> bytes | Skipped:
    """A recording as the bytes of a record, or why it cannot be one. Pure but for reading `path`.

    Args:
      path: the recording.
      id: its name in the records.
      labels: class indexes.
      settings: what to make of it.
    """
    try:
        waveform = read_mono(path, settings.sample_rate, settings.clip_seconds)
    except UserError as error:
        return Skipped(str(error))
    samples = to_int16(waveform[: round(settings.clip_seconds * settings.sample_rate)])
    if not samples.size or np.abs(waveform).max() < _SILENT_PEAK:
        return Skipped(f"{path} is silent (no sample reaches -60 dBFS)")
    audio = flac_bytes(samples, settings.sample_rate) if settings.encoding == "flac" else samples
    return serialise(id.encode(errors="surrogateescape"), audio, labels)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` made.

    Attributes:
      directory: where it is.
      index: of the split's records.
      skipped: the clips without a record, with the reason.
      report: the CSV file that lists them.
    """

    directory: pathlib.Path
    index: RecordIndex
    skipped: list[tuple[LabelledFile, str]]
    report: pathlib.Path


Engine = Callable[[list["Block"]], None]


def prepare(
    labelled: list[LabelledFile],
    audio: str | os.PathLike,
    out: str | os.PathLike,
    *,
    name: str,
    version: str,
    split: str,
    settings: ClipSettings,
    shards: int | None = None,
    workers: int = 1,
    engine: Engine | None = None,
) -> Prepared:
    """Makes a split of records in `out`/`name`/`version`, whole or not at all.

    Called again after it was stopped, with the same arguments, it goes on with the shards that were
    not yet finished.

    Args:
      labelled: clips with their labels; at least one.
      audio: the folder their paths are relative to.
      out: the folder of data sets.
      name, version, split: letters, digits and "_"; three numbers with dots; letters, digits, "_".
      settings: what to make of a clip.
      shards: at most so many files; None: about 200 MB each.
      workers: threads that read and convert.
      engine: runs the blocks; None: threads of this process.
    """
    _check_names(name, version, split)
    directory = pathlib.Path(out) / name / version
    check_format(directory, split, settings.sample_rate, settings.encoding)
    unfinished = directory / f".unfinished-{split}"
    schema = Schema(encoding=settings.encoding, sample_rate=settings.sample_rate)
    skipped: list[tuple[LabelledFile, str]] = []
    blocks = _blocks(labelled, shards, settings)
    try:
        _keep_if_same(unfinished, repr((os.fspath(audio), settings, blocks)))

        jobs = [Block(unfinished, at, block, audio, settings) for at, block in enumerate(blocks)]
        todo = [job for job in jobs if job.reasons() is None]
        (engine or functools.partial(_run_here, workers=workers))(todo)
        paths = []
        for job in jobs:
            reasons = job.reasons()
            if reasons is None:
                raise UserError(f"{job.path} was not made; give the same command again")
            skipped += [(job.items[int(number)], reason) for number, reason in reasons.items()]
            if len(reasons) < len(job.items):
                paths.append(job.path)
        if not paths:
            shutil.rmtree(unfinished, ignore_errors=True)
            _remove_if_empty(directory, directory.parent)
            raise UserError(
                f"none of the {len(labelled)} clips could be used; the first: {skipped[0][1]}"
            )
        for at, path in enumerate(paths):
            path.rename(unfinished / f"{name}-{split}.tfrecord-{at:05d}-of-{len(paths):05d}")
        index = build_index(unfinished, split, schema)
        _publish(unfinished, directory, split)
    except OSError as error:
        raise UserError(
            f"{directory} could not be written ({error.strerror or error}); choose --out where "
            "there is space and permission, or make some and go on with the same command"
        ) from error
    shutil.rmtree(unfinished, ignore_errors=True)

    write_metadata(
        directory,
        name=name,
        version=version,
        split=split,
        shard_records=np.bincount(index.record_shard, minlength=len(index.shards)).tolist(),
        shard_bytes=int(index.shard_bytes.sum()),
        sample_rate=settings.sample_rate,
        encoding=settings.encoding,
    )
    report = directory / f"skipped-{split}.csv"
    _write_report(report, skipped)
    return Prepared(directory, index, skipped, report)


def _check_names(name: str, version: str, split: str) -> None:
    """TFDS and the shards' names know only these."""
    for option, value, pattern, example in (
        ("--name", name, r"[a-zA-Z][a-zA-Z0-9_]*", "my_sounds"),
        ("--version", version, r"\d+\.\d+\.\d+", "1.0.0"),
        ("--split", split, r"[a-zA-Z][a-zA-Z0-9_]*", "train"),
    ):
        if not re.fullmatch(pattern, value):
            raise UserError(f'{option} cannot be "{value}"; give something like {example}')


def _blocks(
    labelled: list[LabelledFile], shards: int | None, settings: ClipSettings
) -> list[list[LabelledFile]]:
    """The label file's lines in even, contiguous blocks, one for each shard."""
    if shards is None:
        clip_bytes = 2 * settings.sample_rate * settings.clip_seconds
        shards = int(np.ceil(len(labelled) * clip_bytes / _SHARD_BYTES))
    shards = min(max(shards, 1), len(labelled))
    edges = [len(labelled) * at // shards for at in range(shards + 1)]
    return [labelled[begin:end] for begin, end in itertools.pairwise(edges)]


def _keep_if_same(unfinished: pathlib.Path, plan: str) -> None:
    """Empties the folder of unfinished work, unless that is part of the same plan."""
    digest = hashlib.sha256(plan.encode(errors="surrogateescape")).hexdigest()
    path = unfinished / ".plan"
    if not path.is_file() or path.read_text() != digest:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        path.write_text(digest)


@dataclasses.dataclass(frozen=True)
class Block:
    """A shard to be made, on whatever machine sees the folders.

    Attributes:
      folder: of unfinished work.
      number: of the block.
      items: its clips.
      audio: the folder their paths are relative to.
      settings: what to make of a clip.
    """

    folder: pathlib.Path
    number: int
    items: list[LabelledFile]
    audio: str | os.PathLike
    settings: ClipSettings

    @property
    def path(self) -> pathlib.Path:
        """The shard; there is none if no clip of the block can be used."""
        return self.folder / f"block-{self.number:05d}"

    @property
    def _done(self) -> pathlib.Path:
        return self.folder / f".block-{self.number:05d}.json"

    def reasons(self) -> dict[str, str] | None:
        """Why clips were left out, by their number; None when the block is not finished."""
        try:
            reasons = json.loads(self._done.read_text())
        except (OSError, ValueError):
            return None
        return reasons if self.path.exists() or len(reasons) == len(self.items) else None

    def make(self, pool: concurrent.futures.Executor, progress: Callable[[], object]) -> None:
        """Makes the shard, reading clips with `pool`; calls `progress` after each."""

        def make(item: LabelledFile) -> bytes | Skipped:
            path = os.path.join(self.audio, item.file)
            return prepare_clip(path, item.file, item.labels, self.settings)

        reasons = {}
        with replacing(self.path) as temporary, RecordWriter(temporary) as writer:
            for number, made in enumerate(_map_in_order(pool, make, self.items)):
                progress()
                if isinstance(made, Skipped):
                    reasons[str(number)] = made.reason
                else:
                    writer.write(made)
        if len(reasons) == len(self.items):
            self.path.unlink()
        with replacing(self._done) as temporary:
            temporary.write_text(json.dumps(reasons))


def _run_here(blocks: list[Block], workers: int) -> None:
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
    make: Callable[[LabelledFile], bytes | Skipped],
    items: list[LabelledFile],
) -> Iterator[bytes | Skipped]:
    """Like `pool.map`, with few results in memory at once."""
    for begin in range(0, len(items), _CLIPS_IN_FLIGHT):
        yield from pool.map(make, items[begin : begin + _CLIPS_IN_FLIGHT])


def _publish(unfinished: pathlib.Path, directory: pathlib.Path, split: str) -> None:
    """Puts finished shards and their index in place of older ones.

    The old index goes first and the new one comes last: whenever there is one, it is right.
    """
    index = f"index-{split}.npz"
    (directory / index).unlink(missing_ok=True)
    for old in directory.glob(f"*-{split}.tfrecord-?????-of-?????"):
        old.unlink()
    for path in sorted(unfinished.iterdir()):
        if path.name != index and not path.name.startswith("."):
            os.replace(path, directory / path.name)
    os.replace(unfinished / index, directory / index)


def _remove_if_empty(*folders: pathlib.Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _write_report(path: pathlib.Path, skipped: list[tuple[LabelledFile, str]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "line", "reason"])
        writer.writerows([item.file, item.line, reason] for item, reason in skipped)
