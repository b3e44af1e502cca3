"""Training examples of a batch: what the separator hears, must give back, and is asked for.

Letters: `b` batch, `s` samples of an anchor, `d` width of the condition.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from uss_jax.anchors.detect import Anchors
from uss_jax.anchors.mix import energy, mix, mix_sets


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How anchors become mixtures: the `mixing` section of a config.

    Attributes:
      sources: anchors in a mixture.
      group_size: items that are mixed with each other, see `mix`.
      match_energy: scale added sounds to the target's energy, see `mix`.
      gain_db: after matching, offset the level of an added sound by a random amount within +-this.
      all_targets: every `sources` items share one mixture, see `mix_sets`.
      silent_share: probability that an item is queried with a class absent from its mixture; its
        target is then silence. The condition is that of the item `sources` further in the group,
        the nearest outside the mixture. Only items are drawn whose `batch["absent"]` says that this
        class is unrelated to every label of the mixture.
    """

    sources: int
    group_size: int
    match_energy: bool
    gain_db: float = 0.0
    all_targets: bool = False
    silent_share: float = 0.0


class Examples(NamedTuple):
    """What a batch trains on.

    Attributes:
      anchor: clean sounds, of which conditions are made.
      mixture: what the separator hears.
      target: what it must give back; zeros where `silent`.
      silent: which items are queried with a class absent from the mixture; None where none is.
    """

    anchor: Float[Array, "b s"]
    mixture: Float[Array, "b s"]
    target: Float[Array, "b s"]
    silent: Bool[Array, "b"] | None


def make_examples(
    anchors: Anchors, batch: dict[str, Array], mixing: Mixing, gain_key: Array, silent_key: Array
) -> Examples:
    """Mixes anchors.

    Args:
      anchors: of the batch.
      batch: with `absent` [b] where `mixing.silent_share` is above 0.
      mixing: how.
      gain_key, silent_key: draw the level offsets, and the items with a silent target.
    """
    anchor = anchors.segment
    level = energy(anchor, anchors.samples)
    if mixing.gain_db:
        # The offset between two sounds is that of their levels: half of it for each, in power.
        offset = jax.random.uniform(gain_key, level.shape) - 0.5
        level = level * 10 ** (mixing.gain_db * offset / 10)
    how = dict(sources=mixing.sources, match_energy=mixing.match_energy)
    if mixing.all_targets:
        mixture, target = mix_sets(anchor, level, **how)
    else:
        mixture, target = mix(anchor, level, group_size=mixing.group_size, **how), anchor
    silent = None
    if mixing.silent_share:
        silent = jax.random.uniform(silent_key, level.shape) < mixing.silent_share
        silent &= batch["absent"] != 0
        target = jnp.where(silent[:, None], 0, target)
    return Examples(anchor, mixture, target, silent)


def asked_conditions(
    conditions: Float[Array, "b d"], silent: Bool[Array, "b"] | None, mixing: Mixing
) -> Float[Array, "b d"]:
    """Replaces the conditions of items with a silent target by those of absent sounds.

    Args:
      conditions: of each item's own anchor.
      silent: as in `Examples`.
      mixing: how the anchors were mixed.
    """
    if silent is None:
        return conditions
    groups = conditions.reshape(-1, mixing.group_size, conditions.shape[1])
    absent = jnp.roll(groups, -mixing.sources, axis=1).reshape(conditions.shape)
    return jnp.where(silent[:, None], absent, conditions)
