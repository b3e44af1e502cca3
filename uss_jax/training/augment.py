"""Augmentation: change of speed, noise, SpecAugment and mixup.

Letters: `b` batch, `t` samples, `n` frames, `m` mel bands.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uss_jax.audio.pcm import to_float

_OCTAVES = 8


def change_speed(
    key: Array, audio: Float[Array, "b t"], samples: Int[Array, "b"], *, least: float, most: float
) -> tuple[Float[Array, "b t"], Int[Array, "b"]]:
    """Plays each item faster or slower, its pitch too (speed perturbation, Ko et al. 2015).

    For small collections: one recording of a dog becomes many dogs. Samples are interpolated
    linearly; a slowed clip is cut to its beginning.

    Args:
      key: random key.
      audio: samples.
      samples: true samples of each item, the rest being zeros.
      least, most: the speed is between them, its logarithm uniform.

    Returns:
      audio and true samples.
    """
    shape, length = samples.shape, audio.shape[1]
    speed = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(least), maxval=jnp.log(most)))
    place = jnp.arange(length) * speed[:, None]
    left = jnp.floor(place).astype(jnp.int32)
    padded = jnp.pad(audio, ((0, 0), (0, 2)))

    def at(index: Array) -> Array:
        return jnp.take_along_axis(padded, jnp.minimum(index, length + 1), axis=1)

    share = (place - left).astype(audio.dtype)
    changed = at(left) * (1 - share) + at(left + 1) * share
    return changed, jnp.clip(jnp.ceil(samples / speed), 1, length).astype(samples.dtype)


def at_other_speed(
    batch: dict[str, Array], key: Array, speed: dict[str, float] | None
) -> dict[str, Array]:
    """Returns a batch with float `audio`, each clip faster or slower.

    Args:
      batch: `audio` [b, t] and, with `speed`, `samples` [b].
      key: random key.
      speed: the other arguments of `change_speed`; None leaves the speed.
    """
    audio = to_float(batch["audio"])
    if speed is None:
        return {**batch, "audio": audio}
    audio, samples = change_speed(key, audio, batch["samples"], **speed)
    return {**batch, "audio": audio, "samples": samples}


def add_noise(
    key: Array, audio: Float[Array, "b t"], *, least_snr_db: float, most_snr_db: float
) -> Float[Array, "b t"]:
    """Adds noise between white and pink to each item, as far below its mean square as is drawn.

    For recordings that are cleaner than the world: what pads short ones is digital silence, and a
    net may learn to listen to what lies 60 dB below the sound.

    Args:
      key: random key.
      audio: samples.
      least_snr_db, most_snr_db: the level below the item's mean square is uniform between them.
    """
    keys = jax.random.split(key, _OCTAVES + 3)
    batch, samples = audio.shape
    noise = jax.random.normal(keys[0], audio.shape)
    # Pink as a sum of steps, each octave half as fast as the one above.
    pink = jnp.zeros_like(noise)
    for octave in range(1, _OCTAVES + 1):
        length = 2**octave
        steps = jax.random.normal(keys[octave], (batch, -(-samples // length)))
        pink += jnp.repeat(steps, length, axis=1)[:, :samples]
    noise += pink * jax.random.uniform(keys[-1], (batch, 1))
    snr = jax.random.uniform(keys[-2], (batch, 1), minval=least_snr_db, maxval=most_snr_db)
    power = jnp.mean(jnp.square(audio), axis=1, keepdims=True) * 10 ** (-snr / 10)
    return audio + noise * jnp.sqrt(power / jnp.mean(jnp.square(noise), axis=1, keepdims=True))


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
