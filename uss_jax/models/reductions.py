"""Sums over the places of feature maps, in float32 and at full memory bandwidth.

Letters: `b` batch, `c` channels.
"""

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
    summed at the end.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    b, c, count, neighbours = x.shape[0], x.shape[-1], places(x), 1
    while neighbours * c < _LANES and count % (2 * neighbours) == 0:
        neighbours *= 2
    sums = jnp.sum(x.reshape(b, count // neighbours, neighbours * c), axis=1)
    return jnp.sum(sums.reshape(b, neighbours, c), axis=1)
