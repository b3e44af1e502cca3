"""Batch normalisation over the global batch or parts of it, modulated per item (FiLM).

As in the reference: momentum 0.01 of the new value unless told otherwise, eps 1e-5, unbiased
running variance, over all frames including padding. Letters: `b` batch, `g` groups, `c` channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from uss_jax.audio.stft import BATCH_AXIS

EPSILON = 1e-5
MOMENTUM = 0.01
# Under this name a rematerialised block keeps its statistics: devices speak once about each.
STATISTICS = "batch_norm_statistics"
SCOPES = ("global", "replica")


class BatchNorm(nn.Module):
    """Normalises the last axis over all others, then scales and shifts.

    Under `jit` on a sharded batch the statistics are those of the global batch. Statistics and the
    normalisation itself are float32 whatever the input's dtype; the output has the input's dtype.

    Attributes:
      over: what is normalised together in training: "global", the whole batch; "replica", the
        items of one device, so that devices need not speak to each other; or a number of items,
        which follow each other and, unlike replicas, are the same on any number of devices. The
        running statistics take the mean over the parts.
      momentum: weight of a batch in the running statistics, as in torch; only training reads it.
    """

    over: str | int = "global"
    momentum: float = MOMENTUM

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

        rows = _rows(self.over, x.shape[0])
        y, batch_mean, batch_var = _normalise(x, scale, bias, mean.value, rows)
        if not self.is_initializing():
            count = x.size // channels // x.shape[0] * rows
            unbiased = batch_var * (count / max(count - 1, 1))
            mean.value = (1 - self.momentum) * mean.value + self.momentum * batch_mean
            var.value = (1 - self.momentum) * var.value + self.momentum * unbiased
        return y


def _per_item(v: Array, ndim: int) -> Array:
    """[b, c] -> [b, 1, ..., 1, c]."""
    return v.reshape(v.shape[0], *([1] * (ndim - 2)), v.shape[-1])


def _replicas() -> int:
    """Devices over which the batch is split."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[BATCH_AXIS] if not mesh.empty and BATCH_AXIS in mesh.axis_names else 1


def _rows(over: str | int, batch: int) -> int:
    """Items of a batch that are normalised together."""
    if over == "global":
        return batch
    rows = batch // _replicas() if over == "replica" else over
    if rows < 1 or batch % rows:
        raise ValueError(f"a batch of {batch} items cannot be normalised in parts of {over}")
    return rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalise(
    x: Array, scale: Array, bias: Array, pivot: Array, rows: int
) -> tuple[Array, Array, Array]:
    """Training-mode batch norm: (y, mean [c], biased variance [c]).

    One all-reduce forward and one backward on a sharded batch. Forward, each item's mean and
    variance are taken in two passes where the item lies; only they are combined over the items that
    are normalised together. The spread of the item means needs a second reduction when taken around
    their mean, so it is taken around `pivot` [c], the running mean, which every device knows; its
    rounding error, 1e-7 times (mean - pivot)^2, vanishes as the running mean settles. Where the
    items lie on one device the second reduction is free, and the pivot is their own mean: an exact
    two-pass variance.

    Args:
      x: [b, ..., c].
      scale: [b or 1, c].
      bias: [b or 1, c].
      pivot: [c].
      rows: items normalised together; divides b.
    """
    return _normalise_forward(x, scale, bias, pivot, rows)[0]


def _normalise_forward(x, scale, bias, pivot, rows):
    y32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    space = tuple(range(1, x.ndim - 1))
    item_mean = jnp.mean(y32, space)
    item_var = jnp.mean(jnp.square(y32 - _per_item(item_mean, x.ndim)), space)
    centre = pivot[None]
    if x.shape[0] // rows % _replicas() == 0:
        centre = jnp.mean(_grouped(item_mean, rows), axis=1)
    around = item_mean - _to_items(centre, rows)
    first, second = jnp.mean(
        _grouped(jnp.stack([around, item_var + jnp.square(around)]), rows), axis=2
    )
    mean = checkpoint_name(centre + first, STATISTICS)
    var = jnp.maximum(second - jnp.square(first), 0)
    rstd = checkpoint_name(jax.lax.rsqrt(var + EPSILON), STATISTICS)
    slope = scale * _to_items(rstd, rows)
    offset = bias - _to_items(mean, rows) * slope
    y = y32 * _per_item(slope, x.ndim) + _per_item(offset, x.ndim)
    outputs = y.astype(x.dtype), jnp.mean(mean, axis=0), jnp.mean(var, axis=0)
    return outputs, (x, scale, bias, mean, rstd, pivot)


def _normalise_backward(rows, residuals, cotangents):
    x, scale, bias, mean, rstd, pivot = residuals
    dy = cotangents[0].astype(mean.dtype)
    space = tuple(range(1, x.ndim - 1))
    mean, rstd = (_per_item(_to_items(v, rows), x.ndim) for v in (mean, rstd))
    standard = (x.astype(mean.dtype) - mean) * rstd
    dbias = jnp.sum(dy, space)
    dscale = jnp.sum(dy * standard, space)
    count = x.size // x.shape[-1] // x.shape[0] * rows
    both = _grouped(jnp.stack([scale * dbias, scale * dscale]), rows)
    first, second = (_per_item(_to_items(v, rows), x.ndim) for v in jnp.sum(both, axis=2) / count)
    dx = rstd * (dy * _per_item(scale, x.ndim) - first - standard * second)
    return (
        dx.astype(x.dtype),
        _sum_to(dscale, scale.shape[0]),
        _sum_to(dbias, bias.shape[0]),
        jnp.zeros_like(pivot),
    )


def _grouped(v: Array, rows: int) -> Array:
    """[..., b, c] -> [..., g, rows, c]."""
    return v.reshape(*v.shape[:-2], -1, rows, v.shape[-1])


def _to_items(v: Array, rows: int) -> Array:
    """[g, c] -> [b, c]; what all items have in common stays [1, c]."""
    return v if v.shape[0] == 1 else jnp.repeat(v, rows, axis=0)


def _sum_to(per_item: Array, rows: int) -> Array:
    return per_item if rows == per_item.shape[0] else jnp.sum(per_item, axis=0, keepdims=True)


_normalise.defvjp(_normalise_forward, _normalise_backward)
