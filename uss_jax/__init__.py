"""Universal source separation in JAX/Flax: one network, 527 sound classes, weak labels."""

__version__ = "0.1.0"
