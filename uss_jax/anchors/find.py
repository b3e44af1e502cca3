"""Finds the anchor of every clip of a batch: from a table, by the detector or at random.

Letters: `b` batch, `t` samples of a clip, `i` frames of a detector's image.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from uss_jax.anchors.detect import Anchors, choose_anchor, cut, random_begin, segment_loudness
from uss_jax.audio.pcm import to_float
from uss_jax.models.tagging import TaggingNet, detect


def find_anchors(
    sed: TaggingNet | None,
    sed_variables: Any,
    batch: dict[str, Array],
    key: Array,
    *,
    segment_samples: int,
    min_dbfs: float | None,
    image: Int[Array | np.ndarray, "i"] | None = None,
) -> Anchors:
    """Cuts each clip's anchor: from a table, by the detector, or at random.

    Args:
      sed: the sound event detector; None for random anchors.
      sed_variables: its variables.
      batch: `audio` [b, t], `samples` [b], `class_index` [b]. If it has `begin_sample` and `score`
        [b], the host has looked the anchors up in a table, and `audio` holds only these.
      key: random key, for random anchors.
      segment_samples: length of an anchor, in samples.
      min_dbfs: lowest level of an anchor found by the detector, in dB of full scale; None for no
        limit, as in the reference.
      image: selects HTS-AT's own rule, see `choose_anchors`.
    """
    clip, samples = to_float(batch["audio"]), batch["samples"]
    if "begin_sample" in batch:
        return Anchors(clip, batch["begin_sample"], samples, batch["score"])
    if sed is None:
        begin = random_begin(key, samples, segment_samples=segment_samples)
        score = jnp.zeros(begin.shape, clip.dtype)
    else:
        framewise = detect(sed, sed_variables, clip)["framewise"]
        index = batch["class_index"][:, None, None]
        loudness = None
        if min_dbfs is not None:
            loudness = segment_loudness(
                clip, samples, segment_samples=segment_samples, hop_samples=sed.frame_hop_samples
            )
        begin, score = choose_anchor(
            jnp.take_along_axis(framewise, index, axis=2)[:, :, 0],
            samples,
            clip_samples=clip.shape[1],
            segment_samples=segment_samples,
            hop_samples=sed.frame_hop_samples,
            loudness=loudness,
            min_dbfs=0.0 if min_dbfs is None else min_dbfs,
            image=image,
        )
    return Anchors(
        segment=cut(clip, begin, segment_samples),
        begin_sample=begin,
        samples=jnp.clip(samples - begin, 0, segment_samples),
        score=score,
    )
