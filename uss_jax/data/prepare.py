"""Converts audio files and labels to records: shards, index, metadata, and a list of skipped clips.

One pure function, `prepare_clip`, converts a clip. The shards are the same for every engine,
a local thread pool or Apache Beam on many machines: records are in the order of the label file, and
a shard holds the clips of one block of its lines. A block is the unit of work: its file is written
atomically, and a finished block is not done again.
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
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from uss_jax.audio.files import CutOff, audio_format, flac_bytes, read_mono, truncation
from uss_jax.data.encodings import to_int16
from uss_jax.data.index import RecordIndex, build_index
from uss_jax.data.labels import LabelledFile, Remark
from uss_jax.data.metadata import check_format, write_metadata
from uss_jax.data.schema import Schema
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.disk.atomic import flush, move, replacing
from uss_jax.disk.checked_json import list_of, mapping_of, number, parse_json, record, text
from uss_jax.disk.lock import LOCK, only_one
from uss_jax.disk.opening import absence
from uss_jax.errors import UserError
from uss_jax.wording import counted

# A clip is silent if no sample reaches -60 dBFS, the level below which anchors are not drawn.
_SILENT_PEAK = 1e-3
_SHARD_BYTES = 200e6
_CLIPS_IN_FLIGHT = 256
_SEGMENT_SLACK = 1.0  # seconds; downloaders cut imprecisely
_CLIPPED_TOLD = 0.001


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """Settings for the conversion of a clip.

    Attributes:
      sample_rate: sampling rate, in Hz.
      clip_seconds: maximum length, in seconds; longer recordings keep only their beginning.
      encoding: `pcm_s16le`, which allows partial reads, or `flac`, half the size and slower.
      accept_truncated: use the readable part of truncated recordings; False: skip them.
    """

    sample_rate: int = 32000
    clip_seconds: float = 10.0
    encoding: str = "pcm_s16le"
    accept_truncated: bool = False


class Skipped(NamedTuple):
    """The reason why a clip has no record.

    Attributes:
      kind: category, for counting: "missing", "unreadable", "cut off", ...
      reason: a sentence.
    """

    kind: str
    reason: str


class Record(NamedTuple):
    """A clip as a record.

    Attributes:
      data: the serialised record.
      clipped: share of samples above full scale, which were clipped.
    """

    data: bytes
    clipped: float


def prepare_clip(
    path: str | os.PathLike,
    id: str,
    labels: tuple[int, ...],
    settings: ClipSettings,
    segment: tuple[float, float] | None = None,
    shared: bool = False,
) -> Record | Skipped:
    """Converts a recording to a record, or returns why it is skipped. Pure but for reading `path`.

    Args:
      path: audio file.
      id: clip name in the records.
      labels: class indexes.
      settings: conversion settings.
      segment, shared: see LabelledFile.
    """
    try:
        if not labels:
            raise _LeftOut("no label", f"{path} has no label that is a class")
        if not os.path.exists(path):
            raise _LeftOut("missing", f"{path} {absence(path)}")
        cut = None if settings.accept_truncated else truncation(path, decode=False)
        if cut:
            raise CutOff(f"{path} is cut off ({cut}); copy or download it again")
        begin, seconds = _place(path, segment, shared, settings.clip_seconds)
        waveform = read_mono(path, settings.sample_rate, seconds, begin, settings.accept_truncated)
        waveform = waveform[: round(seconds * settings.sample_rate)]
        if np.abs(waveform).max(initial=0) < _SILENT_PEAK:
            raise _LeftOut("silent", f"{path} is silent (no sample reaches -60 dBFS)")
    except _LeftOut as error:
        return Skipped(error.kind, str(error))
    except UserError as error:
        return Skipped("cut off" if isinstance(error, CutOff) else "unreadable", str(error))
    samples = to_int16(waveform)
    audio = flac_bytes(samples, settings.sample_rate) if settings.encoding == "flac" else samples
    data = serialise(id.encode(errors="surrogateescape"), audio, labels)
    return Record(data, float(np.mean(np.abs(waveform) > 1)))


class _LeftOut(UserError):
    """A clip is skipped; `kind` as in Skipped."""

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind


def _place(
    path: str | os.PathLike,
    segment: tuple[float, float] | None,
    shared: bool,
    clip_seconds: float,
) -> tuple[float, float]:
    """Returns where in the file the clip begins, and its maximum length, in seconds."""
    if segment is None:
        return 0.0, clip_seconds
    begin, end = segment
    form = audio_format(path)
    seconds = form.samples / form.sample_rate
    if seconds <= end - begin + _SEGMENT_SLACK:  # the file is the segment itself
        if not shared:
            return 0.0, clip_seconds
        raise _LeftOut(
            "not its segment",
            f"{path} lasts {seconds:.1f} s and is thus one segment, but several segments of the "
            "video are labelled; put the times into the names of their files, as in "
            f"{pathlib.Path(path).stem}_{begin:g}_{end:g}",
        )
    if seconds < end - _SEGMENT_SLACK:
        raise _LeftOut(
            "not its segment",
            f"{path} lasts {seconds:.1f} s: longer than its segment of {end - begin:g} s, but too "
            f"short to be the whole video, of which the segment is {begin:g} to {end:g} s; get the "
            "segment or the whole video",
        )
    return begin, min(end - begin, clip_seconds)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
      directory: directory of the records.
      index: index of the split.
      skipped: clips without a record, with the reason.
      clipped: clips with more than 0.1 % of their samples above full scale, which were clipped,
        with that share.
      report: CSV file that lists the skipped clips.
      remarks: what else there is to know of files, including the clipped ones.
      remarks_report: CSV file that lists the remarks; None if there are none.
    """

    directory: pathlib.Path
    index: RecordIndex
    skipped: list[tuple[LabelledFile, Skipped]]
    clipped: list[tuple[LabelledFile, float]]
    report: pathlib.Path
    remarks: list[Remark]
    remarks_report: pathlib.Path | None


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
    overwrite: bool = False,
    remarks: Iterable[Remark] = (),
) -> Prepared:
    """Makes a split of records in `out`/`name`/`version`, whole or not at all.

    After an interruption, a call with the same arguments resumes with the unfinished shards.

    Args:
      labelled: clips with their labels; at least one.
      audio: folder that the clips' paths are relative to.
      out: folder of data sets.
      name, split: data set and split names: a letter, then letters, digits and "_".
      version: three numbers separated by dots.
      settings: conversion settings.
      shards: maximum number of shards; None: about 200 MB each.
      workers: number of threads that read and convert.
      engine: runs the blocks; None: threads of this process.
      overwrite: replace an existing split; False: raise an error.
      remarks: remarks on the files, to be written beside the records.

    Raises:
      UserError: an argument is invalid, no clip can be used, or the output cannot be written.
    """
    _check_names(name, version, split)
    directory = pathlib.Path(out) / name / version
    check_format(directory, split, settings.sample_rate, settings.encoding)
    unfinished = directory / f".unfinished-{split}"
    schema = Schema(encoding=settings.encoding, sample_rate=settings.sample_rate)
    skipped: list[tuple[LabelledFile, Skipped]] = []
    clipped: list[tuple[LabelledFile, float]] = []
    blocks = _blocks(labelled, shards, settings)
    plan = repr((os.fspath(audio), settings, blocks))
    if not overwrite and not _is_of_plan(unfinished, plan):
        _refuse_existing(directory, split)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with only_one(unfinished, "wait until it has ended"):
            _keep_if_same(unfinished, plan)

            jobs = [
                Block(unfinished, at, block, audio, settings) for at, block in enumerate(blocks)
            ]
            todo = [job for job in jobs if job.outcome() is None]
            (engine or functools.partial(_run_here, workers=workers))(todo)
            paths = []
            for job in jobs:
                outcome = job.outcome()
                if outcome is None:
                    raise UserError(f"{job.path} was not written; run the same command again")
                skipped += [(job.items[number], why) for number, why in outcome.skipped.items()]
                clipped += [(job.items[number], share) for number, share in outcome.clipped.items()]
                if len(outcome.skipped) < len(job.items):
                    paths.append(job.path)
            if not paths:
                shutil.rmtree(unfinished, ignore_errors=True)
                _remove_if_empty(directory, directory.parent)
                raise UserError(
                    f"none of the {counted(len(labelled), 'clip')} could be used; the first: "
                    f"{skipped[0][1].reason}"
                )
            for at, path in enumerate(paths):
                path.rename(unfinished / f"{name}-{split}.tfrecord-{at:05d}-of-{len(paths):05d}")
            index = build_index(unfinished, split, schema)
            _publish(unfinished, directory, split)
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
            _write_rows(
                report,
                ("file", "line", "kind", "reason"),
                ((item.file, item.line, *why) for item, why in skipped),
            )
            remarks = [*remarks, *(_remark_on_clipped(*pair) for pair in clipped)]
            remarks_report = directory / f"remarks-{split}.csv"
            if remarks:
                _write_rows(remarks_report, Remark._fields, remarks)
            else:
                remarks_report.unlink(missing_ok=True)
            # Removed last: a rerun after an interruption then recognises the split as its own.
            shutil.rmtree(unfinished, ignore_errors=True)
            return Prepared(
                directory,
                index,
                skipped,
                clipped,
                report,
                remarks,
                remarks_report if remarks else None,
            )
    except OSError as error:
        raise UserError(
            f"{directory} could not be written ({error.strerror or error}); choose an --out "
            "with free space and write permission, or free some space and run the same command "
            "again to resume"
        ) from error


