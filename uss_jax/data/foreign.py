"""What a directory of TFRecords holds that `prepare` did not write."""

import dataclasses
import json
import os
from typing import Any

from uss_jax.data.examples import guess_schema, parse
from uss_jax.data.index import shards_of_split
from uss_jax.data.metadata import read_encoding, read_sample_rate
from uss_jax.data.schema import Schema
from uss_jax.data.storage import Folder, open_folder
from uss_jax.data.tfrecord import scan_records
from uss_jax.errors import UserError


def find_schema(
    directory: str | os.PathLike, split: str, given: Schema | None
) -> tuple[Schema, bool]:
    """How the records of a split hold a clip, and whether that is news to the directory.

    Where no schema is given, the first record is looked at. The sample rate is that of the schema,
    of metadata.json or of TFDS's features.json.

    Raises:
      UserError: it cannot be found out; says what to write into a schema.
    """
    folder = open_folder(directory)
    names = shards_of_split(directory, split, given or Schema())
    if given is None and "metadata.json" in folder.sizes():
        rate, encoding = read_sample_rate(directory), read_encoding(directory)
        schema, known = Schema(encoding=encoding, sample_rate=rate), True
    else:
        schema, known = given or Schema(), False
    shard = f"{folder}/{names[0]}"
    offset, _, payload = next(scan_records(shard))
    if given is None:
        try:
            parse(payload, schema)
        except ValueError:
            schema = _guess(payload, schema, f"{shard}: the record at byte {offset - 12}")
            known = False
        else:
            if not known:
                schema = _guess(payload, schema, f"{shard}: the record at byte {offset - 12}")
    if schema.sample_rate is None:
        rate = _tfds_sample_rate(folder)
        if rate is None:
            raise UserError(
                f"the sample rate of the records in {directory} is nowhere said; give a --schema "
                'with "sample_rate"'
            )
        schema = dataclasses.replace(schema, sample_rate=rate)
    return schema, not known


def _guess(payload: bytes, schema: Schema, where: str) -> Schema:
    try:
        return guess_schema(payload, schema)
    except ValueError as error:
        raise UserError(f"{where} {error}; say what is what with a --schema") from None


def _tfds_sample_rate(folder: Folder) -> int | None:
    """What TFDS's own description of an audio feature says, if there is one."""
    try:
        with folder.open("features.json") as file:
            described = json.load(file)
    except (OSError, ValueError):
        return None
    rates = list(_values(described, "sampleRate"))
    return int(rates[0]) if rates and str(rates[0]).isdecimal() else None


def _values(node: Any, key: str) -> Any:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from _values(value, key)
