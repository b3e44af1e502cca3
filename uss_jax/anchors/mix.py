"""Mixes anchors within groups of the batch (paper, section III-C).

Letters: `b` batch, `s` samples.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GAIN_RANGE = (0.02, 50.0)


def energy(segment: Float[Array, "b s"], samples: Int[Array, "b"] | None = None) -> Array:
    """Returns the mean square [b], over the true samples of padded segments."""
    if samples is None:
        return jnp.mean(jnp.square(segment), axis=1)
    return jnp.sum(jnp.square(segment), axis=1) / jnp.maximum(samples, 1)


def mix(
    segment: Float[Array, "b s"],
    segment_energy: Float[Array, "b"],
    *,
    sources: int,
    group_size: int,
    match_energy: bool,
) -> Float[Array, "b s"]:
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
    groups = segment.reshape(-1, group_size, segment.shape[1])
    energies = segment_energy.reshape(-1, group_size)
    mixture = groups
    for k in range(1, sources):
        other = jnp.roll(groups, -k, axis=1)
        if match_energy:
            other = other * matching_gain(energies, jnp.roll(energies, -k, axis=1))[:, :, None]
        mixture = mixture + other
    return mixture.reshape(segment.shape)


def mix_sets(
    segment: Float[Array, "b s"],
    segment_energy: Float[Array, "b"],
    *,
    sources: int,
    match_energy: bool,
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
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
    sets = segment.reshape(-1, sources, segment.shape[1])
    if match_energy:
        energies = segment_energy.reshape(-1, sources)
        gain = matching_gain(energies[:, :1], energies).at[:, 0].set(1)
        sets = sets * gain[:, :, None]
    mixture = jnp.broadcast_to(jnp.sum(sets, axis=1, keepdims=True), sets.shape)
    return mixture.reshape(segment.shape), sets.reshape(segment.shape)


def matching_gain(wanted: Any, energies: Any, xp: Any = jnp) -> Any:
    """Returns the gains, within 0.02 ... 50, that scale signals of these energies to the wanted.

    Args:
      wanted, energies: mean squares, scalars or arrays of one shape.
      xp: `jax.numpy` or `numpy`.
    """
    return xp.clip(xp.sqrt(wanted / xp.maximum(energies, 1e-10)), *GAIN_RANGE)
