"""The protocol of separators: what the rest of the program asks of one, whatever it is made of.

Letters: `b` batch, `a` audio channels, `c` any number of channels, `t` samples, `d` width of the
condition.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float


@runtime_checkable
class SeparatorNet(Protocol):
    """A Flax module that estimates, from a mixture, the sound that a condition describes.

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
        """A window that starts on a multiple of it is separated as in one pass over everything.

        The net takes a mixture of this length.
        """
        ...

    @property
    def window_samples(self) -> int:
        """Length of the windows that long recordings are cut into, before rounding to the grid."""
        ...

    @property
    def context_samples(self) -> int:
        """Overlap at either side of a window, separated but not kept, before rounding likewise."""
        ...

    def for_training(self, norm_scope: str | int, remat: bool) -> "SeparatorNet":
        """Returns the net as a training step runs it.

        Args:
          norm_scope: items over which batch statistics are taken, see models/norm.py; a net
            without batch norms ignores it.
          remat: compute activations again in the backward pass instead of storing them.
        """
        ...

    def __call__(
        self, mixture: Float[Array, "b a t"], condition: Float[Array, "#b d"], train: bool = False
    ) -> Float[Array, "b a t"]:
        """Separates; in training, `batch_stats` is mutable."""
        ...

    def separate_with_shared_mask(
        self, mixture: Float[Array, "b c t"], condition: Float[Array, "#b d"]
    ) -> Float[Array, "b c t"]:
        """Separates any number of channels with a net of one, so that each source keeps its place.

        A single channel is separated as `__call__` does.
        """
        ...


def separate(
    net: SeparatorNet,
    variables: Any,
    mixture: Float[Array, "b t"],
    condition: Float[Array, "#b d"],
    train: bool = False,
) -> tuple[Float[Array, "b t"], Any]:
    """Separates one-channel mixtures.

    Returns:
      The estimates, and the net's batch statistics: updated in training, else as given.
    """
    mixture = mixture[:, None]
    if train:
        found = net.apply(variables, mixture, condition, train=True, mutable=["batch_stats"])
    else:
        found = net.apply(variables, mixture, condition), variables
    estimate, updated = found
    return estimate[:, 0], updated.get("batch_stats", {})
