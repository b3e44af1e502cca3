"""Feature-wise linear modulation (FiLM): conditions the output of a batch norm.

The reference adds a shift only (paper, section III-D); the gain of the original FiLM is an option.
Letters: `b` batch, `d` width of the condition, `c` channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uss_jax.models.norm import BatchNorm

LEAK = 0.01


def scaled_to(condition: Float[Array, "b d"], norm: float) -> Float[Array, "b d"]:
    """Scales conditions to a Euclidean norm, so that only their direction matters.

    A condition whose norm is below 0.01 stays shorter, and 0 stays 0. The gradient is at most 100
    times `norm`.
    """
    squares = jnp.sum(jnp.square(condition), axis=-1, keepdims=True)
    return condition * (norm * jax.lax.rsqrt(squares + 1e-4))


class FiLM(nn.Module):
    """Maps a condition linearly to a shift and, optionally, a gain per channel."""

    features: int
    with_gain: bool = False

    @nn.compact
    def __call__(
        self, condition: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b c"], Float[Array, "b c"] | None]:
        """Returns (shift, gain), both float32; the gain is None unless `with_gain`."""
        init = nn.initializers.xavier_uniform()
        shift = nn.Dense(self.features, kernel_init=init, name="shift")(condition)
        if not self.with_gain:
            return shift, None
        gain = nn.Dense(self.features, kernel_init=nn.initializers.zeros_init(), name="gain")
        return shift, gain(condition)


def modulated_activation(
    module: nn.Module,
    maps: tuple[Float[Array, "b n f _"], ...],
    condition: Float[Array, "#b d"],
    train: bool,
    *,
    norm: str,
    film: str,
    with_gain: bool,
    scope: str | int = "global",
) -> Float[Array, "b n f c"]:
    """Returns leaky_relu(FiLM(batch_norm(x))), applied before every convolution of a ResUNet.

    Args:
      module: the calling module, which owns the parameters.
      maps: feature maps, normalised as if concatenated; the result is their concatenation, c
        channels wide.
      condition: [b or 1, d].
      train: whether the batch norm uses and updates batch statistics.
      norm: name of the batch norm.
      film: name of the FiLM.
      with_gain: whether FiLM also scales.
      scope: items that share batch statistics, see `BatchNorm.over`.
    """
    channels = sum(x.shape[-1] for x in maps)
    shift, gain = FiLM(channels, with_gain, parent=module, name=film)(condition)
    norm = BatchNorm(scope, parent=module, name=norm)
    return jnp.concatenate(norm(maps, train, shift, gain, LEAK), axis=-1)
