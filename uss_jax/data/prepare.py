"""Converts audio files and labels to records: shards, index, metadata, and a list of skipped clips.

The shards are the same for every engine, a local thread pool or Apache Beam on many machines:
records are in the order of the label file, and a shard holds the clips of one block of its lines.
"""

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
from collections.abc import Iterable

import numpy as np

from uss_jax.data.blocks import Block, Engine, run_here
from uss_jax.data.conversion import ClipSettings, Skipped
from uss_jax.data.index import RecordIndex, index_name
from uss_jax.data.indexing import build_index
from uss_jax.data.labels import LabelledFile, Remark
from uss_jax.data.metadata import check_format, write_metadata
from uss_jax.data.schema import Schema
from uss_jax.data.shards import is_shard, shard_name
from uss_jax.disk.atomic import flush, move, replacing
from uss_jax.disk.lock import LOCK, in_turn, only_one
from uss_jax.errors import UserError, counted

_SHARD_BYTES = 200e6
# In the folder of unfinished work: the block of each shard that has been named.
_NAMES = ".names.json"


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
    processes: int = 1,
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
      processes: number of processes that index the shards; more than one are spawned, so a script
        needs its `if __name__ == "__main__"`.
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
    lines = _split_lines(labelled, shards, settings)
    blocks = [Block(unfinished, at, items, audio, settings) for at, items in enumerate(lines)]
    # Without captions, it is the plan of versions that knew none; they had the folder as given.
    plan, earlier = (
        repr((where, settings, lines)).replace(", caption='')", ")")
        for where in (os.path.realpath(audio), os.fspath(audio))
    )
    if _is_of_plan(unfinished, earlier):
        plan = earlier
    if not overwrite and not _is_of_plan(unfinished, plan):
        _refuse_existing(directory, split)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with only_one(unfinished, "wait until it has ended"):
            _keep_if_same(unfinished, plan, overwrite)
            _take_back_names(unfinished, blocks, split)
            run = engine or functools.partial(run_here, workers=workers)
            run([block for block in blocks if block.is_due()])
            paths, skipped, clipped = _collect(blocks)
            if not paths:
                shutil.rmtree(unfinished, ignore_errors=True)
                _remove_if_empty(directory, directory.parent)
                raise UserError(
                    f"none of the {counted(len(labelled), 'clip')} could be used; the first: "
                    f"{skipped[0][1].reason}"
                )
            _name_shards(unfinished, paths, name, split)
            where = unfinished, directory, name, version, split
            index = _publish(*where, settings, min(processes, len(paths)))
            report = directory / f"skipped-{split}.csv"
            _write_skipped(report, skipped)
            remarks = [*remarks, *(_remark_on_clipped(*pair) for pair in clipped)]
            remarks_report = _write_remarks(directory / f"remarks-{split}.csv", remarks)
            # Removed last: a rerun after an interruption then recognises the split as its own.
            shutil.rmtree(unfinished, ignore_errors=True)
            return Prepared(directory, index, skipped, clipped, report, remarks, remarks_report)
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


