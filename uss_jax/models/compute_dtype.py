"""The dtype that layers compute in, "float32" or "bfloat16" by a field of each net.

"float32" means at least float32: with float64 arrays a layer computes in float64.
"""

import jax.numpy as jnp
from jaxtyping import Array


def in_compute_dtype(dtype: str, *arrays: Array) -> tuple[Array, ...]:
    """Casts arrays to the dtype that a layer computes in."""
    if dtype == "float32":
        dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(a.astype(dtype) for a in arrays)


def flax_dtype(dtype: str) -> str | None:
    """Returns the `dtype` for Flax layers: None for "float32", so that float64 stays float64."""
    return None if dtype == "float32" else dtype
