"""The record schema: a clip as a `tf.train.Example`, without TensorFlow.

    id      bytes   name of the clip, UTF-8
    audio   bytes   little-endian int16 PCM, one channel
    labels  int64   class indexes, ascending

Sample rate and encoding are the same for all records of a directory: see data/metadata.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16
from tensorflow_datasets.proto import tf_example_pb2


class Clip(NamedTuple):
    """What a record holds.

    Attributes:
      id: name of the clip.
      audio: its samples, still as bytes.
      labels: class indexes, as stored.
    """

    id: bytes
    audio: bytes
    labels: tuple[int, ...]


def serialise(id: bytes, samples: Int16[np.ndarray, " t"], labels: Sequence[int]) -> bytes:
    """A clip as bytes; equal clips give equal bytes."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["id"].bytes_list.value.append(id)
    feature["audio"].bytes_list.value.append(samples.astype("<i2", copy=False).tobytes())
    feature["labels"].int64_list.value.extend(sorted(set(labels)))
    return example.SerializeToString(deterministic=True)


def parse(payload: bytes) -> Clip:
    """The clip in a record; a ValueError says what is not as the schema has it."""
    example = tf_example_pb2.Example()
    try:
        example.ParseFromString(payload)
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        raise ValueError("is not a tf.train.Example") from error
    feature = example.features.feature
    missing = [name for name in Clip._fields if name not in feature]
    if missing:
        raise ValueError(
            f"has no feature {' and no '.join(map(repr, missing))} (it has {sorted(feature)})"
        )
    for name in ("id", "audio"):
        if len(feature[name].bytes_list.value) != 1:
            raise ValueError(f"needs one bytes value in feature {name!r}")
    if feature["labels"].WhichOneof("kind") not in ("int64_list", None):
        raise ValueError("needs class indexes (int64) in feature 'labels'")
    return Clip(
        id=feature["id"].bytes_list.value[0],
        audio=feature["audio"].bytes_list.value[0],
        labels=tuple(feature["labels"].int64_list.value),
    )
