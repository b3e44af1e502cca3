"""Anchors: the segment of a clip most likely to contain its class (paper, section III-B).

Pure functions of arrays. Letters: `b` batch, `t` samples of a clip, `n` frames of a clip, `s`
samples of a segment, `i` frames of a detector's image. Frames of a clip are `hop_samples` apart,
the first one centred on sample 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Num

from uss_jax.errors import UserError
from uss_jax.models.tagging import TaggingNet

# Rules that find anchors: that of bytedance/uss, or of HTS-AT's own separation program.
RULES = ("uss", "htsat")
# Framewise probabilities have plateaus of 32 frames, so scores tie up to rounding.
TIE = 1e-6


@struct.dataclass
class Anchors:
    """Segments cut from clips.

    Attributes:
      segment: [b, s] waveforms.
      begin_sample: [b] index of the first sample of each in its clip.
      samples: [b] true samples of each; the rest is padding.
      score: [b] mean probability of the class over the segment.
    """

    segment: Float[Array, "b s"]
    begin_sample: Int[Array, "b"]
    samples: Int[Array, "b"]
    score: Float[Array, "b"]


def image_of_rule(
    rule: str, sed: TaggingNet | None, clip_samples: int, where: str
) -> np.ndarray | None:
    """Returns the `image` argument of `choose_anchors` for a rule and a clip length.

    Args:
      rule: one of RULES.
      sed: the detector; None if anchors are not detected.
      clip_samples: length of the clips, in samples.
      where: name of the option that sets the rule, for messages.

    Raises:
      UserError: the rule is unknown, or does not apply to this detector or clip length.
    """
    if rule not in RULES:
        raise UserError(f"{where} is {rule!r}, expected {' or '.join(RULES)}")
    if rule == "uss" or sed is None:
        return None
    if not hasattr(sed, "frames_of_image"):
        raise UserError(
            f"{where}=htsat needs an HTS-AT as detector, but the detector is a "
            f"{type(sed).__name__}; give an HTS-AT, or leave the rule at uss"
        )
    try:
        return sed.frames_of_image(clip_samples // sed.frame_hop_samples + 1)
    except ValueError:
        least, most = (
            frames * sed.frame_hop_samples / sed.sample_rate
            for frames in (sed.image_frames / 2, sed.image_frames)
        )
        raise UserError(
            f"{where}=htsat needs clips that fit HTS-AT's input image exactly once, of at least "
            f"{least:g} and less than {most:g} s, not {clip_samples / sed.sample_rate:g} s; pad "
            "or cut them (config.data.clip_seconds, `mine --clip-seconds`), or leave the rule at "
            "uss"
        ) from None


def anchor_scores(probability: Float[Array, "b n"], segment_frames: int) -> Float[Array, "b n"]:
    """Averages probability over `segment_frames` (odd) frames centred on each; replicates edges."""
    half = segment_frames // 2
    padded = jnp.pad(probability, ((0, 0), (half, half)), mode="edge")
    return _window_sum(padded, segment_frames) / segment_frames


def image_scores(probability: Float[Array, "b i"], segment_frames: int) -> Float[Array, "b i"]:
    """Averages probability over `segment_frames` frames, half of them before each, zero-padded."""
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
    """Returns begin sample and score of each clip's anchor: the first of `choose_anchors`."""
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
    """Returns begin samples and scores of each clip's anchor and its non-overlapping runners-up.

    The anchor is centred on the first frame whose score is within 1e-6 of the maximum, moved inside
    the clip. Probability beyond the true end of a short clip counts as zero, and the anchor is kept
    within the true samples if they suffice. Runners-up are chosen in the same way from what is
    left; if nothing is, they repeat the anchor with the score -1.

    Given `image`, the rule is that of HTS-AT's own separation program: `image_scores` instead of
    `anchor_scores`, on the frames of the detector's image, of which frame j stands for frame
    floor(j * clip_samples / hop_samples / i) of the clip. That program takes the strict maximum and
    supports one clip length only; here, scores within 1e-6 count as equal, and short and quiet
    clips are treated as above.

    Args:
      probability: framewise probability of each clip's class.
      samples: true samples of each clip; the rest is padding.
      count: number of segments per clip.
      clip_samples: t.
      segment_samples: s.
      hop_samples: samples between frames.
      loudness: `segment_loudness` of the clips, to reject segments below `min_dbfs`; None for all.
      min_dbfs: level threshold, in dB of full scale; a clip without a louder segment gets its
        first, with the score -1.
      image: for each image frame, the frame of `probability` that holds its value; None for
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

    return _best_apart(scores, begin_sample, count, segment_samples)


def _best_apart(
    scores: Float[Array, "b i"], begin_sample: Int[Array, "b i"], count: int, segment_samples: int
) -> tuple[Int[Array, "b count"], Float[Array, "b count"]]:
    """Returns begin samples and scores of the best segments that do not overlap, best first.

    Where none is left, the first is repeated with the score -1.
    """
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
    """Returns the level, in dB of full scale, of the segment at each multiple of the hop.

    The mean square is over the true samples of a segment, as in mixing.
    """
    frames = clip.shape[1] // hop_samples
    width = segment_samples // hop_samples
    squares = jnp.square(clip[:, : frames * hop_samples])
    squares = jnp.sum(squares.reshape(-1, frames, hop_samples), axis=2)
    begin = jnp.arange(frames - width + 1) * hop_samples
    true = jnp.clip(samples[:, None] - begin, 1, segment_samples)
    return 10 * jnp.log10(jnp.maximum(_window_sum(squares, width) / true, 1e-20))


def random_begin(key: Array, samples: Int[Array, "b"], *, segment_samples: int) -> Int[Array, "b"]:
    """Draws begin samples uniformly; segments stay within the true samples if these suffice.

    The reference's `random` mode draws within the first second only.
    """
    return jax.random.randint(
        key, samples.shape, 0, jnp.maximum(samples - segment_samples, 0) + 1
    ).astype(samples.dtype)


def cut(clip: Num[Array, "b t"], begin_sample: Int[Array, "b"], segment_samples: int) -> Array:
    """Cuts `segment_samples` samples of each clip, from `begin_sample` on; returns [b, s]."""
    take = lambda row, begin: jax.lax.dynamic_slice(row, (begin,), (segment_samples,))  # noqa: E731
    return jax.vmap(take)(clip, begin_sample)


def _window_sum(x: Float[Array, "b n"], width: int) -> Float[Array, "b _"]:
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, width), (1, 1), "VALID")
