"""Sums over the positions of feature maps, in float32 and at full memory bandwidth.

Letters: `b` batch, `c` channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Width of the last axis at which an accelerator reduces at full bandwidth; a width of 32 reaches
# half of it, a width of 3 a thirtieth.
_LANES = 128


def places(x: Float[Array, "b *space c"]) -> int:
    """Returns the positions per item: the product of all axes between the first and the last."""
    return x.size // (x.shape[0] * x.shape[-1])


def sum_places(x: Float[Array, "b *space c"]) -> Float[Array, "b c"]:
    """Sums over all axes but the first and the last, in float32 or better.

    With few channels, neighbouring positions are first treated as further channels and summed at
    the end. Each row of positions is summed by itself, then the rows: a running sum over all
    positions, as XLA computes it on a CPU, would lose two more digits.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if x.ndim == 2:
        return x
    (b, *_, width, c), neighbours = x.shape, 1
    while neighbours * c < _LANES and width % (2 * neighbours) == 0:
        neighbours *= 2
    rows = jnp.sum(x.reshape(b, -1, width // neighbours, neighbours * c), axis=2)
    rows = jax.lax.optimization_barrier(rows)  # else XLA merges the two sums
    return jnp.sum(jnp.sum(rows, axis=1).reshape(b, neighbours, c), axis=1)
