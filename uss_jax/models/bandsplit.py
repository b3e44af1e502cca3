"""The band-split separator: attention over time and over bands, conditioned by adaptive norms.

The spectrum is cut into bands, each of which becomes one vector a frame. Layers of attention over
time and over bands change these vectors, and from each a complex mask of its band is computed. The
family is that of BS-RoFormer (arXiv:2309.02612), Mel-Band RoFormer (arXiv:2310.01809) and
TF-Locoformer (arXiv:2408.03440); the condition modulates every norm as in DiT (arXiv:2212.09748).
Nearly all work is in matrix products, and there are no batch statistics.

Letters: `b` batch, `a` audio channels, `c` any number of channels, `t` samples, `n` frames, `f`
bins, `k` bands, `d` width of the condition, `w` width of the net, `s` length of a sequence, `h`
heads, `e` width of a head.
"""

import itertools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from uss_jax.audio.stft import change_spectrum
from uss_jax.models.compute_dtype import flax_dtype, in_compute_dtype
from uss_jax.models.film import scaled_to
from uss_jax.models.separator import require_fitting

# Of a net whose attention over time reaches everywhere, so that no context is enough.
_CONTEXT_FRAMES = 32
# Added to mean squares, of samples up to 1: about -100 dB of full scale for a band's bin.
_FLOOR = 1e-8
_ROTARY_BASE = 10_000.0
# Sequences up to so many spans are attended to as a whole: blocks would save little there, a tenth
# at the 126 frames of a training item on a CPU.
_FEW_BLOCKS = 4


def mel_bands(count: int, n_fft: int, sample_rate: int) -> tuple[int, ...]:
    """Returns widths of bands, in bins, that are about equally wide on the mel scale.

    Widths are powers of two, so that neighbouring bands are equally wide and share one product.

    Args:
      count: the bands aimed at; the result has about as many.
      n_fft: length of the transform, in samples; the widths add up to half of it.
      sample_rate: in Hz.
    """
    bins, hertz = n_fft // 2, sample_rate / n_fft
    mel_per_band = 2595 * np.log10(1 + sample_rate / 2 / 700) / count
    widths: list[int] = []
    while (first := sum(widths)) < bins:
        # A mel is this many Hz wide at the band's lower end.
        wanted = mel_per_band * (700 + first * hertz) * np.log(10) / 2595 / hertz
        width = 2 ** max(0, round(np.log2(wanted)))
        widths.append(min(max(width, widths[-1] if widths else 1), bins - first))
    return tuple(widths)


def normalised(x: Float[Array, "*any w"]) -> Float[Array, "*any w"]:
    """Divides vectors by their root mean square, in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def rotated(x: Float[Array, "b s h e"]) -> Float[Array, "b s h e"]:
    """Rotates pairs of features by angles in proportion to their position in the sequence.

    Rotary positions (arXiv:2104.09864): products of two rotated vectors depend on their distance
    only. Feature i and feature i + e/2 are a pair.
    """
    length, half = x.shape[1], x.shape[-1] // 2
    speed = _ROTARY_BASE ** (-np.arange(half) / half)
    angle = np.arange(length)[:, None, None] * speed
    cos, sin = (
        jnp.asarray(of(angle), jnp.promote_types(x.dtype, jnp.float32)) for of in (np.cos, np.sin)
    )
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Attention of the vectors of a sequence to each other, with rotary positions.

    Attributes:
      head_width: width of a head.
      dtype: compute dtype.
      span: how far a vector reaches, on either side; 0: to all others.
    """

    head_width: int
    dtype: str
    span: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b s w"]) -> Float[Array, "b s w"]:
        width = x.shape[-1]
        shape = *x.shape[:2], width // self.head_width, self.head_width
        dense = dict(use_bias=False, dtype=flax_dtype(self.dtype))
        query, key, value = (
            nn.Dense(width, name=name, **dense)(x).reshape(shape)
            for name in ("query", "key", "value")
        )
        both = rotated(jnp.concatenate((query, key), axis=2)).astype(value.dtype)
        query, key = jnp.split(both, 2, axis=2)
        found = attended(query, key, value, self.span)
        return nn.Dense(width, name="out", **dense)(found.reshape(x.shape))


