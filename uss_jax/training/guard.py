"""The guard against gradients that are finite but absurd.

amsgrad keeps the maximum of second moments for ever: after one gradient a thousand times too long,
every later step is a thousand times too short. A gradient is judged by the norms of the updates
before it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Norms that the median is taken of, and how many there must be before anything is judged.
WINDOW, ENOUGH = 128, 8

Norms = dict[str, Array]


def no_norms() -> Norms:
    """Returns the record before the first update.

    `window` [128] float32 holds the norms of the last updates, NaN where there were none, in the
    order of a ring; `spikes`, int32, counts the updates left out because of their norm.
    """
    return {"window": jnp.full(WINDOW, jnp.nan, jnp.float32), "spikes": jnp.zeros((), jnp.int32)}


def median_norm(norms: Norms) -> Float[Array, ""]:
    """Median of the norms recorded; NaN while there are fewer than 8."""
    window = norms["window"]
    known = jnp.sum(jnp.isfinite(window))
    return jnp.where(known < ENOUGH, jnp.nan, jnp.nanmedian(window))


def is_spike(
    norm: Float[Array, ""], median: Float[Array, ""], max_norm_ratio: float
) -> Bool[Array, ""]:
    """Tells whether a norm is more than `max_norm_ratio` times the median; 0 for no limit.

    Never so of NaN or infinity, which are counted apart, nor while the median is unknown or 0.
    """
    if not max_norm_ratio:
        return jnp.zeros((), bool)
    return jnp.isfinite(norm) & (median > 0) & (norm > max_norm_ratio * median)


def record(
    norms: Norms,
    norm: Float[Array, ""],
    updates: Int[Array, ""],
    good: Bool[Array, ""],
    spike: Bool[Array, ""],
) -> Norms:
    """Adds the norm of a step.

    Args:
      norms: the record so far.
      norm: of the step.
      updates: number of updates before it, which is its place in the ring.
      good: whether its update is done; other norms are not recorded.
      spike: whether its update is left out because of its norm.
    """
    place = updates % WINDOW
    window = norms["window"]
    value = jnp.where(good, norm.astype(window.dtype), window[place])
    return {
        "window": jax.lax.dynamic_update_index_in_dim(window, value, place, 0),
        "spikes": norms["spikes"] + spike.astype(jnp.int32),
    }
