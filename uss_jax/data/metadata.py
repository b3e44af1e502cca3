"""Metadata of a records directory: TFDS files, and sampling rate and encoding.

dataset_info.json   splits, shards, counts: read by `tfds.builder_from_directory` and `tfds.load`
features.json       the schema, with the class names in labels.labels.txt
metadata.json       {"sample_rate": 32000, "encoding": "pcm_s16le"}, or another encoding
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Collection
from typing import Any

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.data.encodings import ENCODINGS
from uss_jax.data.index import indexed_splits
from uss_jax.data.shards import WRITTEN
from uss_jax.data.storage import Folder, open_folder, versions_below
from uss_jax.disk.atomic import move
from uss_jax.disk.checked_json import Rule, list_of, read_json, record, text, whole
from uss_jax.disk.lock import in_turn
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

_INFO, _OURS = "dataset_info.json", "metadata.json"
_FORMAT = record(
    {
        "sample_rate": whole(LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE),
        "encoding": text(*ENCODINGS),
    },
    others=True,
)
_SPLITS = record({}, {"splits": list_of(record({"name": text()}, others=True))}, others=True)


def read_sample_rate(directory: str | os.PathLike) -> int:
    """Returns the sampling rate of a directory's records, in Hz."""
    return _format(directory)[0]


def read_encoding(directory: str | os.PathLike) -> str:
    """Returns the encoding of a directory's records, see data/encodings.py."""
    return _format(directory)[1]


def _format(directory: str | os.PathLike) -> tuple[int, str]:
    found = _known_format(directory)
    if found is None:
        path = f"{open_folder(directory)}/{_OURS}"
        raise UserError(
            f"{path} does not exist, so the sample rate of these records is unknown; prepare them "
            f'again, or write {{"sample_rate": 32000, "encoding": "pcm_s16le"}} into it'
            f"{versions_below(directory)}"
        )
    return found


def _known_format(directory: str | os.PathLike) -> tuple[int, str] | None:
    """Returns sampling rate and encoding; None without metadata.json."""
    metadata = _read(open_folder(directory), _OURS, _FORMAT)
    return metadata and (metadata["sample_rate"], metadata["encoding"])


def check_format(directory: pathlib.Path, split: str, sample_rate: int, encoding: str) -> None:
    """Raises a UserError if a split's sampling rate or encoding differs from the other splits'."""
    folder = open_folder(directory)
    info = _read(folder, _INFO, _SPLITS) or {}
    others = {other["name"] for other in info.get("splits", [])} | indexed_splits(folder)
    remedy = f"give {split} a different --version, or {{option}} {{there}}"
    _require_format(directory, others - {split}, sample_rate, encoding, remedy)


def check_indexed_format(
    directory: str | os.PathLike, replaced: Collection[str], sample_rate: int, encoding: str
) -> None:
    """Raises a UserError if a sampling rate or encoding differs from that of the indexed splits.

    Args:
      directory: directory of the shards.
      replaced: splits that are not compared, since their index is being written.
      sample_rate: sampling rate, in Hz.
      encoding: encoding of the samples.
    """
    others = indexed_splits(open_folder(directory)).difference(replaced)
    remedy = "put records that differ in a folder of their own"
    _require_format(directory, others, sample_rate, encoding, remedy)


def _require_format(
    directory: str | os.PathLike, others: set[str], sample_rate: int, encoding: str, remedy: str
) -> None:
    """Compares with what metadata.json, if it is there, says of the other splits.

    `remedy` may name {there}, the rate or encoding of these, and its {option} of `prepare`.
    """
    if not others or (known := _known_format(directory)) is None:
        return
    there_rate, there_encoding = known
    for option, words, wanted, there in (
        ("--sample-rate", "at {} Hz", sample_rate, there_rate),
        ("--encoding", "encoded as {}", encoding, there_encoding),
    ):
        if wanted != there:
            raise UserError(
                f"{directory} already has {', '.join(sorted(others))} {words.format(there)}; "
                f"{remedy.format(option=option, there=there)}"
            )


def write_metadata(
    directory: pathlib.Path,
    *,
    name: str,
    version: str,
    split: str,
    shard_records: list[int],
    shard_bytes: int,
    sample_rate: int,
    encoding: str = "pcm_s16le",
) -> None:
    """Adds or replaces a split in the directory's metadata; other splits are kept.

    Args:
      directory: directory of the shards.
      name, version, split: data set name, version and split, as in the shard names and path.
      shard_records: number of records in each shard, in order.
      shard_bytes: total size of the shards, in bytes.
      sample_rate: sampling rate, in Hz.
      encoding: encoding of the samples, `pcm_s16le` or `flac`.
    """
    _write_features(directory, sample_rate, encoding)
    write_format(directory, sample_rate, encoding)
    info = _read(open_folder(directory), _INFO, _SPLITS) or {}
    others = [other for other in info.get("splits", []) if other["name"] != split]
    ours = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": split,
        "numBytes": str(shard_bytes),  # protobuf's JSON writes 64-bit integers as strings
        "shardLengths": [str(records) for records in shard_records],
    }
    _write(
        open_folder(directory),
        _INFO,
        {
            "description": f"Weakly labelled sound, mono at {sample_rate} Hz.",
            "fileFormat": WRITTEN.name,
            "name": name,
            "splits": sorted([*others, ours], key=lambda split: split["name"]),
            "version": version,
        },
    )


def write_format(directory: str | os.PathLike, sample_rate: int, encoding: str) -> None:
    """Writes the sampling rate and encoding of a directory's records to metadata.json."""
    _write(open_folder(directory), _OURS, {"sample_rate": sample_rate, "encoding": encoding})


def enter_indexed_format(
    directory: str | os.PathLike, replaced: Collection[str], sample_rate: int, encoding: str
) -> None:
    """Does `check_indexed_format`, then `write_format`; on a local disk, one process at a time."""
    local = "://" not in os.fspath(directory)
    with in_turn(directory) if local else contextlib.nullcontext():
        check_indexed_format(directory, replaced, sample_rate, encoding)
        write_format(directory, sample_rate, encoding)


def tfds_features(sample_rate: int, encoding: str) -> Any:
    """Returns the record schema as a TFDS FeaturesDict."""
    import numpy as np
    import tensorflow_datasets as tfds

    if encoding == "flac":
        audio = tfds.features.Scalar(dtype=np.object_, doc=f"a mono FLAC file at {sample_rate} Hz")
    else:
        # Encoded as bytes: by default TFDS stores every sample as an int64.
        audio = tfds.features.Tensor(
            shape=(None,),
            dtype=np.int16,
            encoding=tfds.features.Encoding.BYTES,
            doc=f"mono PCM at {sample_rate} Hz",
        )
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "audio": audio,
            "labels": tfds.features.Sequence(
                tfds.features.ClassLabel(names=list(load_ontology().class_names))
            ),
        }
    )


def _write_features(directory: pathlib.Path, sample_rate: int, encoding: str) -> None:
    features = tfds_features(sample_rate, encoding)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".features") as temporary:
        features.save_config(temporary)
        for path in pathlib.Path(temporary).iterdir():
            move(path, directory / path.name)


def _read(folder: Folder, name: str, rule: Rule) -> dict | None:
    try:
        with folder.open(name) as file:
            return read_json(file, rule)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/{name} is damaged ({error}); delete it and prepare every split again"
        ) from error


def _write(folder: Folder, name: str, content: dict) -> None:
    with folder.replacing(name) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
