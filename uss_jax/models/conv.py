"""Convolution layers whose gradients are fast on CPUs as well as on accelerators.

CPUs compute some of them in forms of their own, see cpu_conv.py.

Letters: `b` batch, `n` frames, `f` bins, `c` channels in, `d` channels out.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uss_jax.models import cpu_conv
from uss_jax.models.compute_dtype import in_compute_dtype
from uss_jax.models.reductions import sum_places
from uss_jax.models.vjp import custom_vjp


class Conv3x3(nn.Module):
    """3x3 convolution over time and frequency with "same" zero padding and no bias.

    The parameter is `kernel` [3, 3, c, d], as `flax.linen.Conv` would name it.
    """

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n f c"]) -> Float[Array, "b n f d"]:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        x, kernel = in_compute_dtype(self.dtype, x, kernel)
        return conv3x3(x, kernel)


class Upsample(nn.Module):
    """Transposed convolution with kernel size equal to its stride: one matrix product.

    The parameter is `kernel` [*stride, d, c], as `flax.linen.ConvTranspose` with
    `transpose_kernel=True` would name it.
    """

    features: int
    stride: tuple[int, int]
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n f c"]) -> Float[Array, "b N F d"]:
        (b, n, f, c), (h, w), d = x.shape, self.stride, self.features
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (h, w, d, c))
        x, kernel = in_compute_dtype(self.dtype, x, kernel)
        y = linear(x, kernel.reshape(h * w * d, c).T).reshape(b, n, f, h, w, d)
        return jnp.moveaxis(y, 3, 2).reshape(b, n * h, f * w, d)


class Conv1x1(nn.Module):
    """1x1 convolution; the parameters are `kernel` [1, 1, c, d] and `bias` [d]."""

    features: int
    dtype: str
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, *maps: Float[Array, "b n f _"], onto: Float[Array, "b n f d"] | None = None
    ) -> Float[Array, "b n f d"]:
        """Convolves the maps as if concatenated along the channels, without concatenating them.

        Args:
          *maps: feature maps.
          onto: map that the result is added to. The bias is added to it first, which saves a pass
            over the product.
        """
        widths = [x.shape[-1] for x in maps]
        shape = (1, 1, sum(widths), self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", self.bias_init, (self.features,))
        *maps, kernel, bias = in_compute_dtype(self.dtype, *maps, kernel, bias)
        product = linear(tuple(maps), kernel[0, 0])
        return add_bias(product, bias) if onto is None else add_bias(onto, bias) + product


@jax.custom_vjp
def add_bias(x: Float[Array, "b n f d"], bias: Float[Array, " d"]) -> Float[Array, "b n f d"]:
    """Returns x + bias; the gradient of the bias is summed in float32 whatever the dtype."""
    return x + bias


def _add_bias_backward(bias, dy):
    return dy, jnp.sum(sum_places(dy), axis=0).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, bias), _add_bias_backward)


@custom_vjp
def linear(
    x: Float[Array, "b n f c"] | tuple[Float[Array, "b n f _"], ...], matrix: Float[Array, "c d"]
) -> Float[Array, "b n f d"]:
    """Multiplies the channels of a map, or of several as if concatenated, by a matrix."""
    maps = x if isinstance(x, tuple) else (x,)
    return sum(map(jnp.matmul, maps, jnp.split(matrix, _borders(maps))))


def _borders(maps: tuple[Array, ...]) -> np.ndarray:
    """Returns the channel offsets at which the second and later maps begin."""
    return np.cumsum([x.shape[-1] for x in maps])[:-1]


def _linear_forward(x, matrix):
    return linear(x, matrix), (x, matrix)


def _linear_backward(residuals, dy):
    x, matrix = residuals
    maps = x if isinstance(x, tuple) else (x,)
    dmatrix = [_by_platform(cpu_conv.matrix_gradient, _matrix_gradient, part, dy) for part in maps]
    dx = tuple(jnp.split(jnp.matmul(dy, matrix.T), _borders(maps), axis=-1))
    return dx if isinstance(x, tuple) else dx[0], jnp.concatenate(dmatrix)


linear.defvjp(_linear_forward, _linear_backward)


def _matrix_gradient(x: Array, dy: Array) -> Array:
    return jnp.einsum("bnfc,bnfd->cd", x, dy)


@custom_vjp
def conv3x3(x: Float[Array, "b n f c"], kernel: Float[Array, "3 3 c d"]) -> Array:
    """Convolves to [b, n, f, d]. The custom VJP rules out forward-mode derivatives."""
    return _by_platform(cpu_conv.convolution_form(x, kernel), _convolve, x, kernel)


def _conv3x3_forward(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _conv3x3_backward(residuals, dy):
    x, kernel = residuals
    dx = conv3x3(dy, kernel[::-1, ::-1].swapaxes(2, 3))
    return dx, _by_platform(cpu_conv.filter_gradient_form(x, kernel), _filter_gradient, x, dy)


conv3x3.defvjp(_conv3x3_forward, _conv3x3_backward)


def _convolve(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _filter_gradient(x: Array, dy: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, dy, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("CHWN", "IHWO", "HWNC")
    )


def _by_platform(on_cpu: cpu_conv.Form | None, elsewhere: cpu_conv.Form, *arrays: Array) -> Array:
    """Applies one form on CPUs, if there is one, and the other elsewhere."""
    if on_cpu is None:
        return elsewhere(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)
