"""Feature-wise linear modulation: what a condition adds to a batch norm's output.

The reference adds a bias only (paper, section III-D); the scale of the original FiLM is an option.
Letters: `b` batch, `d` width of the condition, `c` channels.
"""

import flax.linen as nn
import jax
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
    x: Float[Array, "b n f c"],
    condition: Float[Array, "#b d"],
    train: bool,
    *,
    norm: str,
    film: str,
    with_gain: bool,
    scope: str | int = "global",
) -> Float[Array, "b n f c"]:
    """leaky_relu(FiLM(batch_norm(x))), the step before every convolution of the ResUNet.

    Args:
      module: the calling module, under which the parameters are made.
      x: feature map.
      condition: [b or 1, d].
      train: whether the batch norm uses and updates batch statistics.
      norm: name of the batch norm.
      film: name of the FiLM.
      with_gain: whether FiLM scales too.
      scope: of the batch norm.
    """
    shift, gain = FiLM(x.shape[-1], with_gain, parent=module, name=film)(condition)
    x = BatchNorm(scope, parent=module, name=norm)(x, train, shift=shift, gain=gain)
    return _leaky_relu(x)


@jax.custom_vjp
def _leaky_relu(x: Array) -> Array:
    """As `nn.leaky_relu`, but keeps for its gradient what the convolution behind it keeps too."""
    return nn.leaky_relu(x, LEAK)


def _forward(x):
    y = _leaky_relu(x)
    return y, y


def _backward(y, dy):
    return (jnp.where(y >= 0, dy, LEAK * dy),)


_leaky_relu.defvjp(_forward, _backward)
