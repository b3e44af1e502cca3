"""The separator protocol: what the rest of the program requires of a separation net.

Letters: `b` batch, `a` audio channels, `c` any number of channels, `t` samples, `d` width of the
condition.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class SeparatorNet(Protocol):
    """A Flax module that extracts the sound described by a condition from a mixture.

    Attributes:
      audio_channels: channels of mixture and estimate.
      condition_width: d.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
    """

    audio_channels: int
    condition_width: int
    dtype: str

    @property
    def grid_samples(self) -> int:
        """Grid of window starts, in samples; a mixture of this length is valid input.

        A window that starts on a multiple is separated as in one pass over the whole recording, as
        far as its context covers what the net reaches.
        """
        ...

    @property
    def window_samples(self) -> int:
        """Window length for long recordings, in samples, before rounding to the grid."""
        ...

    @property
    def context_samples(self) -> int:
        """Samples on either side of a window, separated but discarded, before rounding."""
        ...

    def for_training(self, norm_scope: str | int, remat: bool) -> "SeparatorNet":
        """Returns the net configured for the training step.

        Args:
          norm_scope: items that share batch statistics, see models/norm.py; a net without batch
            norms ignores it.
          remat: recompute activations in the backward pass instead of storing them.
        """
        ...

    def __call__(
        self, mixture: Float[Array, "b a t"], condition: Float[Array, "#b d"], train: bool = False
    ) -> Float[Array, "b a t"]:
        """Returns the estimate; in training, `batch_stats` must be mutable."""
        ...

    def separate_with_shared_mask(
        self, mixture: Float[Array, "b c t"], condition: Float[Array, "#b d"]
    ) -> Float[Array, "b c t"]:
        """Separates any number of channels with a one-channel net, keeping the spatial image.

        A single channel gives the result of `__call__`.
        """
        ...


def require_fitting(net: SeparatorNet, channels: int, width: int) -> None:
    """Raises a ValueError unless a net takes so many audio channels and such wide conditions."""
    if channels != net.audio_channels:
        raise ValueError(
            f"the separator takes {net.audio_channels} audio channels, the mixture has {channels}"
        )
    if width != net.condition_width:
        raise ValueError(
            f"the separator takes a condition of width {net.condition_width}, this one has {width}"
        )


def train_separate(
    net: SeparatorNet,
    variables: Any,
    mixture: Float[Array, "b a t"],
    condition: Float[Array, "#b d"],
) -> tuple[Float[Array, "b a t"], Any]:
    """Separates in training mode; returns the estimates and the updated batch statistics."""
    estimate, updated = net.apply(
        variables, mixture, condition, train=True, mutable=["batch_stats"]
    )
    return estimate, updated.get("batch_stats", {})


def separate(
    net: SeparatorNet,
    variables: Any,
    mixture: Float[Array, "b t"],
    condition: Float[Array, "#b d"],
) -> Float[Array, "b t"]:
    """Separates one-channel mixtures.

    A net of several channels gets the mixture in each of them; its estimates are averaged.
    """
    alike = jnp.repeat(mixture[:, None], net.audio_channels, axis=1)
    return jnp.mean(net.apply(variables, alike, condition), axis=1)
