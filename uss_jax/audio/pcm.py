"""Conversion of 16-bit samples on the device."""

import jax.numpy as jnp
from jaxtyping import Array


def to_float(audio: Array) -> Array:
    """Scales int16 samples to float32 in [-1, 1); returns floats unchanged."""
    return audio / jnp.float32(32768) if audio.dtype == jnp.int16 else audio
