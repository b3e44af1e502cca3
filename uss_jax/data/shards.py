"""Shards: their containers and names.

A name is `<name>-<split>.tfrecord-00000-of-00064`, or what a schema's pattern matches.
"""

import fnmatch
import os
import re

from uss_jax.data.container import Container
from uss_jax.data.schema import Schema
from uss_jax.data.storage import open_folder, versions_below
from uss_jax.data.tfrecord import TFRECORD
from uss_jax.errors import UserError

# Containers of records by name; the first is the one that `prepare` writes.
CONTAINERS = {container.name: container for container in (TFRECORD,)}
WRITTEN = next(iter(CONTAINERS.values()))
_SHARD_NAME = re.compile(
    r"(?P<name>.+)-(?P<split>[^-]+)\.(?P<container>\w+)-(?P<at>\d{5})-of-(?P<of>\d{5})"
)


def shard_name(name: str, split: str, at: int, of: int) -> str:
    """Returns the file name of the shard with number `at` of `of`, from 0."""
    return f"{name}-{split}.{WRITTEN.name}-{at:05d}-of-{of:05d}"


def is_shard(name: str, split: str) -> bool:
    """Returns whether a file is a shard of a split, by its name."""
    match = _parsed(name)
    return match is not None and match["split"] == split


def container_of(shard: str | os.PathLike) -> Container:
    """Returns the container of a shard, by its name; TFRecord if the name tells nothing."""
    match = _parsed(os.path.basename(shard))
    return CONTAINERS[match["container"]] if match else TFRECORD


def _parsed(name: str) -> re.Match | None:
    match = _SHARD_NAME.fullmatch(name)
    return match if match and match["container"] in CONTAINERS else None


def splits(directory: str | os.PathLike) -> list[str]:
    """Returns the splits that have shards in a directory."""
    return sorted({match["split"] for match in _shard_names(directory)})


def _shard_names(directory: str | os.PathLike) -> list[re.Match]:
    return [match for match in map(_parsed, _names(directory)) if match]


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
            f"{shard_name('mine', split, 0, 4)}{versions_below(directory)}"
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
