"""CPU forms of the convolutions and gradients in conv.py, faster there than XLA's own.

`convolution_form` and `filter_gradient_form` choose a form by the shapes; `matrix_gradient` is the
only form of its kind. All keep the batch a separate axis, so that each device computes only its own
rows of a sharded batch, and a gradient is all-reduced once.

Letters: `b` batch, `n` frames, `f` bins, `c` channels in, `d` channels out.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# With fewer channels than this, XLA's own filter gradient is as fast.
_NARROW = 32
# Positions of a feature map per matrix product, chosen to fit in cache. For wide maps the matrix
# itself does not fit, so each read of it is amortised over more positions.
_PLACES, _PLACES_OF_WIDE, _WIDE = 1024, 4096, 256
# Wide maps of at most this many positions are convolved faster as one matrix product.
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

# Maps two arrays to one.
Form = Callable[[Array, Array], Array]


def convolution_form(x: Float[Array, "b n f c"], kernel: Float[Array, "3 3 c d"]) -> Form | None:
    """Returns the fastest 3x3 convolution of (x, kernel); None: XLA's own."""
    _, n, f, c = x.shape
    if n * f <= _SMALL and c >= _WIDE:
        return _convolve_by_product
    return _convolve_by_tiles if _worth_tiles(x, kernel) else None


def filter_gradient_form(
    x: Float[Array, "b n f c"], kernel: Float[Array, "3 3 c d"]
) -> Form | None:
    """Returns the fastest filter gradient of (x, dy); None: XLA's own."""
    if min(kernel.shape[2:]) < _NARROW:
        return None
    return _filter_gradient_by_tiles if _worth_tiles(x, kernel) else _filter_gradient_by_products


