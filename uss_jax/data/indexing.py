"""Builds the index of a split: reads every record once, shard by shard, in parallel."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from uss_jax.data.encodings import CLIPPED_SHARE, clipped_share, count_samples
from uss_jax.data.index import COLUMNS, FORMAT_VERSION, RecordIndex, frame_stamp, index_name
from uss_jax.data.schema import Schema
from uss_jax.data.shards import container_of, shards_of_split
from uss_jax.data.storage import Folder, open_folder
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.errors import UserError, counted
from uss_jax.ontology import load_ontology

# Arrays of one shard's part of the index, beside those that are columns of the index.
_PART = {
    "made_of": Column("U"),
    "digest": Column("U"),
    "label_count": Column("i8", "r"),
    "label_class": Column("u2", "l"),
    "clipped": Column("f4", "r"),
}
_PER_RECORD = ("record_offset", "record_bytes", "audio_offset", "audio_bytes", "samples", "ids")


def build_index(
    directory: str | os.PathLike, split: str, schema: Schema | None = None, workers: int = 1
) -> RecordIndex:
    """Reads every shard of a split, verifies every checksum and writes `index-<split>.npz`.

    Finished shards are saved until the index is complete, so that an interrupted job resumes.

    Args:
      directory: directory of the shards.
      split: split name, such as "train".
      schema: schema of the records; None: that of `prepare`.
      workers: number of processes that read shards.
    """
    folder = open_folder(directory)
    shards = shards_of_split(directory, split, schema)
    parts = f".shards-of-{split}"
    jobs = [(os.fspath(directory), shard, f"{parts}/{shard}.npz", schema) for shard in shards]
    with tqdm(total=len(jobs), desc="index", unit="shard", disable=None) as progress:
        _index_shards(jobs, workers, progress.update)
    index = _join_parts(folder, shards, [part for _, _, part, _ in jobs], schema)
    with folder.replacing(index_name(split)) as temporary:
        np.savez(temporary, format_version=FORMAT_VERSION, **dataclasses.asdict(index))
    folder.remove(parts)
    return index


_Job = tuple[str, str, str, Schema | None]  # see _index_shard


def _index_shards(jobs: list[_Job], workers: int, progress: Callable[[], object]) -> None:
    """Writes the part of each shard in as many processes; calls `progress` after each."""
    if workers == 1:
        for job in jobs:
            _index_shard(*job)
            progress()
        return
    # Spawned: forking a process with running threads may deadlock.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _die_of_interrupt)
    # Ctrl-C also ends the workers, so nothing needs cancelling; a pool that cancels while it loses
    # its workers prints a traceback.
    cancel = True
    try:
        with _interrupt_held():
            done = [pool.submit(_index_shard, *job) for job in jobs]
        for future in done:
            future.result()
            progress()
    except KeyboardInterrupt:
        cancel = False
        for worker in multiprocessing.active_children():  # one that still starts would complain
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=cancel)


@contextlib.contextmanager
def _interrupt_held() -> Iterator[None]:
    """Holds Ctrl-C back until the end of the block, and in processes that start in it."""
    multiprocessing.resource_tracker.ensure_running()  # in the block it would let Ctrl-C through
    pressed, before = [], None
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        # The mask holds nothing back from other threads, which hand it to the main thread.
        before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is not None:
            signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _die_of_interrupt() -> None:
    """Makes Ctrl-C, which reaches all processes, end a worker without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _index_shard(directory: str, shard: str, part: str, schema: Schema | None) -> None:
    """Writes a shard's part of the index, unless an up-to-date one exists."""
    folder = open_folder(directory)
    made_of = _stamp(folder, shard, schema)
    if _read_part(folder, part, made_of) is not None:
        return
    path = f"{folder}/{shard}"
    columns: dict[str, list] = {name: [] for name in (*_PER_RECORD, "labels", "clipped")}
    digest = hashlib.sha256()
    for offset, length, payload in container_of(shard).scan(path):
        for name, value in _index_record(path, offset, payload, schema).items():
            columns[name].append(value)
        digest.update(frame_stamp(offset, length, payload))
    labels = columns.pop("labels")
    kinds = {**COLUMNS, **_PART}
    arrays = {name: np.asarray(values, kinds[name].dtype) for name, values in columns.items()}
    with folder.replacing(part) as temporary:
        np.savez(
            temporary,
            made_of=made_of,
            digest=digest.hexdigest(),
            label_count=np.array([len(of_record) for of_record in labels], np.int64),
            label_class=np.array([k for of_record in labels for k in of_record], np.uint16),
            **arrays,
        )


def _stamp(folder: Folder, shard: str, schema: Schema | None) -> str:
    try:
        return f"{FORMAT_VERSION} {folder.stamp(shard)} {schema}"
    except OSError as error:
        raise UserError(
            f"{folder}/{shard} cannot be read ({error.strerror}); give a TFRecord file"
        ) from None