def _split_lines(
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
    shards = _shards_of(directory, split)
    if shards or (directory / index_name(split)).exists():
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


def _keep_if_same(unfinished: pathlib.Path, plan: str, overwrite: bool) -> None:
    """Begins the folder of unfinished work, unless it belongs to this plan.

    Raises:
      UserError: it holds shards of another plan, and `overwrite` is not given.
    """
    if _is_of_plan(unfinished, plan):
        return
    finished = len(list(unfinished.glob(".block-*.json")))
    if finished and not overwrite:
        raise UserError(
            f"{unfinished} has {counted(finished, 'shard')} of a conversion that was stopped, with "
            "other labels or arguments; give these again to resume it, or --overwrite to begin anew"
        )
    for old in unfinished.iterdir():
        if old.name != LOCK:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    with replacing(unfinished / ".plan") as temporary:
        temporary.write_text(_digest(plan))


def _name_shards(
    unfinished: pathlib.Path, paths: list[pathlib.Path], name: str, split: str
) -> None:
    """Gives finished blocks the names of shards, and notes which had which."""
    names = {shard_name(name, split, at, len(paths)): path.name for at, path in enumerate(paths)}
    with replacing(unfinished / _NAMES) as temporary:
        temporary.write_text(json.dumps(names))
    for shard, block in names.items():
        (unfinished / block).rename(unfinished / shard)


def _take_back_names(unfinished: pathlib.Path, blocks: list[Block], split: str) -> None:
    """Gives shards that an earlier start has named the names of their blocks again."""
    known = {block.path.name for block in blocks}
    try:
        names = json.loads((unfinished / _NAMES).read_text())
    except (OSError, ValueError):  # none were named
        names = {}
    for shard, block in names.items():
        if block in known and (unfinished / shard).exists():
            (unfinished / shard).rename(unfinished / block)
    for path in _shards_of(unfinished, split):  # of no known block
        path.unlink()
    (unfinished / _NAMES).unlink(missing_ok=True)


def _collect(
    blocks: list[Block],
) -> tuple[
    list[pathlib.Path], list[tuple[LabelledFile, Skipped]], list[tuple[LabelledFile, float]]
]:
    """Returns the shards of finished blocks, their skipped clips and their clipped clips."""
    paths, skipped, clipped = [], [], []
    for block in blocks:
        outcome = block.outcome()
        if outcome is None:
            raise UserError(f"{block.path} was not written; run the same command again")
        skipped += [(block.items[number], why) for number, why in outcome.skipped.items()]
        clipped += [(block.items[number], share) for number, share in outcome.clipped.items()]
        if len(outcome.skipped) < len(block.items):
            paths.append(block.path)
    return paths, skipped, clipped


def _publish(
    unfinished: pathlib.Path,
    directory: pathlib.Path,
    name: str,
    version: str,
    split: str,
    settings: ClipSettings,
    processes: int,
) -> RecordIndex:
    """Indexes the finished shards, replaces the split's old ones and writes the metadata."""
    schema = Schema(encoding=settings.encoding, sample_rate=settings.sample_rate)
    index = build_index(unfinished, split, schema, processes)
    with in_turn(directory):  # another split may be prepared at the same time, at another rate
        check_format(directory, split, settings.sample_rate, settings.encoding)
        _replace_shards(unfinished, directory, split)
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
        # Last: a split with an index is whole, and the metadata say its sampling rate.
        move(unfinished / index_name(split), directory / index_name(split))
    return index


def _replace_shards(unfinished: pathlib.Path, directory: pathlib.Path, split: str) -> None:
    """Removes a split's old index, then replaces its old shards with the finished ones."""
    index = index_name(split)
    (directory / index).unlink(missing_ok=True)
    for old in _shards_of(directory, split):
        old.unlink()
    flush(directory)
    for path in sorted(unfinished.iterdir()):
        if path.name != index and not path.name.startswith("."):
            move(path, directory / path.name)


def _shards_of(directory: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Returns the shards of a split, of any name and number."""
    return [path for path in directory.glob("*") if is_shard(path.name, split)]


def _remove_if_empty(*folders: pathlib.Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remark_on_clipped(item: LabelledFile, share: float) -> Remark:
    text = f"{100 * share:.2g} % of its samples are above full scale and were clipped"
    return Remark(item.file, item.line, "clipped", text)


def _write_skipped(path: pathlib.Path, skipped: list[tuple[LabelledFile, Skipped]]) -> None:
    rows = ((item.file, item.line, *why) for item, why in skipped)
    _write_rows(path, ("file", "line", "kind", "reason"), rows)


def _write_remarks(path: pathlib.Path, remarks: list[Remark]) -> pathlib.Path | None:
    """Writes the remarks, or removes an earlier run's file if there are none; returns the file."""
    if not remarks:
        path.unlink(missing_ok=True)
        return None
    _write_rows(path, Remark._fields, remarks)
    return path


def _write_rows(path: pathlib.Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    with (
        replacing(path) as temporary,
        # File names need not be UTF-8.
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
