"""Blocks of a shifted-window transformer (Swin, Liu et al., arXiv:2103.14030), as HTS-AT has them.

Attention runs within windows of 8 x 8 tokens; every other block rolls the grid by half a window.
Between stages 2 x 2 tokens merge into one.

Activations are not gathered: windows are cut by reshape and transpose, and a roll is two slices, so
that XLA compiles a block to three batched matrix products with the rest fused into them. The
relative position bias is expanded once per block from its table with a constant index, to
[heads, tokens, tokens]. Tokens that only the roll made neighbours are masked by comparing constant
labels.

Letters: `b` batch, `y` and `x` rows and columns of the token grid, `w` windows, `p` tokens of a
window, `c` channels.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uss_jax.models.compute_dtype import flax_dtype, in_compute_dtype

PATCH = 4  # pixels per side
WINDOW = 8  # tokens per side
MLP_RATIO = 4
EPSILON = 1e-5
# Added to the logits of masked token pairs; their weight after the softmax is zero.
MASKED = -100.0
_INIT = nn.initializers.truncated_normal(0.02)


class PatchEmbedding(nn.Module):
    """Maps each patch of 4 x 4 pixels to a token, by one matrix product and a layer norm.

    The parameter `kernel` [4, 4, 1, c] is that of the equivalent convolution with stride 4.
    """

    features: int
    dtype: str

    @nn.compact
    def __call__(self, image: Float[Array, "b Y X"]) -> Float[Array, "b y x c"]:
        shape = (PATCH, PATCH, 1, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        b, height, width = image.shape
        patches = image.reshape(b, height // PATCH, PATCH, width // PATCH, PATCH).swapaxes(2, 3)
        patches = patches.reshape(b, height // PATCH, width // PATCH, PATCH * PATCH)
        patches, kernel, bias = in_compute_dtype(self.dtype, patches, kernel, bias)
        y = jnp.matmul(patches, kernel.reshape(-1, self.features)) + bias
        return layer_norm("float32", name="norm")(y)


class Stage(nn.Module):
    """Blocks on a token grid, every other one shifted, then merging of 2 x 2 tokens into one.

    Attributes:
      heads: number of attention heads.
      drop_rates: stochastic depth rate of each block.
      merges: whether tokens merge at the end, doubling the channels.
      dtype: compute dtype.
    """

    heads: int
    drop_rates: tuple[float, ...]
    merges: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"], train: bool) -> Float[Array, "b Y X C"]:
        for j, rate in enumerate(self.drop_rates):
            block = Block(self.heads, j % 2 == 1, rate, self.dtype, name=f"block{j + 1}")
            x = block(x, train)
        if not self.merges:
            return x
        b, height, width, c = x.shape
        # The reference's token order: left column first, upper before lower.
        y = x.reshape(b, height // 2, 2, width // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)
        y = layer_norm(self.dtype, name="merge_norm")(y.reshape(b, height // 2, width // 2, 4 * c))
        return dense(2 * c, self.dtype, use_bias=False, name="merge")(y).astype(x.dtype)


class Block(nn.Module):
    """Transformer block: window attention, then an MLP, each with a residual connection.

    Attributes:
      heads: number of attention heads.
      shifted: whether windows are shifted by half a window; ignored if the grid is one window.
      drop_rate: stochastic depth rate, drawn per item for each of the two branches.
      dtype: compute dtype.
    """

    heads: int
    shifted: bool
    drop_rate: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"], train: bool) -> Float[Array, "b y x c"]:
        drop = nn.Dropout(
            self.drop_rate,
            broadcast_dims=(1, 2, 3),
            rng_collection="augment",
            deterministic=not train,
        )
        side, c = x.shape[1], x.shape[-1]
        window = min(WINDOW, side)
        shift = window // 2 if self.shifted and side > window else 0
        y = layer_norm(self.dtype, name="norm1")(x)
        y = jnp.roll(y, (-shift, -shift), (1, 2)) if shift else y
        labels = side_labels(side, window, shift) if shift else None
        attend = WindowAttention(self.heads, window, self.dtype, name="attention")
        y = join_windows(attend(cut_windows(y, window), labels), side)
        y = jnp.roll(y, (shift, shift), (1, 2)) if shift else y
        x = x + drop(y)

        y = layer_norm(self.dtype, name="norm2")(x)
        y = nn.gelu(dense(MLP_RATIO * c, self.dtype, name="fc1")(y), approximate=False)
        return x + drop(dense(c, self.dtype, name="fc2")(y))


class WindowAttention(nn.Module):
    """Multi-head attention within each window, with a relative position bias.

    Attributes:
      heads: number of attention heads.
      window: tokens per side.
      dtype: compute dtype; the softmax is float32.
    """

    heads: int
    window: int
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b w p c"], labels: np.ndarray | None
    ) -> Float[Array, "b w p c"]:
        """Applies attention to the tokens of each window.

        Args:
          x: tokens grouped by window.
          labels: constant [w, p]; tokens attend only to tokens with the same label. None: to all.
        """
        b, w, p, c = x.shape
        table = self.param(
            "relative_position_bias", _INIT, ((2 * self.window - 1) ** 2, self.heads)
        )
        qkv = dense(3 * c, self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, w, p, 3, self.heads, c // self.heads), 3, 0)
        q = q * (c // self.heads) ** -0.5
        wide = jnp.promote_types(table.dtype, jnp.float32)  # also where parameters are bfloat16
        logits = jnp.einsum("bwqhd,bwkhd->bwhqk", q, k).astype(wide)
        bias = table.astype(wide)[relative_positions(self.window).reshape(-1)]
        logits += bias.reshape(p, p, self.heads).transpose(2, 0, 1)
        if labels is not None:
            together = labels[:, None, :, None] == labels[:, None, None, :]
            logits += jnp.where(together, 0.0, MASKED).astype(wide)
        probabilities = nn.softmax(logits)
        self.sow("intermediates", "probabilities", probabilities)
        y = jnp.einsum("bwhqk,bwkhd->bwqhd", probabilities.astype(v.dtype), v)
        return dense(c, self.dtype, name="projection")(y.reshape(b, w, p, c))


def dense(features: int, dtype: str, **arguments) -> nn.Dense:
    """Returns a dense layer with truncated-normal initialisation."""
    return nn.Dense(features, dtype=flax_dtype(dtype), kernel_init=_INIT, **arguments)


def layer_norm(dtype: str, **arguments) -> nn.LayerNorm:
    """Returns a layer norm over the channels, with two-pass float32 statistics."""
    return nn.LayerNorm(
        epsilon=EPSILON, dtype=flax_dtype(dtype), use_fast_variance=False, **arguments
    )


def cut_windows(x: Float[Array, "b y x c"], window: int) -> Float[Array, "b w p c"]:
    """Cuts a grid into windows; windows, and tokens within them, are in row-major order."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // window, window, width // window, window, c)
    return x.swapaxes(2, 3).reshape(b, -1, window * window, c)


def join_windows(x: Float[Array, "b w p c"], side: int) -> Float[Array, "b y x c"]:
    """Inverts `cut_windows` for a square grid."""
    b, w, p, c = x.shape
    along, window = round(w**0.5), round(p**0.5)
    x = x.reshape(b, along, along, window, window, c)
    return x.swapaxes(2, 3).reshape(b, side, side, c)


def relative_positions(window: int) -> np.ndarray:
    """Returns the bias table row of each pair of tokens in a window, int [p, p]."""
    row, column = np.divmod(np.arange(window * window), window)
    down = row[:, None] - row + window - 1
    right = column[:, None] - column + window - 1
    return down * (2 * window - 1) + right


def side_labels(side: int, window: int, shift: int) -> np.ndarray:
    """Labels the tokens of a rolled grid, int [w, p]: equal if contiguous before the roll.

    The last `shift` rows and columns were wrapped around from the other end of the grid.
    """
    came_round = (np.arange(side) >= side - shift).astype(np.int32)
    grid = 2 * came_round[:, None] + came_round
    return np.asarray(
        grid.reshape(side // window, window, side // window, window)
        .swapaxes(1, 2)
        .reshape(-1, window * window)
    )