def _read_part(folder: Folder, part: str, made_of: str) -> dict[str, np.ndarray] | None:
    try:
        with folder.open(part) as file:
            columns = read_npz(file, {**{name: COLUMNS[name] for name in _PER_RECORD}, **_PART})
    except (OSError, ValueError):
        return None
    return columns if str(columns["made_of"]) == made_of else None


def _join_parts(
    folder: Folder, shards: list[str], parts: list[str], schema: Schema | None
) -> RecordIndex:
    read = []
    for shard, part in zip(shards, parts, strict=True):
        columns = _read_part(folder, part, _stamp(folder, shard, schema))
        if columns is None:
            raise UserError(f"{folder}/{shard} changed while it was indexed; index again")
        read.append(columns)
    joined = {name: np.concatenate([columns[name] for columns in read]) for name in _PER_RECORD}
    counts = np.concatenate([columns["label_count"] for columns in read])
    records = [len(columns["record_bytes"]) for columns in read]
    sizes = folder.sizes()
    index = RecordIndex(
        shards=np.asarray(shards, np.str_),
        shard_bytes=np.asarray([sizes[shard] for shard in shards], np.uint64),
        shard_digest=np.asarray([str(columns["digest"]) for columns in read], np.str_),
        record_shard=np.repeat(np.arange(len(shards), dtype=np.uint32), records),
        label_row=np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64),
        label_class=np.concatenate([columns["label_class"] for columns in read]),
        encoding="pcm_s16le" if schema is None else schema.encoding,
        **joined,
    )
    _refuse_duplicates(folder, index)
    _report_clipped(folder, index, np.concatenate([columns["clipped"] for columns in read]))
    return index


def _report_clipped(folder: Folder, index: RecordIndex, share: Float32[np.ndarray, " r"]) -> None:
    if loud := int((share > CLIPPED_SHARE).sum()):
        most = int(np.argmax(share))
        print(
            f"{folder}: in {loud:,} of {counted(len(index), 'record')}, more than "
            f"{CLIPPED_SHARE:.1%} of the samples are above full scale and are clipped when read; "
            f"the largest share is {share[most]:.1%}, in "
            f"{index.ids[most].decode(errors='replace')!r}",
            file=sys.stderr,
        )


def _refuse_duplicates(folder: Folder, index: RecordIndex) -> None:
    order = np.argsort(index.ids, kind="stable")
    same = np.flatnonzero(index.ids[order][1:] == index.ids[order][:-1])
    if not same.size:
        return
    first, second = min((order[at : at + 2].tolist() for at in same), key=lambda pair: pair[1])
    one, other = (
        (index.shards[index.record_shard[at]], int(index.record_offset[at]) - index.container.head)
        for at in (first, second)
    )
    raise UserError(
        f"{folder}/{other[0]}: the record at byte {other[1]} has the same id "
        f"{index.ids[second].decode(errors='replace')!r} as the one at byte "
        f"{one[1]} of {one[0]}; ids must be unique: write the records again, or name "
        "another feature as the id in a --schema"
    )


def _index_record(path: str, offset: int, payload: bytes, schema: Schema | None) -> dict:
    # Imported here: only building an index needs protobuf, not reading through one.
    from uss_jax.data.tf_example import parse

    schema = schema or Schema()
    try:
        clip = parse(payload, schema)
        samples = count_samples(clip.audio, schema.encoding, schema.sample_rate)
        clipped = clipped_share(clip.audio, schema.encoding)
        classes = len(load_ontology().class_mids)
        wrong = [label for label in clip.labels if not 0 <= label < classes]
        if wrong:
            raise ValueError(f"has the label {wrong[0]}, classes go from 0 to {classes - 1}")
        audio_offset = offset + _find(payload, clip.audio)
    except ValueError as error:
        raise UserError(
            f"{path}: the record at byte {offset - container_of(path).head} {error}; expected "
            f"{schema.id!r} (bytes), {schema.audio!r} ({schema.encoding}) and {schema.labels!r} "
            f"({schema.label_form}); describe another layout in a --schema file"
        ) from error
    return {
        "record_offset": offset,
        "record_bytes": len(payload),
        "audio_offset": audio_offset,
        "audio_bytes": len(clip.audio),
        "samples": samples,
        "ids": clip.id,
        "labels": sorted(set(clip.labels)),
        "clipped": clipped,
    }


def _find(payload: bytes, value: bytes) -> int:
    """Returns the offset of `value` in `payload`; searches for its beginning, which is faster."""
    beginning = value[:64]
    at = payload.find(beginning)
    while at >= 0 and not payload.startswith(value, at):
        at = payload.find(beginning, at + 1)
    if at < 0:
        raise ValueError("stores its samples one by one, expected a packed list")
    return at