def _check_names(name: str, version: str, split: str) -> None:
    """Raises a UserError for names that TFDS or the shard names do not allow."""
    for option, value, pattern, example in (
        ("--name", name, r"[a-zA-Z][a-zA-Z0-9_]*", "my_sounds"),
        ("--version", version, r"[0-9]{1,9}(\.[0-9]{1,9}){2}", "1.0.0"),
        # TFDS reads "all" as every split together.
        ("--split", split, r"(?!all$)[a-zA-Z][a-zA-Z0-9_]*", "train"),
    ):
        if not re.fullmatch(pattern, value):
            raise UserError(f'{option} cannot be "{value}"; give something like {example}')


def _blocks(
    labelled: list[LabelledFile], shards: int | None, settings: ClipSettings
) -> list[list[LabelledFile]]:
    """Splits the label file's lines into even, contiguous blocks, one for each shard."""
    if shards is None:
        clip_bytes = 2 * settings.sample_rate * settings.clip_seconds
        shards = int(np.ceil(len(labelled) * clip_bytes / _SHARD_BYTES))
    shards = min(max(shards, 1), len(labelled))
    edges = [len(labelled) * at // shards for at in range(shards + 1)]
    return [labelled[begin:end] for begin, end in itertools.pairwise(edges)]


def _refuse_existing(directory: pathlib.Path, split: str) -> None:
    """Raises a UserError if the split exists."""
    index = directory / f"index-{split}.npz"
    shards = list(directory.glob(f"*-{split}.tfrecord-?????-of-?????"))
    if shards or index.exists():
        raise UserError(
            f'{directory} has a split "{split}" already ({counted(len(shards), "shard")}); give '
            "--overwrite to replace it, or another --split, --version or --name"
        )


def _is_of_plan(unfinished: pathlib.Path, plan: str) -> bool:
    """Returns whether the folder of unfinished work belongs to this plan."""
    try:
        return (unfinished / ".plan").read_text() == _digest(plan)
    except (OSError, ValueError):
        return False


def _digest(plan: str) -> str:
    return hashlib.sha256(plan.encode(errors="surrogateescape")).hexdigest()


def _keep_if_same(unfinished: pathlib.Path, plan: str) -> None:
    """Empties the folder of unfinished work, unless it belongs to this plan."""
    if not _is_of_plan(unfinished, plan):
        for old in unfinished.iterdir():
            if old.name != LOCK:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        (unfinished / ".plan").write_text(_digest(plan))


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
            stored = parse_json(self._done.read_bytes(), _OUTCOME)
            skipped = {int(at): Skipped(*why) for at, why in stored["skipped"].items()}
            outcome = Outcome(skipped, {int(at): x for at, x in stored["clipped"].items()})
        except (OSError, ValueError):
            return None
        return outcome if self.path.exists() or len(skipped) == len(self.items) else None

    def make(self, pool: concurrent.futures.Executor, progress: Callable[[], object]) -> None:
        """Makes the shard, reading clips with `pool`; calls `progress` after each."""

        def make(item: LabelledFile) -> Record | Skipped:
            path = os.path.join(self.audio, item.file)
            where = item.segment, item.shared
            return prepare_clip(path, item.id, item.labels, self.settings, *where)

        outcome = Outcome({}, {})
        with replacing(self.path) as temporary, RecordWriter(temporary) as writer:
            for number, made in enumerate(_map_in_order(pool, make, self.items)):
                progress()
                if isinstance(made, Skipped):
                    outcome.skipped[number] = made
                    continue
                writer.write(made.data)
                if made.clipped > _CLIPPED_TOLD:
                    outcome.clipped[number] = made.clipped
        if len(outcome.skipped) == len(self.items):
            self.path.unlink()
        with replacing(self._done) as temporary:
            temporary.write_text(json.dumps(outcome._asdict()))


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
    make: Callable[[LabelledFile], Record | Skipped],
    items: list[LabelledFile],
) -> Iterator[Record | Skipped]:
    """Like `pool.map`, but limits the results held in memory."""
    for begin in range(0, len(items), _CLIPS_IN_FLIGHT):
        yield from pool.map(make, items[begin : begin + _CLIPS_IN_FLIGHT])


def _publish(unfinished: pathlib.Path, directory: pathlib.Path, split: str) -> None:
    """Replaces a split's old shards and index with the finished ones.

    Removes the old index first and adds the new one last: an index, if present, is valid.
    """
    index = f"index-{split}.npz"
    (directory / index).unlink(missing_ok=True)
    for old in directory.glob(f"*-{split}.tfrecord-?????-of-?????"):
        old.unlink()
    flush(directory)
    for path in sorted(unfinished.iterdir()):
        if path.name != index and not path.name.startswith("."):
            move(path, directory / path.name)
    move(unfinished / index, directory / index)


def _remove_if_empty(*folders: pathlib.Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remark_on_clipped(item: LabelledFile, share: float) -> Remark:
    text = f"{100 * share:.2g} % of its samples are above full scale and were clipped"
    return Remark(item.file, item.line, "clipped", text)


def _write_rows(path: pathlib.Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    with (
        replacing(path) as temporary,
        # File names need not be UTF-8.
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
