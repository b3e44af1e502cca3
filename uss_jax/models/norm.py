"""Batch normalisation over the global batch, modulated per item (FiLM).

As in the reference: momentum 0.01 of the new value, eps 1e-5, unbiased running variance, over all
frames including padding. Letters: `b` batch, `c` channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uss_jax.audio.stft import BATCH_AXIS

EPSILON = 1e-5
MOMENTUM = 0.01


class BatchNorm(nn.Module):
    """Normalises the last axis over all others, then scales and shifts.

    Under `jit` on a sharded batch the statistics are those of the global batch. Statistics and the
    normalisation itself are float32 whatever the input's dtype; the output has the input's dtype.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space c"],
        train: bool,
        shift: Float[Array, "#b c"] | None = None,
        gain: Float[Array, "#b c"] | None = None,
    ) -> Float[Array, "b *space c"]:
        """Returns (1 + gain) * batch_norm(x) + shift, gain and shift given per item."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))[None]
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))[None]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if gain is not None:
            scale, bias = scale * (1 + gain), bias * (1 + gain)
        if shift is not None:
            bias = bias + shift

        if not train:
            slope = scale * jax.lax.rsqrt(var.value + EPSILON)
            offset = bias - mean.value * slope
            y = x.astype(slope.dtype) * _per_item(slope, x.ndim) + _per_item(offset, x.ndim)
            return y.astype(x.dtype)

        y, batch_mean, batch_var = _normalise(x, scale, bias, mean.value)
        if not self.is_initializing():
            count = x.size // channels
            unbiased = batch_var * (count / max(count - 1, 1))
            mean.value = (1 - MOMENTUM) * mean.value + MOMENTUM * batch_mean
            var.value = (1 - MOMENTUM) * var.value + MOMENTUM * unbiased
        return y


def _per_item(v: Array, ndim: int) -> Array:
    """[b, c] -> [b, 1, ..., 1, c]."""
    return v.reshape(v.shape[0], *([1] * (ndim - 2)), v.shape[-1])


def _is_sharded() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and BATCH_AXIS in mesh.axis_names and mesh.shape[BATCH_AXIS] > 1


@jax.custom_vjp
def _normalise(x: Array, scale: Array, bias: Array, pivot: Array) -> tuple[Array, Array, Array]:
    """Training-mode batch norm: (y, mean [c], biased variance [c]).

    One all-reduce forward and one backward on a sharded batch. Forward, each item's mean and
    variance are taken in two passes where the item lies; only they are combined over the batch. The
    spread of the item means needs a second reduction when taken around their mean, so it is taken
    around `pivot` [c], the running mean, which every device knows; its rounding error, 1e-7 times
    (mean - pivot)^2, vanishes as the running mean settles. Where nothing is sharded the second
    reduction is free, and the pivot is the batch mean itself: an exact two-pass variance.

    Args:
      x: [b, ..., c].
      scale: [b or 1, c].
      bias: [b or 1, c].
      pivot: [c].
    """
    return _normalise_forward(x, scale, bias, pivot)[0]


def _normalise_forward(x, scale, bias, pivot):
    y32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    space = tuple(range(1, x.ndim - 1))
    item_mean = jnp.mean(y32, space)
    item_var = jnp.mean(jnp.square(y32 - _per_item(item_mean, x.ndim)), space)
    if not _is_sharded():
        pivot = jnp.mean(item_mean, axis=0)
    around = item_mean - pivot
    first, second = jnp.mean(jnp.stack([around, item_var + jnp.square(around)]), axis=1)
    mean = pivot + first
    var = jnp.maximum(second - jnp.square(first), 0)
    rstd = jax.lax.rsqrt(var + EPSILON)
    slope, offset = scale * rstd, bias - mean * scale * rstd
    y = y32 * _per_item(slope, x.ndim) + _per_item(offset, x.ndim)
    return (y.astype(x.dtype), mean, var), (x, scale, bias, mean, rstd, pivot)


def _normalise_backward(residuals, cotangents):
    x, scale, bias, mean, rstd, pivot = residuals
    dy = cotangents[0].astype(mean.dtype)
    space = tuple(range(1, x.ndim - 1))
    standard = (x.astype(mean.dtype) - mean) * rstd
    dbias = jnp.sum(dy, space)
    dscale = jnp.sum(dy * standard, space)
    count = x.size // x.shape[-1]
    first, second = jnp.sum(jnp.stack([scale * dbias, scale * dscale]), axis=1) / count
    dx = rstd * (dy * _per_item(scale, x.ndim) - first - standard * second)
    return (
        dx.astype(x.dtype),
        _sum_to(dscale, scale.shape[0]),
        _sum_to(dbias, bias.shape[0]),
        jnp.zeros_like(pivot),
    )


def _sum_to(per_item: Array, rows: int) -> Array:
    return per_item if rows == per_item.shape[0] else jnp.sum(per_item, axis=0, keepdims=True)


_normalise.defvjp(_normalise_forward, _normalise_backward)
