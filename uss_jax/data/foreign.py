"""Recognises the schema of TFRecords that `prepare` did not write."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.data.metadata import read_encoding, read_sample_rate
from uss_jax.data.schema import Schema
from uss_jax.data.shards import container_of, shards_of_split
from uss_jax.data.storage import Folder, open_folder
from uss_jax.data.tf_example import guess_schema, parse
from uss_jax.disk.checked_json import read_json
from uss_jax.errors import UserError, counted
from uss_jax.ontology import load_ontology

_FEATURES = "features.json"  # as TFDS writes it


def find_schema(
    directory: str | os.PathLike, split: str, given: Mapping[str, Any]
) -> tuple[Schema, bool]:
    """Finds the schema of a split's records.

    Attributes not given are taken from metadata.json and TFDS's features.json, or guessed from the
    first record.

    Args:
      directory: directory of the shards.
      split: split name, such as "train".
      given: known attributes of the Schema.

    Returns:
      The schema, and False if metadata.json alone describes the records, else True.
    Raises:
      UserError: an attribute cannot be found; says what to write into a schema.
    """
    folder = open_folder(directory)
    names = shards_of_split(directory, split, Schema(**given))
    shard = f"{folder}/{names[0]}"
    container = container_of(shard)
    offset, _, payload = next(container.scan(shard))
    described = {}
    if "metadata.json" in folder.sizes():
        described = {
            "sample_rate": read_sample_rate(directory),
            "encoding": read_encoding(directory),
        }
    if described and not given:
        schema = Schema(**described)
        try:
            parse(payload, schema)
        except ValueError:
            pass
        else:
            return schema, False
    try:
        schema = guess_schema(payload, given)
    except ValueError as error:
        raise UserError(
            f"{shard}: the record at byte {offset - container.head} {error}; name its features in "
            "a --schema file"
        ) from None
    features = _read_features(folder)
    if schema.encoding not in ("flac", "wav"):  # whole files state their channels themselves
        _require_mono(folder, features, schema.audio)
    if schema.label_form == "index" and "label_form" not in given:
        _require_audioset(folder, features, schema.labels)
    rate = schema.sample_rate or described.get("sample_rate") or _tfds_sample_rate(features)
    if rate is None:
        raise UserError(
            f"the sample rate of the records in {directory} is not stated anywhere; give a "
            '--schema with "sample_rate"'
        )
    return dataclasses.replace(schema, sample_rate=rate), True


def _read_features(folder: Folder) -> Any:
    """Returns the content of TFDS's features.json, None if it cannot be read."""
    try:
        with folder.open(_FEATURES) as file:
            return read_json(file)
    except (OSError, ValueError):
        return None


def _require_mono(folder: Folder, features: Any, audio: str) -> None:
    """Raises a UserError if TFDS's features.json says that a feature holds several channels."""
    shape = list(next(_values(_tfds_feature(features, audio), "dimensions"), []))
    if len(shape) > 1 and str(shape[1]) != "1":
        raise UserError(
            f"{folder}/{_FEATURES}: {audio} has the shape ({', '.join(map(str, shape))}), expected "
            "one axis of samples: write one channel, or convert the recordings with prepare"
        )


def _require_audioset(folder: Folder, features: Any, labels: str) -> None:
    """Raises a UserError if numbers in a feature are, as TFDS says, of other classes than ours."""
    ours, names = len(load_ontology().class_mids), None
    count = next(_values(_tfds_feature(features, labels), "numClasses"), None)
    path = f"{labels}.labels.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError), folder.open(path) as file:
        names = file.read().decode().splitlines()
        count = len(names)
    if count is None or (str(count) == str(ours) and (names is None or _are_ours(names))):
        return
    source = path if names is not None else _FEATURES
    whose = counted(int(count), "class", "classes") + (f" such as {names[0]}" if names else "")
    raise UserError(
        f"{folder}/{source}: the numbers in {labels} are of {whose}, not of AudioSet's {ours}; "
        "convert the recordings with prepare, or give a --schema with "
        '"label_form": "index" if they are'
    )


def _are_ours(names: list[str]) -> bool:
    ontology = load_ontology()
    return names in (list(ontology.class_names), list(ontology.class_mids))


def _tfds_feature(features: Any, name: str) -> Any:
    """Returns what TFDS's features.json says of a feature, None if nothing."""
    for described in _values(features, "features"):
        if isinstance(described, dict) and name in described:
            return described[name]
    return None


def _tfds_sample_rate(features: Any) -> int | None:
    """Returns the sampling rate of an audio feature in TFDS's features.json, in Hz, or None."""
    rates = [str(rate) for rate in _values(features, "sampleRate")]
    if not rates or not (rates[0].isascii() and rates[0].isdigit() and len(rates[0]) < 10):
        return None
    rate = int(rates[0])
    return rate if LOWEST_SAMPLE_RATE <= rate <= HIGHEST_SAMPLE_RATE else None


def _values(node: Any, key: str) -> Any:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from _values(value, key)
