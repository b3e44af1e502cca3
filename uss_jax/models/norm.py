"""Batch normalisation over the global batch or groups of its items, modulated per item (FiLM).

As in the reference: a batch has weight 0.01 in the running statistics by default, eps is 1e-5, the
running variance is unbiased, and statistics include padding frames. Letters: `b` batch, `g` groups,
`c` channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from uss_jax.devices.mesh import BATCH_AXIS
from uss_jax.models.reductions import places, sum_places

EPSILON = 1e-5
MOMENTUM = 0.01
# Checkpoint name of the statistics: saved under remat, so that each is all-reduced only once.
STATISTICS = "batch_norm_statistics"
SCOPES = ("global", "replica")


class BatchNorm(nn.Module):
    """Normalises the last axis over all others, then scales and shifts.

    Under `jit` on a sharded batch the statistics are those of the global batch. Statistics and the
    normalisation itself are float32 whatever the input's dtype; the output has the input's dtype.

    Attributes:
      over: items that share batch statistics in training: "global", the whole batch; "replica",
        the items of one device, without communication; or a number n, groups of n consecutive
        items, which unlike replicas do not depend on the number of devices. The running
        statistics take the mean over the groups.
      momentum: weight of a batch in the running statistics, as in torch; only training reads it.
    """

    over: str | int = "global"
    momentum: float = MOMENTUM

    @nn.compact
    def __call__(
        self,
        x: Array | tuple[Array, ...],
        train: bool,
        shift: Float[Array, "#b c"] | None = None,
        gain: Float[Array, "#b c"] | None = None,
        leak: float = 1.0,
    ) -> Array | tuple[Array, ...]:
        """Returns leaky_relu((1 + gain) * batch_norm(x) + shift), in the structure of `x`.

        Args:
          x: a map [b, ..., c], or several, normalised as their concatenation along the channels
            would be, without concatenating them.
          train: use batch statistics and update the running ones.
          shift, gain: FiLM per item and channel.
          leak: slope of the activation below 0; 1 for no activation. Fused into the norm, its
            gradient stores no further map: the sign is recomputed from `x`.
        """
        maps = x if isinstance(x, tuple) else (x,)
        channels = sum(part.shape[-1] for part in maps)
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
            y = _activate(_affine(maps, slope, bias - mean.value * slope), leak)
        else:
            rows = _rows(self.over, maps[0].shape[0])
            y, batch_mean, batch_var = _normalise(maps, scale, bias, mean.value, rows, leak)
            if not self.is_initializing():
                unbiased = batch_var * _bessel(maps[0], rows)
                mean.value = (1 - self.momentum) * mean.value + self.momentum * batch_mean
                var.value = (1 - self.momentum) * var.value + self.momentum * unbiased
        return y if isinstance(x, tuple) else y[0]


def _bessel(x: Float[Array, "b *space c"], rows: int) -> float:
    """Returns the ratio of unbiased to biased variance over `rows` items."""
    count = places(x) * rows
    return count / max(count - 1, 1)


def _per_item(v: Array, ndim: int) -> Array:
    """Reshapes [b, c] to [b, 1, ..., 1, c]."""
    return v.reshape(v.shape[0], *([1] * (ndim - 2)), v.shape[-1])


def _replicas() -> int:
    """Returns the number of devices that the batch is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[BATCH_AXIS] if not mesh.empty and BATCH_AXIS in mesh.axis_names else 1


def _rows(over: str | int, batch: int) -> int:
    """Returns the number of items per group, normalised together."""
    if over == "global":
        return batch
    rows = batch // _replicas() if over == "replica" else over
    if rows < 1 or batch % rows:
        raise ValueError(f"a batch of {batch} items cannot be normalised in equal groups of {over}")
    return rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _normalise(
    maps: tuple[Array, ...], scale: Array, bias: Array, pivot: Array, rows: int, leak: float
) -> tuple[tuple[Array, ...], Array, Array]:
    """Training-mode batch norm and activation: returns (maps, mean [c], biased variance [c]).

    A sharded batch takes one all-reduce forward and one backward. Forward, mean and variance are
    computed per item on its own device; only these are combined over a group. The variance of the
    item means around their own mean would need a second all-reduce. It is therefore taken around
    `pivot`, the running mean, which every device holds; the rounding error, 1e-7 times
    (mean - pivot)^2, vanishes as the running mean settles. Where each group lies on one device the
    second reduction is free, and the group's own mean is used instead of `pivot`.

    Args:
      maps: [b, ..., c_i] each; c is the sum of the c_i.
      scale: [b or 1, c].
      bias: [b or 1, c].
      pivot: [c].
      rows: items per group, normalised together; divides b.
      leak: slope of the activation below 0.
    """
    return _normalise_forward(maps, scale, bias, pivot, rows, leak)[0]


