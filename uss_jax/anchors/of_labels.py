"""Finds the anchors of every label of every clip of a batch, with purity and level.

Pure functions of arrays. Letters: `b` clips of a batch, `t` samples, `n` frames, `k` classes, `l`
labels of a clip, `c` anchors of a label, `i` frames of a detector's image.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from uss_jax.anchors.detect import choose_anchors, segment_loudness
from uss_jax.audio.pcm import to_float
from uss_jax.models.tagging import detect


def anchors_of_labels(
    framewise: Float[Array, "b n k"],
    clip: Float[Array, "b t"],
    samples: Int[Array, "b"],
    labels: Int[Array, "b l"],
    related: Shaped[Array, "b k"],
    *,
    hop_samples: int,
    segment_samples: int,
    candidates: int,
    min_dbfs: float | None,
    image: Int[Array, "i"] | None,
) -> dict[str, Array]:
    """Finds the anchors of every label of every clip; measures purity and level of the best ones.

    Args:
      framewise: framewise probabilities of all classes.
      clip: waveforms.
      samples: true samples of each clip; the rest is padding.
      labels: class indices; rows of clips with fewer labels are filled with any class.
      related: nonzero for a clip's labels, their ancestors and their descendants.
      hop_samples: samples between frames.
      segment_samples: length of an anchor, in samples.
      candidates: number of anchors per label.
      min_dbfs: lowest level of an anchor, in dB of full scale; None for no limit.
      image: for HTS-AT's own rule, see `choose_anchors`.

    Returns:
      begin_sample and score [b, l, c], purity and rms_db [b, l].
    """
    batch, width = labels.shape
    loudness = segment_loudness(
        clip, samples, segment_samples=segment_samples, hop_samples=hop_samples
    )
    of_label = jnp.take_along_axis(framewise, labels[:, None, :], axis=2).swapaxes(1, 2)
    begin, score = choose_anchors(
        of_label.reshape(batch * width, -1),
        jnp.repeat(samples, width),
        count=candidates,
        clip_samples=clip.shape[1],
        segment_samples=segment_samples,
        hop_samples=hop_samples,
        loudness=None if min_dbfs is None else jnp.repeat(loudness, width, axis=0),
        min_dbfs=0.0 if min_dbfs is None else min_dbfs,
        image=image,
    )
    begin = begin.reshape(batch, width, candidates)
    best = begin[:, :, 0]

    at = jnp.arange(framewise.shape[1]) * hop_samples
    end = jnp.minimum(best + segment_samples, samples[:, None])[:, :, None]
    inside = ((at >= best[:, :, None]) & (at <= end)).astype(framewise.dtype)
    total = jnp.einsum("bln,bnk->blk", inside, framewise, precision=jax.lax.Precision.HIGHEST)
    mean = total / jnp.sum(inside, axis=2, keepdims=True)
    return {
        "begin_sample": begin,
        "score": score.reshape(batch, width, candidates),
        "purity": jnp.max(jnp.where(related[:, None, :] > 0, 0.0, mean), axis=2),
        "rms_db": jnp.take_along_axis(loudness, best // hop_samples, axis=1),
    }


@functools.partial(jax.jit, static_argnames=("module", "segment_samples", "candidates", "min_dbfs"))
def mine_batch(
    module: Any,
    variables: Any,
    batch: dict[str, Array],
    image: Int[np.ndarray | Array, "i"] | None,
    segment_samples: int,
    candidates: int,
    min_dbfs: float | None,
) -> dict[str, Array]:
    """Runs the detector on a batch and finds its anchors, see `anchors_of_labels`.

    Args:
      module: the detector.
      variables: its variables.
      batch: `audio` [b, t], `samples` [b], `labels` [b, l], `related` [b, k].
      image, segment_samples, candidates, min_dbfs: see `anchors_of_labels`.
    """
    clip = to_float(batch["audio"])
    return anchors_of_labels(
        detect(module, variables, clip)["framewise"],
        clip,
        batch["samples"],
        batch["labels"],
        batch["related"],
        hop_samples=module.frame_hop_samples,
        segment_samples=segment_samples,
        candidates=candidates,
        min_dbfs=min_dbfs,
        image=image,
    )
