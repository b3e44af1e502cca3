"""How a directory's records hold a clip, where it is not as `prepare` writes them."""

import dataclasses
import json
import os

from uss_jax.data.encodings import ENCODINGS
from uss_jax.errors import UserError

LABEL_FORMS = ("index", "mid", "name")


@dataclasses.dataclass(frozen=True)
class Schema:
    """How a directory's records hold a clip; the defaults are what `prepare` writes.

    Attributes:
      id, audio, labels: names of the features.
      encoding: of the samples, see data/encodings.py.
      label_form: `index` (int64), `mid` or `name` (bytes).
      sample_rate: in Hz; None where metadata.json says it.
      shards: a pattern of the shards' names; None: as TFDS names them.
      split: what to call the records of `shards`.
    """

    id: str = "id"
    audio: str = "audio"
    labels: str = "labels"
    encoding: str = "pcm_s16le"
    label_form: str = "index"
    sample_rate: int | None = None
    shards: str | None = None
    split: str = "train"


def read_schema(path: str | os.PathLike) -> Schema:
    """A schema from a JSON file with any of its attributes; a UserError says what is wrong."""
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSON file") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    known = {field.name: field.default for field in dataclasses.fields(Schema)}
    if not isinstance(fields, dict):
        raise UserError(f"{path} must hold an object with some of {', '.join(known)}")
    for key, value in fields.items():
        if key not in known:
            raise UserError(f"{path}: there is no key {key!r}; there are {', '.join(known)}")
        wanted = int if key == "sample_rate" else str
        if type(value) is not wanted:
            raise UserError(f"{path}: {key} is {value!r}, expected {wanted.__name__}")
    schema = Schema(**fields)
    for key, value, allowed in (
        ("encoding", schema.encoding, ENCODINGS),
        ("label_form", schema.label_form, LABEL_FORMS),
    ):
        if value not in allowed:
            raise UserError(f"{path}: {key} is {value!r}, expected {', '.join(allowed)}")
    return schema