def _normalise_forward(maps, scale, bias, pivot, rows, leak):
    item_mean, item_var = (
        jnp.concatenate(v, axis=-1) for v in zip(*map(_item_statistics, maps), strict=True)
    )
    centre = pivot[None]
    if maps[0].shape[0] // rows % _replicas() == 0:
        centre = jnp.mean(_grouped(item_mean, rows), axis=1)
    around = item_mean - _to_items(centre, rows)
    first, second = jnp.mean(
        _grouped(jnp.stack([around, item_var + jnp.square(around)]), rows), axis=2
    )
    mean = checkpoint_name(centre + first, STATISTICS)
    var = jnp.maximum(second - jnp.square(first), 0)
    rstd = checkpoint_name(jax.lax.rsqrt(var + EPSILON), STATISTICS)
    slope = scale * _to_items(rstd, rows)
    y = _activate(_affine(maps, slope, bias - _to_items(mean, rows) * slope), leak)
    outputs = y, jnp.mean(mean, axis=0), jnp.mean(var, axis=0)
    return outputs, (maps, scale, bias, mean, rstd, pivot)


def _normalise_backward(rows, leak, residuals, cotangents):
    maps, scale, bias, mean, rstd, pivot = residuals
    widths = [x.shape[-1] for x in maps]
    mean, rstd = (_to_items(v, rows) for v in (mean, rstd))
    standard = [
        (x.astype(mean.dtype) - _per_item(m, x.ndim)) * _per_item(r, x.ndim)
        for x, m, r in zip(maps, _split(mean, widths), _split(rstd, widths), strict=True)
    ]
    dys = [dy.astype(mean.dtype) for dy in cotangents[0]]
    if leak != 1:
        slope = scale * rstd
        before = _affine(maps, slope, bias - mean * slope)
        dys = [jnp.where(y >= 0, dy, leak * dy) for dy, y in zip(dys, before, strict=True)]
    dbias = jnp.concatenate([sum_places(dy) for dy in dys], axis=-1)
    dscale = jnp.concatenate(
        [sum_places(dy * x) for dy, x in zip(dys, standard, strict=True)], axis=-1
    )
    count = places(maps[0]) * rows
    both = _grouped(jnp.stack([scale * dbias, scale * dscale]), rows)
    first, second = (_to_items(v, rows) for v in jnp.sum(both, axis=2) / count)
    factors = (_split(v, widths) for v in (rstd * scale, rstd * first, rstd * second))
    dmaps = tuple(
        (dy * _per_item(a, x.ndim) - _per_item(b, x.ndim) - s * _per_item(c, x.ndim)).astype(
            x.dtype
        )
        for x, dy, s, a, b, c in zip(maps, dys, standard, *factors, strict=True)
    )
    return (
        dmaps,
        _sum_to(dscale, scale.shape[0]),
        _sum_to(dbias, bias.shape[0]),
        jnp.zeros_like(pivot),
    )


def _item_statistics(x: Float[Array, "b *space c"]) -> tuple[Array, Array]:
    """Returns mean and biased variance [b, c] of each item, float32, in one read of `x`.

    Sums are taken around `near`, the mean of every 32nd frame. The mean of all frames lies within
    sqrt(31) standard deviations of it, whatever the distribution, so the variance,
    E[(x - near)^2] - E[x - near]^2, loses at most a factor of 32 of float32's precision.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if x.ndim == 2:
        return x, jnp.zeros_like(x)
    part = x[:, ::32]
    near = sum_places(part) / places(part)
    off = x - _per_item(near, x.ndim)
    first, second = (sum_places(v) / places(x) for v in (off, jnp.square(off)))
    return near + first, jnp.maximum(second - jnp.square(first), 0)


def _affine(maps: tuple[Array, ...], slope: Array, offset: Array) -> tuple[Array, ...]:
    """Returns slope * x + offset per map, in its dtype; slope and offset are [b or 1, c]."""
    widths = [x.shape[-1] for x in maps]
    return tuple(
        (x.astype(slope.dtype) * _per_item(a, x.ndim) + _per_item(b, x.ndim)).astype(x.dtype)
        for x, a, b in zip(maps, _split(slope, widths), _split(offset, widths), strict=True)
    )


def _activate(maps: tuple[Array, ...], leak: float) -> tuple[Array, ...]:
    return maps if leak == 1 else tuple(jnp.where(y >= 0, y, leak * y) for y in maps)


def _split(v: Float[Array, "#b c"], widths: list[int]) -> list[Array]:
    return jnp.split(v, np.cumsum(widths)[:-1], axis=-1)


def _grouped(v: Array, rows: int) -> Array:
    """Reshapes [..., b, c] to [..., g, rows, c]."""
    return v.reshape(*v.shape[:-2], -1, rows, v.shape[-1])


def _to_items(v: Array, rows: int) -> Array:
    """Repeats [g, c] to [b, c]; the value of a single group stays [1, c]."""
    return v if v.shape[0] == 1 else jnp.repeat(v, rows, axis=0)


def _sum_to(per_item: Array, rows: int) -> Array:
    return per_item if rows == per_item.shape[0] else jnp.sum(per_item, axis=0, keepdims=True)


_normalise.defvjp(_normalise_forward, _normalise_backward)
