"""Mixtures of anchors, inside groups of the batch (paper, section III-C).

Letters: `b` batch, `s` samples.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GAIN_RANGE = (0.02, 50.0)


def energy(segment: Float[Array, "b s"], samples: Int[Array, "b"] | None = None) -> Array:
    """Mean square [b], over the true samples of padded segments."""
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
    """Item i of a group plus items i + 1 ... i + sources - 1, modulo the group.

    Groups make the mixtures independent of the number of devices; the reference's group is the 16
    items of one device. Mixtures are not normalised and may exceed 1.

    Args:
      segment: the targets.
      segment_energy: their energies.
      sources: sources of each mixture.
      group_size: divides b.
      match_energy: scale each added item to the energy of the item it is added to, the gain kept
        within 0.02 ... 50.
    """
    groups = segment.reshape(-1, group_size, segment.shape[1])
    energies = segment_energy.reshape(-1, group_size)
    mixture = groups
    for k in range(1, sources):
        other = jnp.roll(groups, -k, axis=1)
        if match_energy:
            ratio = energies / jnp.maximum(jnp.roll(energies, -k, axis=1), 1e-10)
            other = other * jnp.clip(jnp.sqrt(ratio), *GAIN_RANGE)[:, :, None]
        mixture = mixture + other
    return mixture.reshape(segment.shape)
