"""Anchors: the segment of a clip in which its class most likely sounds (paper, section III-B).

Pure functions of arrays. Letters: `b` batch, `t` samples of a clip, `n` frames of a clip, `s`
samples of a segment, `i` frames of a detector's image. Frames of a clip are `hop` samples apart,
the first one centred on sample 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Num

# What finds anchors: bytedance/uss's rule, or that of HTS-AT's own separation program.
RULES = ("uss", "htsat")
# The framewise curve has plateaus of 32 frames, so that scores tie up to rounding.
TIE = 1e-6


@struct.dataclass
class Anchors:
    """Segments cut from clips.

    Attributes:
      segment: [b, s] samples.
      begin_sample: [b] where each begins in its clip.
      samples: [b] true samples in it; what follows is padding.
      score: [b] mean probability of the class over the segment.
    """

    segment: Float[Array, "b s"]
    begin_sample: Int[Array, "b"]
    samples: Int[Array, "b"]
    score: Float[Array, "b"]


def anchor_scores(probability: Float[Array, "b n"], segment_frames: int) -> Float[Array, "b n"]:
    """Mean probability over `segment_frames` (odd) frames around each, ends replicated."""
    half = segment_frames // 2
    padded = jnp.pad(probability, ((0, 0), (half, half)), mode="edge")
    return _window_sum(padded, segment_frames) / segment_frames


def image_scores(probability: Float[Array, "b i"], segment_frames: int) -> Float[Array, "b i"]:
    """Mean probability over `segment_frames` frames, half of them before each; zero outside."""
    half = segment_frames // 2
    padded = jnp.pad(probability, ((0, 0), (half, segment_frames - 1 - half)))
    return _window_sum(padded, segment_frames) / segment_frames


def choose_anchor(
    probability: Float[Array, "b n"],
    samples: Int[Array, "b"],
    *,
    clip_samples: int,
    segment_samples: int,
    hop_samples: int,
    loudness: Float[Array, "b _"] | None = None,
    min_dbfs: float = -60.0,
    image: Int[Array | np.ndarray, "i"] | None = None,
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """Begin sample and score of each clip's anchor: the first of `choose_anchors`."""
    begin, score = choose_anchors(
        probability,
        samples,
        count=1,
        clip_samples=clip_samples,
        segment_samples=segment_samples,
        hop_samples=hop_samples,
        loudness=loudness,
        min_dbfs=min_dbfs,
        image=image,
    )
    return begin[:, 0], score[:, 0]


def choose_anchors(
    probability: Float[Array, "b n"],
    samples: Int[Array, "b"],
    *,
    count: int,
    clip_samples: int,
    segment_samples: int,
    hop_samples: int,
    loudness: Float[Array, "b _"] | None = None,
    min_dbfs: float = -60.0,
    image: Int[Array | np.ndarray, "i"] | None = None,
) -> tuple[Int[Array, "b count"], Float[Array, "b count"]]:
    """Begin samples and scores of each clip's anchor and of runners-up that overlap none before.

    The anchor is the first frame whose score is within 1e-6 of the maximum, moved inside the clip.
    Probability beyond the true end of a short clip counts as zero, and the anchor begins so that it
    fits into the true samples where they are enough. Runners-up are chosen in the same way of what
    is left; where nothing is, they repeat the anchor with the score -1.

    Given `image`, the rule is that of HTS-AT's own separation program: `image_scores` instead of
    `anchor_scores`, on the frames of the detector's image, of which frame j stands for frame
    floor(j * clip_samples / hop_samples / i) of the clip. That program takes the strict maximum and
    has clips of one length only; here, too, scores within 1e-6 count as equal, and short and quiet
    clips are treated as above.

    Args:
      probability: framewise probability of the clip's class.
      samples: true samples of each clip, the rest being padding.
      count: how many.
      clip_samples: t.
      segment_samples: s.
      hop_samples: samples between frames.
      loudness: `segment_loudness` of the clips; anchors below `min_dbfs` are then passed over.
      min_dbfs: threshold in dB of full scale; where a clip has no louder segment, its first, with
        the score -1.
      image: the frame of `probability` that holds each image frame's value; None for
        bytedance/uss's rule.
    """
    half = segment_samples // hop_samples // 2
    frame = np.arange(probability.shape[1])
    if image is not None:
        probability = probability[:, image]
        frame = np.arange(len(image)) * clip_samples // (hop_samples * len(image))
    inside = frame * hop_samples <= samples[:, None]
    probability = jnp.where(inside, probability, 0)
    if image is None:
        scores = anchor_scores(probability, 2 * half + 1)
    else:
        scores = image_scores(probability, segment_samples // hop_samples)

    begin_frame = jnp.clip(frame, half, clip_samples // hop_samples - half) - half
    latest = jnp.maximum(samples - segment_samples, 0)
    begin_sample = jnp.minimum(begin_frame * hop_samples, latest[:, None])
    if loudness is not None:
        loud = jnp.take_along_axis(loudness, begin_sample // hop_samples, axis=1) >= min_dbfs
        scores = jnp.where(loud, scores, -1.0)

    begins, best_scores = [], []
    for _ in range(count):
        best = jnp.argmax(scores >= jnp.max(scores, axis=1, keepdims=True) - TIE, axis=1)[:, None]
        begin = jnp.take_along_axis(begin_sample, best, axis=1)
        score = jnp.take_along_axis(scores, best, axis=1)
        begins.append(jnp.where(score < 0, begins[0], begin) if begins else begin)
        best_scores.append(score)
        scores = jnp.where(jnp.abs(begin_sample - begin) < segment_samples, -1.0, scores)
    return jnp.concatenate(begins, axis=1), jnp.concatenate(best_scores, axis=1)


def segment_loudness(
    clip: Float[Array, "b t"],
    samples: Int[Array, "b"],
    *,
    segment_samples: int,
    hop_samples: int,
) -> Float[Array, "b _"]:
    """Level in dB of full scale of the segment beginning at each multiple of the hop.

    The mean square is over the true samples of a segment, as in the mixing.
    """
    frames = clip.shape[1] // hop_samples
    width = segment_samples // hop_samples
    squares = jnp.square(clip[:, : frames * hop_samples])
    squares = jnp.sum(squares.reshape(-1, frames, hop_samples), axis=2)
    begin = jnp.arange(frames - width + 1) * hop_samples
    true = jnp.clip(samples[:, None] - begin, 1, segment_samples)
    return 10 * jnp.log10(jnp.maximum(_window_sum(squares, width) / true, 1e-20))


def random_begin(key: Array, samples: Int[Array, "b"], *, segment_samples: int) -> Int[Array, "b"]:
    """Begin samples uniform over what the true samples allow.

    The reference's `random` mode draws within the first second only; here it is the whole clip.
    """
    return jax.random.randint(
        key, samples.shape, 0, jnp.maximum(samples - segment_samples, 0) + 1
    ).astype(samples.dtype)


def cut(clip: Num[Array, "b t"], begin_sample: Int[Array, "b"], segment_samples: int) -> Array:
    """[b, s]: `segment_samples` samples of each clip from its begin."""
    take = lambda row, begin: jax.lax.dynamic_slice(row, (begin,), (segment_samples,))  # noqa: E731
    return jax.vmap(take)(clip, begin_sample)


def _window_sum(x: Float[Array, "b n"], width: int) -> Float[Array, "b _"]:
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, width), (1, 1), "VALID")
