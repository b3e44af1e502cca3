"""Convolution layers whose gradients are fast on CPUs as well as on accelerators.

Letters: `b` batch, `n` frames, `f` bins, `c` channels in, `d` channels out.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uss_jax.models.reductions import sum_places
from uss_jax.models.vjp import custom_vjp

# With fewer channels than this, XLA's own filter gradient is as fast on a CPU.
_NARROW = 32
# Positions of a feature map per matrix product, chosen to fit in cache. For wide maps the matrix
# itself does not fit, so each read of it is amortised over more positions.
_PLACES, _PLACES_OF_WIDE, _WIDE = 1024, 4096, 256
# Wide maps of at most this many positions are convolved faster on a CPU as one matrix product.
_SMALL = 256

# Minimal filtering F(4, 3): four outputs of a three-tap filter from 6 products instead of 12
# (Winograd, Arithmetic complexity of computations, 1980; points 0, 1, -1, 2, -2, infinity). With
# fewer channels than this, the extra additions cost as much as the saved products.
_TILED = 64
_TILE, _POINTS = 4, 6
_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_FILTER = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUT = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


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


def in_compute_dtype(dtype: str, *arrays: Array) -> tuple[Array, ...]:
    """Casts arrays to the dtype that a layer computes in.

    "float32" means at least float32: with float64 arrays the layer computes in float64.
    """
    if dtype == "float32":
        dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(a.astype(dtype) for a in arrays)


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
    dmatrix = [
        jax.lax.platform_dependent(part, dy, cpu=_matrix_gradient_by_rows, default=_matrix_gradient)
        for part in maps
    ]
    dx = tuple(jnp.split(jnp.matmul(dy, matrix.T), _borders(maps), axis=-1))
    return dx if isinstance(x, tuple) else dx[0], jnp.concatenate(dmatrix)


linear.defvjp(_linear_forward, _linear_backward)


def _matrix_gradient(x: Array, dy: Array) -> Array:
    return jnp.einsum("bnfc,bnfd->cd", x, dy)


def _matrix_gradient_by_rows(x: Array, dy: Array) -> Array:
    """Computes the matrix gradient a few rows at a time.

    For all rows at once, XLA's CPU backend would first transpose whole maps to channels-first.
    """
    (b, n, f, c), d = x.shape, dy.shape[-1]
    rows, steps = _rows(n, f, c, d)
    pad = ((0, 0), (0, steps * rows - n), (0, 0), (0, 0))
    x, dy = jnp.pad(x, pad), jnp.pad(dy, pad)
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def add_rows(i, total):
        x_rows, dy_rows = (
            jax.lax.dynamic_slice_in_dim(a, i * rows, rows, axis=1).reshape(b, rows * f, -1)
            for a in (x, dy)
        )
        return total + jnp.einsum("bpc,bpd->bcd", x_rows, dy_rows, preferred_element_type=dtype)

    total = jax.lax.fori_loop(0, steps, add_rows, jnp.zeros((b, c, d), dtype))
    return jnp.sum(total, axis=0).astype(x.dtype)


@custom_vjp
def conv3x3(x: Float[Array, "b n f c"], kernel: Float[Array, "3 3 c d"]) -> Array:
    """Convolves to [b, n, f, d]. The custom VJP rules out forward-mode derivatives."""
    _, n, f, c = x.shape
    on_cpu = _convolve_by_xla
    if n * f <= _SMALL and c >= _WIDE:
        on_cpu = _convolve_by_product
    elif _worth_tiles(x, kernel):
        on_cpu = _convolve_by_tiles
    if on_cpu is _convolve_by_xla:
        return _convolve_by_xla(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=_convolve_by_xla)


def _worth_tiles(x: Array, kernel: Array) -> bool:
    """Tells whether minimal filtering pays.

    Not with few channels, nor in bfloat16, where factors of 8 and 1/24 cost too much precision.
    """
    return min(kernel.shape[2:]) >= _TILED and x.dtype != jnp.bfloat16


def _convolve_by_xla(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve_by_product(x: Array, kernel: Array) -> Array:
    """Convolves as one matrix product.

    Up to 1.7 times faster than XLA's own, which re-reads the kernel every few positions.
    """
    n, f = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [x[:, p : p + n, q : q + f] for p in range(3) for q in range(3)]
    return jnp.matmul(jnp.concatenate(taps, axis=-1), kernel.reshape(-1, kernel.shape[3]))


def _convolve_by_tiles(x: Array, kernel: Array) -> Array:
    """Convolves by minimal filtering over frames, a few rows at a time.

    Up to twice as fast as XLA's own. The batch stays a separate axis, so that each device computes
    only its own rows of a sharded batch.
    """
    (b, n, f, c), d = x.shape, kernel.shape[3]
    tiles, steps = _rows(n, f, c, d, _TILE)
    filters = jnp.einsum("ip,pqcd->iqcd", _FILTER.astype(x.dtype), kernel)
    x = jnp.pad(x, ((0, 0), (1, 1 + steps * tiles * _TILE - n), (0, 0), (0, 0)))
    x = jax.lax.optimization_barrier(x)  # else its producers are recomputed for each point

    def fill_rows(i, y):
        inputs = _tile_inputs(x, i, tiles)
        products = [_convolve_by_xla(*pair) for pair in zip(inputs, filters[:, None], strict=True)]
        for row, weights in enumerate(_OUTPUT):
            outputs = _weighted_sum(weights, products)[:, :, None]
            y = jax.lax.dynamic_update_slice(y, outputs, (0, i * tiles, row, 0, 0))
        return y

    y = jnp.zeros((b, steps * tiles, _TILE, f, d), x.dtype)
    y = jax.lax.fori_loop(0, steps, fill_rows, y)
    return y.reshape(b, steps * tiles * _TILE, f, d)[:, :n]


def _rows(n: int, f: int, c: int, d: int, tile: int = 1) -> tuple[int, int]:
    """Returns rows (or tiles of `tile` rows) per step, with little padding, and number of steps."""
    places = _PLACES if min(c, d) < _WIDE else _PLACES_OF_WIDE
    count = -(-n // tile)
    most = min(count, max(1, places // (tile * f)))
    rows = min(range(most, most // 2, -1), key=lambda rows: -count % rows)
    return rows, -(-count // rows)


def _tile_inputs(x: Array, i: Array, tiles: int) -> list[Array]:
    """Returns each point's input for the i-th run of `tiles` tiles; row 0 of `x` is padding."""
    rows = jax.lax.dynamic_slice_in_dim(x, i * tiles * _TILE, tiles * _TILE + 2, axis=1)
    rows = [rows[:, p : p + (tiles - 1) * _TILE + 1 : _TILE] for p in range(_POINTS)]
    return [_weighted_sum(weights, rows) for weights in _INPUT]


