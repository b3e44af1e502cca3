"""Recognises the schema of TFRecords that `prepare` did not write."""

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
from uss_jax.errors import UserError


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
    rate = schema.sample_rate or described.get("sample_rate") or _tfds_sample_rate(folder)
    if rate is None:
        raise UserError(
            f"the sample rate of the records in {directory} is not stated anywhere; give a "
            '--schema with "sample_rate"'
        )
    return dataclasses.replace(schema, sample_rate=rate), True


def _tfds_sample_rate(folder: Folder) -> int | None:
    """Returns the sampling rate of an audio feature in TFDS's features.json, in Hz, or None."""
    try:
        with folder.open("features.json") as file:
            described = read_json(file)
    except (OSError, ValueError):
        return None
    rates = [str(rate) for rate in _values(described, "sampleRate")]
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
