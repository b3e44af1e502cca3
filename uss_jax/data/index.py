"""The index of a split: location and labels of each clip, stored beside the shards.

It gives the shard and byte offset of each clip's samples, so that a clip, or two seconds of it, is
one read; see data/reader.py.
"""

import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import multiprocessing
import os
import re
import signal
import struct
import sys
import threading
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from uss_jax.data.encodings import ENCODINGS, SAMPLE_BYTES, clipped_share, count_samples
from uss_jax.data.schema import Schema
from uss_jax.data.storage import Folder, open_folder, versions_below
from uss_jax.data.tfrecord import CHECKSUM, HEADER, masked_crc, scan_records
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.wording import counted

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
_PART = {
    "made_of": Column("U"),
    "digest": Column("U"),
    "label_count": Column("i8", "r"),
    "label_class": Column("u2", "l"),
    "clipped": Column("f4", "r"),
}
# Upper bound for a valid index; the densest known encoding is silence in FLAC.
_MOST_SAMPLES_A_BYTE = 8192
_CLIPPED_TOLD = 0.001
_PER_RECORD = ("record_offset", "record_bytes", "audio_offset", "audio_bytes", "samples", "ids")
_SHARD_NAME = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<at>\d{5})-of-(?P<of>\d{5})")


def splits(directory: str | os.PathLike) -> list[str]:
    """Returns the splits that have shards in a directory."""
    return sorted({match["split"] for match in _shard_names(directory)})


def _shard_names(directory: str | os.PathLike) -> list[re.Match]:
    return [match for match in map(_SHARD_NAME.fullmatch, _names(directory)) if match]


def _names(directory: str | os.PathLike) -> list[str]:
    try:
        return sorted(open_folder(directory).sizes())
    except OSError as error:
        raise UserError(
            f"{directory} cannot be read ({error.strerror}); give a directory of TFRecord shards"
        ) from None


def shards_of_split(
    directory: str | os.PathLike, split: str, schema: Schema | None = None
) -> list[str]:
    """Returns the names of a split's shards, in order.

    Raises:
      UserError: there are no shards, the set is incomplete, or there are several sets.
    """
    if schema is not None and schema.shards is not None:
        found = fnmatch.filter(_names(directory), schema.shards)
        if not found:
            raise UserError(
                f"{directory} has no files that match the schema's pattern {schema.shards!r}"
            )
        return found
    matches = [match for match in _shard_names(directory) if match["split"] == split]
    if not matches:
        others = splits(directory)
        found = f'it has shards of "{", ".join(others)}"' if others else "it has no shards"
        raise UserError(
            f'{directory} has no shards of split "{split}" ({found}); expected names such as '
            f"mine-{split}.tfrecord-00000-of-00004{versions_below(directory)}"
        )
    sets = sorted({(match["name"], match["of"]) for match in matches})
    if len(sets) > 1:
        raise UserError(
            f'{directory} holds several sets of shards for split "{split}" (such as '
            f"{' and '.join(f'{name} of {of}' for name, of in sets[:2])}); keep only one"
        )
    of, numbers = int(sets[0][1]), {int(match["at"]) for match in matches}
    if max(numbers) >= of:
        raise UserError(
            f'{directory}: a shard of split "{split}" has the number {max(numbers)} of {of}, but '
            "numbers start from 0; keep one complete set of shards there"
        )
    missing = set(range(of)) - numbers
    if missing:
        raise UserError(
            f'{directory}: of the {of} shards of split "{split}", number '
            f"{min(missing)} is missing; copy or prepare them again"
        )
    return [match[0] for match in matches]


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
        if workers == 1:
            for job in jobs:
                _index_shard(*job)
                progress.update()
        else:
            # Spawned: forking a process with running threads may deadlock.
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(workers, context, _die_of_interrupt)
            # Ctrl-C also ends the workers, so nothing needs cancelling; a pool that cancels while
            # it loses its workers prints a traceback.
            cancel = True
            try:
                with _interrupt_ignored():  # inherited by workers that start here
                    done = [pool.submit(_index_shard, *job) for job in jobs]
                for future in done:
                    future.result()
                    progress.update()
            except KeyboardInterrupt:
                cancel = False
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=cancel)
    index = _join_parts(folder, shards, [part for _, _, part, _ in jobs], schema)
    with folder.replacing(_index_name(split)) as temporary:
        np.savez(temporary, format_version=FORMAT_VERSION, **dataclasses.asdict(index))
    folder.remove(parts)
    return index


@contextlib.contextmanager
def _interrupt_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _die_of_interrupt() -> None:
    """Makes Ctrl-C, which reaches all processes, end a worker without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _index_shard(directory: str, shard: str, part: str, schema: Schema | None) -> None:
    """Writes a shard's part of the index, unless an up-to-date one exists."""
    folder = open_folder(directory)
    made_of = _stamp(folder, shard, schema)
    if _read_part(folder, part, made_of) is not None:
        return
    path = f"{folder}/{shard}"
    columns: dict[str, list] = {name: [] for name in (*_PER_RECORD, "labels", "clipped")}
    digest = hashlib.sha256()
    for offset, length, payload in scan_records(path):
        for name, value in _index_record(path, offset, payload, schema).items():
            columns[name].append(value)
        digest.update(struct.pack("<QQI", offset, length, masked_crc(payload)))
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
    _tell_clipped(folder, index, np.concatenate([columns["clipped"] for columns in read]))
    return index


def _tell_clipped(folder: Folder, index: RecordIndex, share: Float32[np.ndarray, " r"]) -> None:
    if loud := int((share > _CLIPPED_TOLD).sum()):
        most = int(np.argmax(share))
        print(
            f"{folder}: in {loud:,} of {counted(len(index), 'record')}, more than "
            f"{_CLIPPED_TOLD:.1%} of the samples are above full scale and are clipped when read; "
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
        (index.shards[index.record_shard[at]], int(index.record_offset[at]) - HEADER.size)
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
            f"{path}: the record at byte {offset - HEADER.size} {error}; expected "
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


def _index_name(split: str) -> str:
    return f"index-{split}.npz"


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
    path = f"{folder}/{_index_name(split)}"
    again = f"run `uss-jax index {folder}`"
    try:
        with folder.open(_index_name(split)) as file:
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
            for offset, length, payload in scan_records(f"{folder}/{shard}"):
                digest.update(struct.pack("<QQI", offset, length, masked_crc(payload)))
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
    frame = HEADER.size + CHECKSUM.size
    for what, right in {
        "encoding": index.encoding in ENCODINGS,
        "shards": all(
            name and "/" not in name and name not in (".", "..") for name in index.shards.tolist()
        ),
        "record_shard": (order < len(index.shards)).all() and (np.diff(order) >= 0).all(),
        "shard_bytes": ((sized >= frame) & (sized < 2**63)).all(),
        "record_offset": (index.record_offset >= HEADER.size).all()
        and (index.record_offset < sized).all()
        and (end <= sized - CHECKSUM.size).all(),
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