def attended(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s h e"],
    value: Float[Array, "b s h e"],
    span: int,
) -> Float[Array, "b s h e"]:
    """Returns attention of every query to the keys at most `span` away, of 0 to all.

    The softmax is computed in float32. A sequence that is long for its span is attended to in
    blocks, so that memory and time grow with its length and not with the square of it.
    """
    length = query.shape[1]
    if not span:
        return _weighted(query, key, value, None)
    place = np.arange(length)
    if length <= _FEW_BLOCKS * span:
        return _weighted(query, key, value, np.abs(place[:, None] - place) <= span)
    # Queries of a block of `span` reach keys of their own block and of its two neighbours.
    blocks = -(-length // span)
    padding = blocks * span - length

    def neighbours(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (span, span + padding), (0, 0), (0, 0)))
        parts = padded.reshape(x.shape[0], blocks + 2, span, *x.shape[2:])
        three = [parts[:, first : first + blocks] for first in range(3)]
        return jnp.concatenate(three, axis=2)

    asking = np.arange(blocks * span).reshape(blocks, 1, span, 1)
    asked = np.arange(3 * span) + (np.arange(blocks)[:, None, None, None] - 1) * span
    near = (np.abs(asking - asked) <= span) & (asked >= 0) & (asked < length)
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    in_blocks = query.reshape(query.shape[0], blocks, span, *query.shape[2:])
    found = _weighted(in_blocks, neighbours(key), neighbours(value), near)
    return found.reshape(query.shape)[:, :length]


def _weighted(
    query: Float[Array, "*any q h e"],
    key: Float[Array, "*any k h e"],
    value: Float[Array, "*any k h e"],
    near: Bool[np.ndarray, "*#some q k"] | None,
) -> Float[Array, "*any q h e"]:
    """Returns the values' mean for every query, by how well the keys that are `near` answer it."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    products = jnp.einsum("...qhe,...khe->...hqk", query, key, preferred_element_type=dtype)
    if near is not None:
        products = jnp.where(near, products, -jnp.inf)
    weights = nn.softmax(products / math.sqrt(value.shape[-1])).astype(value.dtype)
    return jnp.einsum("...hqk,...khe->...qhe", weights, value)


class FeedForward(nn.Module):
    """Two linear layers, of which a third gates the inner one (SwiGLU, arXiv:2002.05202)."""

    hidden_width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b s w"]) -> Float[Array, "b s w"]:
        dense = dict(use_bias=False, dtype=flax_dtype(self.dtype))
        gate = nn.silu(nn.Dense(self.hidden_width, name="gate", **dense)(x))
        inner = nn.Dense(self.hidden_width, name="inner", **dense)(x)
        return nn.Dense(x.shape[-1], name="outer", **dense)(gate * inner)


class Layer(nn.Module):
    """Attention over time, then over bands, each followed by a feed-forward net."""

    head_width: int
    hidden_width: int
    dtype: str
    time_span: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n k w"], asked: Float[Array, "#b _"] | None
    ) -> Float[Array, "b n k w"]:
        for axis, span in (("time", self.time_span), ("bands", 0)):
            x = jnp.swapaxes(x, 1, 2)  # the axis of the sequence is now the last but one
            for part, net in (
                (
                    "attention",
                    Attention(self.head_width, self.dtype, span, name=f"{axis}_attention"),
                ),
                ("forward", FeedForward(self.hidden_width, self.dtype, name=f"{axis}_forward")),
            ):
                name = f"{axis}_{part}_norm"
                y, gate = AdaptiveNorm(gated=True, name=name)(x, asked)
                (y,) = in_compute_dtype(self.dtype, y)
                y = net(y.reshape(-1, *x.shape[2:])).reshape(x.shape)
                x = x + gate.astype(x.dtype) * y
        return x


class AdaptiveNorm(nn.Module):
    """Normalises vectors, then scales and shifts them as the condition says.

    Everything that the condition does is 0 at first, so a gated branch is closed. Without a
    condition, scale, shift and gate are parameters.
    """

    gated: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b _ _ w"], asked: Float[Array, "#b _"] | None
    ) -> tuple[Float[Array, "b _ _ w"], Float[Array, "#b 1 1 w"] | None]:
        """Returns the vectors, in float32, and the gate of the branch that they enter, if any."""
        zeros, width = nn.initializers.zeros_init(), (2 + self.gated) * x.shape[-1]
        if asked is None:
            made = self.param("modulation", zeros, (1, width))
        else:
            made = nn.Dense(width, kernel_init=zeros, name="modulation")(asked)
        scale, shift, *gate = jnp.split(made[:, None, None], 2 + self.gated, axis=-1)
        return normalised(x) * (1 + scale) + shift, gate[0] if gate else None


class PerBand(nn.Module):
    """A linear layer of its own for each band; neighbouring bands of equal width share a product.

    Attributes:
      widths: for each band, the number of its features that are read or made.
      features: width of the result for every band; None if `widths` are those of the result.
      scale: variance of the initial kernel, relative to that which keeps the input's.
      bias: initial bias of each band's features.
    """

    widths: tuple[int, ...]
    features: int | None
    scale: float = 1.0

    @nn.compact
    def __call__(self, parts: Sequence[Float[Array, "b n _ _"]]) -> list[Float[Array, "b n _ _"]]:
        """Maps runs of equally wide bands [b, n, bands, features], one array a run."""
        init = nn.initializers.variance_scaling(
            self.scale, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0
        )
        made = []
        for number, ((count, width), x) in enumerate(zip(runs(self.widths), parts, strict=True)):
            shape = count, x.shape[-1], self.features or width
            kernel = self.param(f"kernel{number}", init, shape)
            bias = self.param(f"bias{number}", nn.initializers.zeros_init(), (count, shape[-1]))
            y = jnp.einsum("bnkf,kfg->bnkg", x, kernel.astype(x.dtype))
            made.append(y + bias.astype(x.dtype))
        return made


def runs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (number of bands, width) for each run of equally wide bands."""
    return [(len(list(alike)), width) for width, alike in itertools.groupby(widths)]


