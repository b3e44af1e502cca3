"""Augmentation of the tagging net's normalised log-mel: SpecAugment and mixup.

Letters: `b` batch, `n` frames, `m` mel bands.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def spec_augment(
    key: Array,
    mel: Float[Array, "b n m"],
    *,
    time_width: int,
    time_stripes: int,
    mel_width: int,
    mel_stripes: int,
) -> Float[Array, "b n m"]:
    """Zeroes random stripes of time and of frequency (arXiv:1904.08779), for each item apart.

    Args:
      key: random key.
      mel: normalised log-mel, so that zero is the mean.
      time_width: stripes of time are narrower than this, in frames, their width uniform.
      time_stripes: number of them.
      mel_width: stripes of frequency are narrower than this, in bands.
      mel_stripes: number of them.
    """

    def keep(key: Array, length: int, width: int, stripes: int) -> Array:
        width_key, begin_key = jax.random.split(key)
        shape = (mel.shape[0], stripes, 1)
        widths = jax.random.randint(width_key, shape, 0, min(width, length))
        begins = jnp.floor(jax.random.uniform(begin_key, shape) * (length - widths))
        place = jnp.arange(length)
        return ~jnp.any((place >= begins) & (place < begins + widths), axis=1)

    time_key, mel_key = jax.random.split(key)
    frames = keep(time_key, mel.shape[1], time_width, time_stripes)
    bands = keep(mel_key, mel.shape[2], mel_width, mel_stripes)
    return mel * frames[:, :, None] * bands[:, None, :]


def mixup_weights(key: Array, pairs: int, alpha: float) -> Float[Array, "b"]:
    """Share of the first of each pair, Beta(alpha, alpha); [pairs]."""
    return jax.random.beta(key, alpha, alpha, (pairs,))


def mixup(x: Float[Array, "b *rest"], weight: Float[Array, "_"]) -> Array:
    """Items 2i and 2i + 1 blended into one (arXiv:1710.09412), for inputs and targets alike.

    As in PANNs a batch of b items gives b / 2 blends, so the loader reads twice the batch.
    """
    weight = weight.reshape(-1, *([1] * (x.ndim - 1)))
    return x[0::2] * weight + x[1::2] * (1 - weight)
