"""Feature-wise linear modulation: what a condition adds to a batch norm's output.

The reference adds a bias only (paper, section III-D); the scale of the original FiLM is an option.
Letters: `b` batch, `d` width of the condition, `c` channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from uss_jax.models.norm import BatchNorm

LEAK = 0.01


class FiLM(nn.Module):
    """A linear map from a condition to a shift per channel and, if asked, a gain."""

    features: int
    with_gain: bool = False

    @nn.compact
    def __call__(
        self, condition: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b c"], Float[Array, "b c"] | None]:
        """Returns (shift, gain); the gain is None without `with_gain`, float32 both."""
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
    """leaky_relu(FiLM(batch_norm(x))), the step before every convolution of a ResUNet.

    Args:
      module: the calling module, under which the parameters are made.
      maps: feature maps whose channels follow each other; the result is one map, c channels wide.
      condition: [b or 1, d].
      train: whether the batch norm uses and updates batch statistics.
      norm: name of the batch norm.
      film: name of the FiLM.
      with_gain: whether FiLM scales too.
      scope: of the batch norm.
    """
    channels = sum(x.shape[-1] for x in maps)
    shift, gain = FiLM(channels, with_gain, parent=module, name=film)(condition)
    norm = BatchNorm(scope, parent=module, name=norm)
    return jnp.concatenate(norm(maps, train, shift, gain, LEAK), axis=-1)