def cut_bands(x: Float[Array, "b n f *more"], widths: Sequence[int]) -> list[Array]:
    """Cuts bins into bands: for each run of equally wide ones [b, n, bands, width, ...]."""
    parts, first = [], 0
    for count, width in runs(widths):
        run = x[:, :, first : first + count * width]
        parts.append(run.reshape(*x.shape[:2], count, width, *x.shape[3:]))
        first += count * width
    return parts


class BandSplit(nn.Module):
    """Extracts the sound described by a condition from a mixture.

    The mask is any complex number for every bin but the Nyquist bin, where it is 0; it starts at
    1/2. Attention, feed-forward nets and what they add up to are in `dtype`; norms' statistics,
    spectra and masks in float32.

    Attributes:
      n_fft: STFT window length in samples.
      hop_samples: STFT hop in samples.
      bands: widths of the bands in bins, from 0 Hz on; n_fft / 2 in all.
      width: w, length of the vector of a band in a frame.
      layers: number of layers, each of attention over time and over bands.
      head_width: width of an attention head, even; divides `width`.
      hidden_width: width inside the feed-forward nets.
      time_span: how many frames, on either side, attention over time reaches in a layer; 0: all.
        With it a window is separated as in one pass beyond the reach of its ends, and nearly so
        beyond `context_samples`.
      audio_channels: channels of mixture and estimate.
      condition_width: d.
      condition_norm: norm to which conditions are scaled, see `scaled_to`; 0 leaves them.
      condition_added: add the condition to the bands' vectors once, instead of letting it modulate
        every norm.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
      remat: recompute the layers in the backward pass instead of storing what they compute.
    """

    n_fft: int = 2048
    hop_samples: int = 512
    bands: tuple[int, ...] = mel_bands(60, 2048, 32000)
    width: int = 256
    layers: int = 4
    head_width: int = 64
    hidden_width: int = 640
    time_span: int = 0
    audio_channels: int = 1
    condition_width: int = 527
    condition_norm: float = 0.0
    condition_added: bool = False
    dtype: str = "float32"
    remat: bool = False

    @property
    def grid_samples(self) -> int:
        """One hop."""
        return self.hop_samples

    @property
    def window_samples(self) -> int:
        """Nine times the context; four times if attention is unbounded."""
        return (9 if self.time_span else 4) * self.context_samples

    @property
    def context_samples(self) -> int:
        """Two thirds of the reach, by measurement (configs/README.md); 32 frames if unbounded."""
        if not self.time_span:
            return _CONTEXT_FRAMES * self.hop_samples
        return 2 * self.reach_samples // 3

    @property
    def reach_samples(self) -> int:
        """Reach of a sample of the estimate into the mixture, where `time_span` bounds it."""
        return self.layers * self.time_span * self.hop_samples + self.n_fft + self.hop_samples

    def for_training(self, norm_scope: str | int, remat: bool) -> "BandSplit":
        """Returns the net with `remat` set; it has no batch norms."""
        del norm_scope
        return self.clone(remat=remat)

    def __call__(
        self,
        mixture: Float[Array, "b a t"],
        condition: Float[Array, "#b d"],
        train: bool = False,
    ) -> Float[Array, "b a t"]:
        """Returns the estimated target.

        Args:
          mixture: waveforms of any length.
          condition: one vector per item, or one for all.
          train: without effect, since there are neither batch statistics nor dropout.

        Raises:
          ValueError: audio channels or condition width do not fit the net, or its fields clash.
        """
        del train

        def masked(spectrum: Complex[Array, "b a n f"]) -> Complex[Array, "b a n f"]:
            return spectrum * self.mask(spectrum, condition)

        return change_spectrum(mixture, self.n_fft, self.hop_samples, masked)

    def separate_with_shared_mask(
        self, mixture: Float[Array, "b c t"], condition: Float[Array, "#b d"]
    ) -> Float[Array, "b c t"]:
        """Separates any number of channels with a one-channel net, all by the same mask.

        Each bin's mask is the mean of the channels' own masks, weighted with their power, so what
        is out of phase in two channels does not vanish. For equal channels it is that of each.
        """
        items, channels, _ = mixture.shape
        if condition.shape[0] > 1:
            condition = jnp.repeat(condition, channels, axis=0)

        def masked(spectrum: Complex[Array, "b c n f"]) -> Complex[Array, "b c n f"]:
            alone = spectrum.reshape(items * channels, 1, *spectrum.shape[2:])
            masks = self.mask(alone, condition).reshape(spectrum.shape)
            power = jnp.square(spectrum.real) + jnp.square(spectrum.imag) + 1e-20
            mask = jnp.sum(masks * power, axis=1, keepdims=True) / jnp.sum(power, 1, keepdims=True)
            return spectrum * mask

        return change_spectrum(mixture, self.n_fft, self.hop_samples, masked)

    @nn.compact
    def mask(
        self, spectrum: Complex[Array, "b a n f"], condition: Float[Array, "#b d"]
    ) -> Complex[Array, "b a n f"]:
        """Computes the complex mask of a spectrum."""
        self._check(spectrum, condition)
        if self.condition_norm:
            condition = scaled_to(condition, self.condition_norm)
        asked = nn.silu(nn.Dense(self.width, name="condition")(condition))

        parts = PerBand(self.bands, self.width, name="split")(self._features(spectrum))
        bands = jnp.concatenate(parts, axis=2)
        if self.condition_added:
            bands = bands + nn.Dense(self.width, name="added")(asked)[:, None, None]
            asked = None
        (x,) = in_compute_dtype(self.dtype, bands)
        layer = nn.remat(Layer) if self.remat else Layer
        for i in range(1, self.layers + 1):
            fields = self.head_width, self.hidden_width, self.dtype, self.time_span
            x = layer(*fields, name=f"layer{i}")(x, asked)

        x, _ = AdaptiveNorm(gated=False, name="norm")(x, asked)
        counts = np.cumsum([count for count, _ in runs(self.bands)])[:-1]
        inner = PerBand(self.bands, self.width, name="inner")(jnp.split(x, counts, axis=2))
        made = tuple(2 * self.audio_channels * width for width in self.bands)
        outer = PerBand(made, None, scale=0.01, name="merge")(list(map(nn.silu, inner)))
        return self._joined(outer)

    def _features(self, spectrum: Complex[Array, "b a n f"]) -> list[Float[Array, "b n _ _"]]:
        """Returns the bands' features: their bins at a root mean square of 1, and its logarithm."""
        planes = jnp.stack([spectrum.real, spectrum.imag], axis=-1)[:, :, :, :-1]
        features = []
        for band in cut_bands(jnp.moveaxis(planes, 1, -1), self.bands):
            flat = band.reshape(*band.shape[:3], -1)
            square = jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + _FLOOR
            level = 0.1 * jnp.log(square)
            features.append(jnp.concatenate([flat * jax.lax.rsqrt(square), level], axis=-1))
        return features

    def _joined(self, parts: Sequence[Float[Array, "b n _ _"]]) -> Complex[Array, "b a n f"]:
        """Joins the bands' masks and appends that of the Nyquist bin, 0."""
        items, frames = parts[0].shape[:2]
        flat = [part.reshape(items, frames, -1, self.audio_channels, 2) for part in parts]
        planes = jnp.moveaxis(jnp.concatenate(flat, axis=2), 3, 1)  # [b, a, n, f, 2]
        mask = jax.lax.complex(planes[..., 0] + 0.5, planes[..., 1])
        return jnp.pad(mask, [(0, 0)] * 3 + [(0, 1)])

    def _check(self, spectrum: Array, condition: Array) -> None:
        require_fitting(self, spectrum.shape[1], condition.shape[-1])
        if sum(self.bands) != self.n_fft // 2:
            raise ValueError(
                f"bands add up to {sum(self.bands)} bins, not to n_fft / 2 = {self.n_fft // 2}"
            )
        if self.width % self.head_width or self.head_width % 2:
            raise ValueError(
                f"head_width={self.head_width} is odd or does not divide width={self.width}"
            )
