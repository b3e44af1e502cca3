"""The schema of records that `prepare` did not write: feature names, encoding, label form."""

import dataclasses
import os
import re
from typing import Any

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.data.encodings import ENCODINGS
from uss_jax.disk.checked_json import read_json, record, shown, text, whole
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError

LABEL_FORMS = ("index", "mid", "name", "multi_hot")


@dataclasses.dataclass(frozen=True)
class Schema:
    """The schema of a directory's records; the defaults are those of `prepare`.

    Attributes:
      id, audio, labels: feature names.
      encoding: encoding of the samples, see data/encodings.py.
      label_form: `index` (int64), `mid` or `name` (bytes), `multi_hot` (a 0 or 1 for each class).
      sample_rate: sampling rate, in Hz; None if metadata.json gives it.
      shards: glob pattern of the shard names; None: TFDS's naming.
      split: name of the split that `shards` forms.
    """

    id: str = "id"
    audio: str = "audio"
    labels: str = "labels"
    encoding: str = "pcm_s16le"
    label_form: str = "index"
    sample_rate: int | None = None
    shards: str | None = None
    split: str = "train"


_LONGEST_NAME = 200
# The split is part of the index's file name.
_SPLIT = re.compile(r"[A-Za-z0-9_.]{1,100}")


def _name(value: Any, key: str) -> None:
    text()(value, key)
    if not 1 <= len(value) <= _LONGEST_NAME or not value.isprintable():
        raise ValueError(
            f"{key} is {shown(value)}, expected 1 to {_LONGEST_NAME} printable characters"
        )


def _split(value: Any, key: str) -> None:
    text()(value, key)
    if not _SPLIT.fullmatch(value):
        raise ValueError(f'{key} is {shown(value)}, expected letters, digits, "_" and "."')


_RULE = record(
    {},
    {
        **dict.fromkeys(("id", "audio", "labels", "shards"), _name),
        "split": _split,
        "encoding": text(*ENCODINGS),
        "label_form": text(*LABEL_FORMS),
        "sample_rate": whole(LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE),
    },
)


def read_schema(path: str | os.PathLike) -> dict[str, Any]:
    """Reads from a JSON file the attributes of a Schema that it sets.

    Raises:
      UserError: the file cannot be read or is invalid.
    """
    try:
        with open(path, "rb", opener=at_once) as file:
            found = read_json(file, _RULE)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSON file") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if "split" in found and "shards" not in found:
        raise UserError(
            f"{path}: split has no effect without shards, since the names of shards tell their "
            "splits; leave it out or add shards"
        )
    return found