def _weighted_sum(weights: np.ndarray, arrays: Sequence[Array]) -> Array:
    return sum(float(w) * a for w, a in zip(weights, arrays, strict=True) if w)


def _forward(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _backward(residuals, dy):
    x, kernel = residuals
    dx = conv3x3(dy, kernel[::-1, ::-1].swapaxes(2, 3))
    if min(kernel.shape[2:]) < _NARROW:
        return dx, _filter_gradient_by_xla(x, dy)
    on_cpu = _filter_gradient_by_products
    if _worth_tiles(x, kernel):
        on_cpu = _filter_gradient_by_tiles
    return dx, jax.lax.platform_dependent(x, dy, cpu=on_cpu, default=_filter_gradient_by_xla)


conv3x3.defvjp(_forward, _backward)


def _filter_gradient_by_xla(x: Array, dy: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, dy, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("CHWN", "IHWO", "HWNC")
    )


def _filter_gradient_by_products(x: Array, dy: Array) -> Array:
    """Computes the filter gradient by matrix products over a few rows, summed per item.

    XLA's CPU backend computes it as a convolution with a window as large as the map, 3 to 8 times
    slower. The batch stays a separate axis until the end, so that a sharded batch is all-reduced
    once.
    """
    (b, n, f, c), d = x.shape, dy.shape[-1]
    rows, steps = _rows(n, f, c, d)
    spare = steps * rows - n
    x = jnp.pad(x, ((0, 0), (1, 1 + spare), (0, 0), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (0, spare), (1, 1), (0, 0)))

    def add_rows(i, total):
        x_rows = jax.lax.dynamic_slice_in_dim(x, i * rows, rows + 2, axis=1)
        dy_rows = jax.lax.dynamic_slice_in_dim(dy, i * rows, rows, axis=1)
        shifted = jnp.concatenate([dy_rows[:, :, 2 - q : 2 - q + f] for q in range(3)], axis=-1)
        shifted = shifted.reshape(b, rows * f, 3 * d)
        taps = [
            jnp.einsum(
                "bpc,bpd->bcd",
                x_rows[:, p : p + rows].reshape(b, rows * f, c),
                shifted,
                preferred_element_type=total.dtype,
            )
            for p in range(3)
        ]
        return total + jnp.stack(taps, axis=1)

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.zeros((b, 3, c, 3 * d), dtype)
    total = jnp.sum(jax.lax.fori_loop(0, steps, add_rows, total), axis=0)
    return total.reshape(3, c, 3, d).swapaxes(1, 2).astype(x.dtype)


def _filter_gradient_by_tiles(x: Array, dy: Array) -> Array:
    """Like `_filter_gradient_by_products`, by minimal filtering: half the products."""
    (b, n, f, c), d = x.shape, dy.shape[-1]
    tiles, steps = _rows(n, f, c, d, _TILE)
    spare = steps * tiles * _TILE - n
    x = jnp.pad(x, ((0, 0), (1, 1 + spare), (0, 0), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (0, spare), (1, 1), (0, 0)))
    dy = dy.reshape(b, steps * tiles, _TILE, f + 2, d)

    def add_rows(i, total):
        dy_rows = jax.lax.dynamic_slice_in_dim(dy, i * tiles, tiles, axis=1)
        dy_rows = [dy_rows[:, :, row] for row in range(_TILE)]
        points = []
        for inputs, weights in zip(_tile_inputs(x, i, tiles), _OUTPUT.T, strict=True):
            outputs = _weighted_sum(weights, dy_rows)
            shifted = jnp.concatenate([outputs[:, :, 2 - q : 2 - q + f] for q in range(3)], axis=-1)
            inputs, shifted = inputs.reshape(b, tiles * f, c), shifted.reshape(b, tiles * f, 3 * d)
            points.append(jnp.einsum("bpc,bpd->bcd", inputs, shifted))
        return [t + p for t, p in zip(total, points, strict=True)]

    total = [jnp.zeros((b, c, 3 * d), x.dtype)] * _POINTS
    total = jax.lax.fori_loop(0, steps, add_rows, total)
    total = jnp.stack(total, axis=1).reshape(b, _POINTS, c, 3, d)
    # One matrix product sums over items and points; XLA's own sum over items is slow.
    weights = jnp.broadcast_to(_FILTER.astype(x.dtype), (b, *_FILTER.shape))
    return jnp.einsum("bip,bicqd->pqcd", weights, total)