def _worth_tiles(x: Array, kernel: Array) -> bool:
    """Tells whether minimal filtering pays.

    Not with few channels, nor in bfloat16, where factors of 8 and 1/24 cost too much precision.
    """
    return min(kernel.shape[2:]) >= _TILED and x.dtype != jnp.bfloat16


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

    Up to twice as fast as XLA's own.
    """
    (b, n, f, c), d = x.shape, kernel.shape[3]
    rows, steps = _rows(n, f, c, d, _TILE)
    tiles = rows // _TILE
    filters = jnp.einsum("ip,pqcd->iqcd", _FILTER.astype(x.dtype), kernel)
    x = jnp.pad(x, ((0, 0), (1, 1 + steps * rows - n), (0, 0), (0, 0)))
    x = jax.lax.optimization_barrier(x)  # else its producers are recomputed for each point

    def convolve_rows(x: Array, filter: Array) -> Array:
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, filter[None], (1, 1), "SAME", dimension_numbers=dimensions
        )

    def fill_rows(i, y):
        inputs = _tile_inputs(jax.lax.dynamic_slice_in_dim(x, i * rows, rows + 2, axis=1))
        products = list(map(convolve_rows, inputs, filters))
        for row, weights in enumerate(_OUTPUT):
            outputs = _weighted_sum(weights, products)[:, :, None]
            y = jax.lax.dynamic_update_slice(y, outputs, (0, i * tiles, row, 0, 0))
        return y

    y = jnp.zeros((b, steps * tiles, _TILE, f, d), x.dtype)
    y = jax.lax.fori_loop(0, steps, fill_rows, y)
    return y.reshape(b, steps * rows, f, d)[:, :n]


def matrix_gradient(x: Float[Array, "b n f c"], dy: Float[Array, "b n f d"]) -> Array:
    """Computes the gradient [c, d] of a matrix that multiplies the channels, a few rows at a time.

    For all rows at once, XLA would first transpose whole maps to channels-first.
    """
    return jnp.sum(_sum_over_rows(_product, x, dy), axis=0).astype(x.dtype)


def _filter_gradient_by_products(x: Array, dy: Array) -> Array:
    """Computes the filter gradient by matrix products over a few rows.

    XLA computes it as a convolution with a window as large as the map, 3 to 8 times slower.
    """

    def of_rows(x_rows: Array, dy_rows: Array) -> Array:
        shifted, rows = _shifted(dy_rows), dy_rows.shape[1]
        return jnp.stack([_product(x_rows[:, p : p + rows], shifted) for p in range(3)], axis=1)

    total = jnp.sum(_sum_over_rows(of_rows, x, dy, halo=1), axis=0)
    return total.reshape(3, x.shape[3], 3, dy.shape[3]).swapaxes(1, 2).astype(x.dtype)


def _filter_gradient_by_tiles(x: Array, dy: Array) -> Array:
    """Like `_filter_gradient_by_products`, by minimal filtering: half the products."""

    def of_rows(x_rows: Array, dy_rows: Array) -> list[Array]:
        dy_rows = [dy_rows[:, row::_TILE] for row in range(_TILE)]
        outputs = [_shifted(_weighted_sum(weights, dy_rows)) for weights in _OUTPUT.T]
        return list(map(_product, _tile_inputs(x_rows), outputs))

    total = jnp.stack(_sum_over_rows(of_rows, x, dy, halo=1, tile=_TILE), axis=1)
    b, c, d = x.shape[0], x.shape[3], dy.shape[3]
    # One matrix product sums over items and points; XLA's own sum over items is slow.
    weights = jnp.broadcast_to(_FILTER.astype(x.dtype), (b, *_FILTER.shape))
    return jnp.einsum("bip,bicqd->pqcd", weights, total.reshape(b, _POINTS, c, 3, d))


def _sum_over_rows(
    of_rows: Callable, x: Array, dy: Array, halo: int = 0, tile: int = 1
) -> Array | list[Array]:
    """Sums `of_rows(x_rows, dy_rows)` over runs of rows.

    Args:
      of_rows: returns one array or a list of arrays.
      x: input map, [b, n, f, c].
      dy: gradient of the output, [b, n, f, d].
      halo: zeros around the map; `x_rows` have as many rows before and after those of `dy_rows`,
        and `dy_rows` as many bins more on either side.
      tile: the number of rows is a multiple of this.
    """
    (_, n, f, c), d = x.shape, dy.shape[-1]
    rows, steps = _rows(n, f, c, d, tile)
    spare = steps * rows - n
    x = jnp.pad(x, ((0, 0), (halo, halo + spare), (0, 0), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (0, spare), (halo, halo), (0, 0)))

    def of_step(i):
        return of_rows(
            jax.lax.dynamic_slice_in_dim(x, i * rows, rows + 2 * halo, axis=1),
            jax.lax.dynamic_slice_in_dim(dy, i * rows, rows, axis=1),
        )

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of_step, 0))
    add = lambda i, total: jax.tree.map(jnp.add, total, of_step(i))  # noqa: E731
    return jax.lax.fori_loop(0, steps, add, zeros)


def _product(x: Float[Array, "b n f c"], dy: Float[Array, "b n f d"]) -> Float[Array, "b c d"]:
    """Sums x times dy over each item's positions, in float32 or better."""
    x, dy = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (x, dy))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bpc,bpd->bcd", x, dy, preferred_element_type=dtype)


def _shifted(dy: Float[Array, "b n g d"]) -> Float[Array, "b n f e"]:
    """Concatenates the three shifts of padded rows, one for each tap: g = f + 2, e = 3 d."""
    f = dy.shape[2] - 2
    return jnp.concatenate([dy[:, :, 2 - q : 2 - q + f] for q in range(3)], axis=-1)


def _rows(n: int, f: int, c: int, d: int, tile: int) -> tuple[int, int]:
    """Returns rows per step, a multiple of `tile` with little padding, and number of steps."""
    places = _PLACES if min(c, d) < _WIDE else _PLACES_OF_WIDE
    count = -(-n // tile)
    most = min(count, max(1, places // (tile * f)))
    tiles = min(range(most, most // 2, -1), key=lambda tiles: -count % tiles)
    return tiles * tile, -(-count // tiles)


def _tile_inputs(x_rows: Float[Array, "b n f c"]) -> list[Float[Array, "b m f c"]]:
    """Returns each point's input, m tiles, for rows with one more row at either end."""
    last = x_rows.shape[1] - _POINTS
    rows = [x_rows[:, p : p + last + 1 : _TILE] for p in range(_POINTS)]
    return [_weighted_sum(weights, rows) for weights in _INPUT]


def _weighted_sum(weights: np.ndarray, arrays: Sequence[Array]) -> Array:
    return sum(float(w) * a for w, a in zip(weights, arrays, strict=True) if w)
