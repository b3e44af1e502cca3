"""Sums over the places of feature maps, in float32 and at full memory bandwidth.

Letters: `b` batch, `c` channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Width of the last axis at which an accelerator reduces at full bandwidth: at 32 it reaches half
# of it, at 3 a thirtieth.
_LANES = 128


def places(x: Float[Array, "b *space c"]) -> int:
    """Returns the number of places of an item: all axes between the first and the last."""
    return x.size // (x.shape[0] * x.shape[-1])


def sum_places(x: Float[Array, "b *space c"]) -> Float[Array, "b c"]:
    """Sums over all axes but the first and the last, in float32 or better.

    Where there are few channels, neighbouring places are taken for further channels first and
    summed at the end. Each row of places is summed by itself, then the rows: a running sum over all
    places at once, as XLA makes it on a CPU, would lose two digits more.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if x.ndim == 2:
        return x
    (b, *_, width, c), neighbours = x.shape, 1
    while neighbours * c < _LANES and width % (2 * neighbours) == 0:
        neighbours *= 2
    rows = jnp.sum(x.reshape(b, -1, width // neighbours, neighbours * c), axis=2)
    rows = jax.lax.optimization_barrier(rows)  # else XLA makes one sum of the two
    return jnp.sum(jnp.sum(rows, axis=1).reshape(b, neighbours, c), axis=1)
