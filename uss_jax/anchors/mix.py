"""Mixes anchors within groups of the batch (paper, section III-C).

Letters: `b` batch, `a` audio channels, `s` samples.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GAIN_RANGE = (0.02, 50.0)


def energy(segment: Float[Array, "b s"], samples: Int[Array, "b"] | None = None) -> Array:
    """Returns the mean square [b], over the true samples of padded segments."""
    if samples is None:
        return jnp.mean(jnp.square(segment), axis=1)
    return jnp.sum(jnp.square(segment), axis=1) / jnp.maximum(samples, 1)


def panned(segment: Float[Array, "b s"], pan: float, key: Array) -> Float[Array, "b 2 s"]:
    """Places each segment at random between two channels, whose mean power is the segment's.

    Args:
      segment: one-channel segments.
      pan: greatest distance from the middle, where both channels are the segment; at 1 a segment
        may be in the left channel or in the right one only.
      key: random key.
    """
    place = jax.random.uniform(key, segment.shape[:1], minval=-pan, maxval=pan)
    angle = jnp.pi / 4 * (1 + place)
    gains = jnp.sqrt(2.0) * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return gains[:, :, None] * segment[:, None]


def mix(
    segment: Float[Array, "b *a s"],
    segment_energy: Float[Array, "b"],
    *,
    sources: int,
    group_size: int,
    match_energy: bool,
) -> Float[Array, "b *a s"]:
    """Adds to item i of a group the items i + 1 ... i + sources - 1, modulo the group size.

    Groups make the mixtures independent of the number of devices; the reference's group is the 16
    items of one device. Mixtures are not normalised and may exceed 1.

    Args:
      segment: the targets.
      segment_energy: energies of the targets.
      sources: number of sources in a mixture.
      group_size: items in a group; divides b.
      match_energy: scale each added item to the target's energy, by a gain within 0.02 ... 50.
    """
    groups = segment.reshape(-1, group_size, *segment.shape[1:])
    energies = segment_energy.reshape(-1, group_size)
    mixture = groups
    for k in range(1, sources):
        other = jnp.roll(groups, -k, axis=1)
        if match_energy:
            gain = matching_gain(energies, jnp.roll(energies, -k, axis=1))
            other = other * _along(gain, other)
        mixture = mixture + other
    return mixture.reshape(segment.shape)


def mix_sets(
    segment: Float[Array, "b *a s"],
    segment_energy: Float[Array, "b"],
    *,
    sources: int,
    match_energy: bool,
) -> tuple[Float[Array, "b *a s"], Float[Array, "b *a s"]]:
    """Mixes every `sources` consecutive items into one mixture, of which each is a target.

    There are fewer different mixtures than with `mix`, but the targets of one add up to it.

    Args:
      segment: the sources.
      segment_energy: energies of the sources.
      sources: number of sources in a mixture; divides b.
      match_energy: scale the others to the energy of the first, as `mix` does.

    Returns:
      The mixture of each item, and the items as scaled in it.
    """
    sets = segment.reshape(-1, sources, *segment.shape[1:])
    if match_energy:
        energies = segment_energy.reshape(-1, sources)
        gain = matching_gain(energies[:, :1], energies).at[:, 0].set(1)
        sets = sets * _along(gain, sets)
    mixture = jnp.broadcast_to(jnp.sum(sets, axis=1, keepdims=True), sets.shape)
    return mixture.reshape(segment.shape), sets.reshape(segment.shape)


def _along(gain: Float[Array, "g n"], sounds: Float[Array, "g n *rest"]) -> Array:
    """Returns the gains with as many axes as the sounds have."""
    return gain.reshape(gain.shape + (1,) * (sounds.ndim - gain.ndim))


def matching_gain(wanted: Any, energies: Any, xp: Any = jnp) -> Any:
    """Returns the gains, within 0.02 ... 50, that scale signals of these energies to the wanted.

    Args:
      wanted, energies: mean squares, scalars or arrays of one shape.
      xp: `jax.numpy` or `numpy`.
    """
    return xp.clip(xp.sqrt(wanted / xp.maximum(energies, 1e-10)), *GAIN_RANGE)
