"""From the U-Net's last feature maps to a complex mask: the linear head, and the mask itself.

Letters: `b` batch, `a` audio channels, `n` frames, `f` bins, `c` channels in, `d` maps out.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from uss_jax.models.conv import linear

# Bound on the derivative of a direction by either of its two input maps.
_STEEPEST = 1e4


class Head(nn.Module):
    """Maps the U-Net's channels linearly to the maps that the masks are computed from.

    It computes in its input's dtype, float32 in every net: in bfloat16, product and bias would
    sometimes cancel exactly and leave the phase undefined. The result is laid out as one plane per
    map, like the spectrum, and channels-last only in shape. Masks then need no transposition, and
    the gradient of a bias is the sum over a plane.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n f c"]) -> Float[Array, "b n f d"]:
        init = nn.initializers.variance_scaling(0.01, "fan_avg", "uniform")
        kernel = self.param("kernel", init, (1, 1, x.shape[-1], self.features))
        bias = self.param("bias", _phase_of_the_mixture, (self.features,))
        planes = jax.lax.platform_dependent(
            x,
            kernel[0, 0].astype(x.dtype),
            cpu=lambda x, matrix: jnp.moveaxis(linear(x, matrix), -1, 1),  # three times as fast
            default=lambda x, matrix: jnp.einsum("bnfc,cd->bdnf", x, matrix),
        )
        planes = planes + bias.astype(x.dtype)[:, None, None]
        return jnp.moveaxis(planes, 1, -1)


def _phase_of_the_mixture(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Initialises each channel's biases (magnitude, cosine, sine): it starts at half the mixture.

    With the reference's random initial phases the easiest descent is towards silence, and at a high
    learning rate training stays there.
    """
    del key
    return jnp.tile(jnp.array([0.0, 1.0, 0.0], dtype), shape[0] // 3)


def complex_mask(x: Float[Array, "b n f c"], audio_channels: int) -> Complex[Array, "b a n F"]:
    """Computes the complex mask from the head's maps, ordered (audio channel, kind).

    A zero Nyquist bin is appended. The reference scales the magnitude of the mixture and rotates
    its phase; multiplying the spectrum by one complex number is equivalent.
    """
    planes = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], audio_channels, 3, *x.shape[1:3])
    magnitude = nn.sigmoid(planes[:, :, 0])
    real, imag = direction_of(jnp.tanh(planes[:, :, 1]), jnp.tanh(planes[:, :, 2]))
    mask = jax.lax.complex(magnitude * real, magnitude * imag)
    return jnp.pad(mask, [(0, 0)] * 3 + [(0, 1)])


@jax.custom_jvp
def direction_of(
    real: Float[Array, "*any"], imag: Float[Array, "*any"]
) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """Returns (real, imag) / max(|(real, imag)|, 1e-10), the direction as in the reference.

    The true derivative, the tangent's part across the direction divided by the length, is unbounded
    near 0. Here it is at most 1e4: exact for lengths of at least 1e-4, and for shorter ones as
    steep as at 1e-4. Otherwise one bin of exactly 0 would ruin a run: its gradient is 1e10 times
    too large, and amsgrad's maximum of second moments never forgets it.
    """
    scale = jax.lax.rsqrt(jnp.maximum(real**2 + imag**2, 1e-20))
    return real * scale, imag * scale


@direction_of.defjvp
def _direction_jvp(primals, tangents):
    real, imag = primals
    direction = cos, sin = direction_of(real, imag)
    steepness = jax.lax.rsqrt(jnp.maximum(real**2 + imag**2, _STEEPEST**-2))
    d_real, d_imag = (steepness * tangent for tangent in tangents)
    along = cos * d_real + sin * d_imag
    return direction, (d_real - cos * along, d_imag - sin * along)
