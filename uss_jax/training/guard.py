"""Guard against gradients that are finite but absurdly large.

AMSGrad keeps the maximum of the second moments forever: one gradient a thousand times too large
makes every later step a thousand times too small. So each gradient norm is compared with those of
earlier updates.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Number of norms in the running median, and the minimum before any gradient is judged.
WINDOW, ENOUGH = 128, 8

Norms = dict[str, Array]


def no_norms() -> Norms:
    """Returns the record before the first update.

    `window` [128] float32 is a ring buffer of the norms of the last updates, NaN where empty;
    `spikes`, int32, counts the updates skipped because of their norm.
    """
    return {"window": jnp.full(WINDOW, jnp.nan, jnp.float32), "spikes": jnp.zeros((), jnp.int32)}


def median_norm(norms: Norms) -> Float[Array, ""]:
    """Returns the median of the recorded norms; NaN while there are fewer than 8."""
    window = norms["window"]
    known = jnp.sum(jnp.isfinite(window))
    return jnp.where(known < ENOUGH, jnp.nan, jnp.nanmedian(window))


def is_spike(
    norm: Float[Array, ""], median: Float[Array, ""], max_norm_ratio: float
) -> Bool[Array, ""]:
    """Returns whether a norm exceeds `max_norm_ratio` times the median; 0 for no limit.

    False for NaN and infinity, which are counted separately, and while the median is NaN or 0.
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
    """Adds the norm of a step to the record.

    Args:
      norms: record so far.
      norm: gradient norm of the step.
      updates: number of updates before the step; gives the place in the ring buffer.
      good: whether the update is applied; otherwise its norm is not recorded.
      spike: whether the update is skipped because of its norm.
    """
    place = updates % WINDOW
    window = norms["window"]
    value = jnp.where(good, norm.astype(window.dtype), window[place])
    return {
        "window": jax.lax.dynamic_update_index_in_dim(window, value, place, 0),
        "spikes": norms["spikes"] + spike.astype(jnp.int32),
    }
