"""Training examples of a batch: mixture, target and condition of each item.

Letters: `b` batch, `a` audio channels, `s` samples of an anchor, `d` width of the condition.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from uss_jax.anchors.detect import Anchors
from uss_jax.anchors.mix import energy, mix, mix_sets, panned


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How anchors become mixtures: the `mixing` section of a config.

    Attributes:
      sources: number of anchors per mixture.
      group_size: number of items that are mixed with each other, see `mix`.
      match_energy: whether added sounds are scaled to the target's energy, see `mix`.
      gain_db: maximum random offset, in dB up or down, of an added sound's level after matching.
      all_targets: whether every `sources` items share one mixture, see `mix_sets`.
      silent_share: probability that an item is queried with a class absent from its mixture; its
        target is then silence. The condition is that of the item `sources` places on in the group,
        the nearest outside the mixture. Only items with `batch["absent"]` set are eligible: those
        for which that class is unrelated to every label of the mixture.
      pan: greatest distance of a sound from the middle of two channels, see `panned`; 0 mixes in
        one channel.
    """

    sources: int
    group_size: int
    match_energy: bool
    gain_db: float = 0.0
    all_targets: bool = False
    silent_share: float = 0.0
    pan: float = 0.0


class Examples(NamedTuple):
    """Training examples of a batch.

    Attributes:
      anchor: clean segments, from which conditions are computed unless they were mined.
      mixture: inputs of the separator.
      target: its desired outputs; zeros where `silent`.
      silent: marks items queried with a class absent from the mixture; None if there are none.
    """

    anchor: Float[Array, "b s"]
    mixture: Float[Array, "b a s"]
    target: Float[Array, "b a s"]
    silent: Bool[Array, "b"] | None


def make_examples(
    anchors: Anchors, batch: dict[str, Array], mixing: Mixing, keys: dict[str, Array]
) -> Examples:
    """Mixes anchors into training examples: of two channels if `mixing.pan` is above 0, or of one.

    Args:
      anchors: anchors of the batch.
      batch: batch, with `absent` [b] if `mixing.silent_share` is above 0.
      mixing: mixing options.
      keys: random keys of the level offsets (`gain`), silent targets (`silent`) and places (`pan`).
    """
    anchor = anchors.segment
    level = energy(anchor, anchors.samples)
    if mixing.gain_db:
        # +-gain_db / 2 on each item gives up to +-gain_db between two. `level` is a power.
        offset = jax.random.uniform(keys["gain"], level.shape) - 0.5
        level = level * 10 ** (mixing.gain_db * offset / 10)
    sound = panned(anchor, mixing.pan, keys["pan"]) if mixing.pan else anchor[:, None]
    how = dict(sources=mixing.sources, match_energy=mixing.match_energy)
    if mixing.all_targets:
        mixture, target = mix_sets(sound, level, **how)
    else:
        mixture, target = mix(sound, level, group_size=mixing.group_size, **how), sound
    silent = None
    if mixing.silent_share:
        silent = jax.random.uniform(keys["silent"], level.shape) < mixing.silent_share
        silent &= batch["absent"] != 0
        target = jnp.where(silent[:, None, None], 0, target)
    return Examples(anchor, mixture, target, silent)


def asked_conditions(
    conditions: Float[Array, "b d"], silent: Bool[Array, "b"] | None, mixing: Mixing
) -> Float[Array, "b d"]:
    """Replaces the conditions of items with a silent target by those of absent sounds.

    Args:
      conditions: conditions of the items' own classes.
      silent: as in `Examples`.
      mixing: options the anchors were mixed with.
    """
    if silent is None:
        return conditions
    groups = conditions.reshape(-1, mixing.group_size, conditions.shape[1])
    absent = jnp.roll(groups, -mixing.sources, axis=1).reshape(conditions.shape)
    return jnp.where(silent[:, None], absent, conditions)
