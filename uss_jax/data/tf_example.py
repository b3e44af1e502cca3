"""The record schema: a clip as a `tf.train.Example`, without TensorFlow.

    id      bytes   clip name, UTF-8
    audio   bytes   little-endian int16 PCM, mono; or a FLAC file
    labels  int64   class indexes, ascending
    caption bytes   a sentence on what is heard, UTF-8; only if there is one

Sampling rate and encoding are the same for all records of a directory, see data/metadata.py.
data/schema.py describes records that differ from this layout.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int16
from tensorflow_datasets.proto import tf_example_pb2

from uss_jax.audio.containers import begins_file
from uss_jax.data.schema import Schema
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

CAPTION = "caption"
# Feature names common in other data sets, in the order they are tried.
_GUESSES = {
    "id": ("id", "clip_id", "video_id", "ytid", "YTID", "audio_id", "fname", "filename", "key"),
    "audio": ("audio", "waveform", "samples", "pcm", "wav", "flac", "audio/encoded", "signal"),
    "labels": ("labels", "label", "classes", "class", "mids", "label_ids", "targets", "tags"),
}


def guess_schema(payload: bytes, given: Mapping[str, Any]) -> Schema:
    """Guesses the schema of a record from the names and types of its features.

    Args:
      payload: the serialised record.
      given: known attributes of the schema, which are not guessed.

    Raises:
      ValueError: a feature cannot be found; names it.
    """
    feature = _features(payload)
    found = {}
    for what, names in _GUESSES.items():
        names = (given[what],) if what in given else names
        name = next((name for name in names if name in feature), None)
        if name is None:
            looked = f"{names[0]!r}" if what in given else f"that looks like its {what}"
            raise ValueError(f"has no feature {looked} (it has {sorted(feature)})")
        found[what] = name
    found["encoding"] = _guess_encoding(feature[found["audio"]])
    found["label_form"] = _guess_label_form(feature[found["labels"]])
    return Schema(**{**found, **given})


def _guess_encoding(audio: Any) -> str:
    kind = audio.WhichOneof("kind")
    if kind != "bytes_list":
        return {"float_list": "float", "int64_list": "int64"}.get(kind, "pcm_s16le")
    data = audio.bytes_list.value[0] if audio.bytes_list.value else b""
    if data.startswith(b"fLaC"):
        return "flac"
    return "wav" if begins_file(data) else "pcm_s16le"


def _guess_label_form(labels: Any) -> str:
    if labels.WhichOneof("kind") == "bytes_list":
        mids = any(value.startswith(b"/") for value in labels.bytes_list.value[:1])
        return "mid" if mids else "name"
    values = [*labels.int64_list.value, *labels.float_list.value]
    classes = len(load_ontology().class_mids)
    return "multi_hot" if len(values) == classes and set(values) <= {0, 1} else "index"


class Clip(NamedTuple):
    """The contents of a record.

    Attributes:
      id: clip name.
      audio: encoded samples.
      labels: class indexes, in stored order.
    """

    id: bytes
    audio: bytes
    labels: tuple[int, ...]


def serialise(
    id: bytes,
    samples: Int16[np.ndarray, " t"] | bytes,
    labels: Sequence[int],
    caption: str = "",
) -> bytes:
    """Serialises a clip deterministically; `samples` given as bytes are a FLAC file."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["id"].bytes_list.value.append(id)
    audio = samples if isinstance(samples, bytes) else samples.astype("<i2", copy=False).tobytes()
    feature["audio"].bytes_list.value.append(audio)
    feature["labels"].int64_list.value.extend(sorted(set(labels)))
    if caption:
        feature[CAPTION].bytes_list.value.append(caption.encode(errors="surrogateescape"))
    return example.SerializeToString(deterministic=True)


def parse(payload: bytes, schema: Schema | None = None) -> Clip:
    """Parses a record; `audio` of the clip holds the bytes as stored.

    Raises:
      ValueError: the record does not match the schema.
    """
    schema = schema or Schema()
    feature = _features(payload)
    names = {"id": schema.id, "audio": schema.audio, "labels": schema.labels}
    missing = [name for name in names.values() if name not in feature]
    if missing:
        raise ValueError(
            f"has no feature {' and no '.join(map(repr, missing))} (it has {sorted(feature)})"
        )
    id = _one_bytes(feature, schema.id)
    if schema.encoding == "float":
        audio = _packed(feature, schema.audio, "float_list")
    elif schema.encoding == "int64":
        audio = _packed(feature, schema.audio, "int64_list")
    else:
        audio = _one_bytes(feature, schema.audio)
    return Clip(id=id, audio=audio, labels=_labels(feature[schema.labels], schema))


def caption_of(payload: bytes, feature: str = CAPTION) -> str:
    """Returns the caption in a record, the first of several; "" if it has none.

    Raises:
      ValueError: it is not text.
    """
    found = _features(payload)
    if feature not in found or found[feature].WhichOneof("kind") is None:
        return ""
    if found[feature].WhichOneof("kind") != "bytes_list":
        raise ValueError(f"has no text in feature {feature!r}")
    captions = found[feature].bytes_list.value
    try:
        return captions[0].decode() if captions else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"has a {feature} that is not UTF-8") from error


def _features(payload: bytes) -> Mapping[str, Any]:
    example = tf_example_pb2.Example()
    try:
        example.ParseFromString(payload)
    except Exception as error:  # DecodeError is in different modules across protobuf versions
        raise ValueError("is not a tf.train.Example") from error
    return example.features.feature


def _one_bytes(feature: Mapping[str, Any], name: str) -> bytes:
    if len(feature[name].bytes_list.value) != 1:
        raise ValueError(f"needs one bytes value in feature {name!r}")
    return feature[name].bytes_list.value[0]


def _packed(feature: Mapping[str, Any], name: str, kind: str) -> bytes:
    """Returns the packed protobuf bytes of a numeric list."""
    if feature[name].WhichOneof("kind") != kind:
        raise ValueError(f"needs a {kind} in feature {name!r}")
    data = getattr(feature[name], kind).SerializeToString()
    # Skip the field tag (one byte) and the length, a varint.
    at = 1
    while at < len(data) and data[at] >= 128:
        at += 1
    return data[at + 1 :]


def _labels(feature: Any, schema: Schema) -> tuple[int, ...]:
    kind = feature.WhichOneof("kind")
    if schema.label_form == "multi_hot":
        values = [*feature.int64_list.value, *feature.float_list.value]
        classes = len(load_ontology().class_mids)
        if len(values) != classes or not set(values) <= {0, 1}:
            raise ValueError(f"needs {classes} zeros and ones in feature {schema.labels!r}")
        return tuple(index for index, value in enumerate(values) if value)
    if schema.label_form == "index":
        if kind not in ("int64_list", None):
            raise ValueError(f"needs class indexes (int64) in feature {schema.labels!r}")
        indexes = tuple(feature.int64_list.value)
        if len(set(indexes)) < len(indexes):
            twice = next(label for label in indexes if indexes.count(label) > 1)
            raise ValueError(
                f"has the label {twice} more than once in feature {schema.labels!r} (use "
                "label_form multi_hot for zeros and ones of all classes)"
            )
        return indexes
    if kind not in ("bytes_list", None):
        raise ValueError(f"needs {schema.label_form}s (bytes) in feature {schema.labels!r}")
    words = [value.decode(errors="replace") for value in feature.bytes_list.value]
    try:
        return tuple(load_ontology().resolve(word) for word in words)
    except UserError as error:
        raise ValueError(f"has an unknown label: {error}") from None
