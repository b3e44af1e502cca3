"""Augmentation: speed perturbation, noise, SpecAugment and mixup.

Letters: `b` batch, `t` samples, `n` frames, `m` mel bands.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uss_jax.audio.pcm import to_float
from uss_jax.disk.checked_json import number, record, whole
from uss_jax.training.sections import span

_OCTAVES = 8
# Rules for the arguments of these functions in a config, where None turns one off.
AUGMENTATIONS = {
    "speed": span(number(0.1, 10), "least", "most"),
    "noise": span(number(-200, 200), "least_snr_db", "most_snr_db"),
    "spec_augment": record(
        {f"{axis}_width": whole(1, 100_000) for axis in ("time", "mel")}
        | {f"{axis}_stripes": whole(0, 1000) for axis in ("time", "mel")}
    ),
    "mixup_alpha": number(1e-3, 1e3),
}


def change_speed(
    key: Array,
    audio: Float[Array, "b t"],
    samples: Int[Array, "b"],
    middle: Float[Array, "b"] | None = None,
    *,
    length: int,
    least: float,
    most: float,
) -> tuple[Float[Array, "b s"], Int[Array, "b"]]:
    """Plays each item faster or slower, changing its pitch too (Ko et al. 2015).

    For small collections: one recording of a dog becomes many dogs. Samples are interpolated
    linearly.

    Args:
      key: random key.
      audio: waveforms.
      samples: number of true samples of each item; the rest are zeros.
      middle: sample that becomes the middle of each result, unless the waveform's end is nearer;
        None: results begin where the waveforms do.
      length: length of the results, s.
      least, most: range of the log-uniform speed factor.

    Returns:
      Waveforms and their numbers of true samples.
    """
    shape, last = samples.shape, audio.shape[1] + 1
    speed = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(least), maxval=jnp.log(most)))
    begin = jnp.zeros_like(speed)
    if middle is not None:
        begin = jnp.clip(middle - speed * length / 2, 0, jnp.maximum(samples - speed * length, 0))
    place = begin[:, None] + jnp.arange(length) * speed[:, None]
    left = jnp.floor(place).astype(jnp.int32)
    padded = jnp.pad(audio, ((0, 0), (0, 2)))

    def at(index: Array) -> Array:
        return jnp.take_along_axis(padded, jnp.minimum(index, last), axis=1)

    share = (place - left).astype(audio.dtype)
    changed = at(left) * (1 - share) + at(left + 1) * share
    return changed, jnp.clip(jnp.ceil((samples - begin) / speed), 1, length).astype(samples.dtype)


def at_other_speed(
    batch: dict[str, Array],
    key: Array,
    speed: dict[str, float] | None,
    segment_samples: int | None = None,
) -> dict[str, Array]:
    """Returns a batch with float `audio`, the speed of each clip or anchor changed.

    Args:
      batch: batch with `audio` [b, t] and, if `speed` is given, `samples` [b]. With `anchor_sample`
        [b], `audio` holds an anchor that begins there and what is around it; the result holds as
        much of it as becomes the length of an anchor, about the anchor's middle.
      key: random key.
      speed: range of `change_speed`; None for no change.
      segment_samples: length of an anchor, in samples; not needed without `anchor_sample`.
    """
    audio = to_float(batch["audio"])
    if speed is None:
        return {**batch, "audio": audio}
    middle, length = None, audio.shape[1]
    if "anchor_sample" in batch:
        middle, length = batch["anchor_sample"] + segment_samples / 2, segment_samples
    audio, samples = change_speed(key, audio, batch["samples"], middle, length=length, **speed)
    return {**batch, "audio": audio, "samples": samples}


def add_noise(
    key: Array, audio: Float[Array, "b t"], *, least_snr_db: float, most_snr_db: float
) -> Float[Array, "b t"]:
    """Adds noise between white and pink to each item, at a random SNR.

    For recordings cleaner than real ones: short clips are padded with digital silence, and a net
    may learn to use cues 60 dB below the sound.

    Args:
      key: random key.
      audio: waveforms.
      least_snr_db, most_snr_db: range of the uniform SNR in dB, relative to the item's mean square.
    """
    keys = jax.random.split(key, _OCTAVES + 3)
    batch, samples = audio.shape
    noise = jax.random.normal(keys[0], audio.shape)
    # Pink noise as a sum of step functions, each octave changing half as often as the one above.
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
    """Zeroes random time and frequency stripes of each item independently (arXiv:1904.08779).

    Args:
      key: random key.
      mel: normalised log-mel, so that zero is the mean.
      time_width: exclusive upper bound of the uniform width of a time stripe, in frames.
      time_stripes: number of time stripes.
      mel_width: exclusive upper bound of the uniform width of a frequency stripe, in bands.
      mel_stripes: number of frequency stripes.
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
    """Draws the weight of the first item of each pair from Beta(alpha, alpha); [pairs]."""
    return jax.random.beta(key, alpha, alpha, (pairs,))


def mixup(x: Float[Array, "b *rest"], weight: Float[Array, "_"]) -> Array:
    """Blends items 2i and 2i + 1 into one (arXiv:1710.09412); for inputs and targets alike.

    As in PANNs, b items give b / 2 blends, so the loader reads twice the batch.
    """
    weight = weight.reshape(-1, *([1] * (x.ndim - 1)))
    return x[0::2] * weight + x[1::2] * (1 - weight)
