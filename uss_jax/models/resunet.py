"""The ResUNet separator: a residual U-Net on the magnitude spectrogram, conditioned by FiLM.

Letters: `b` batch, `a` audio channels, `t` samples, `n` frames, `f` bins, `c` channels, `d` width
of the condition. Feature maps are [b, n, f, c].
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from uss_jax.audio.stft import change_spectrum
from uss_jax.models.conv import Conv1x1, Conv3x3, Upsample
from uss_jax.models.film import modulated_activation, scaled_to
from uss_jax.models.masks import Head, complex_mask
from uss_jax.models.norm import STATISTICS, BatchNorm
from uss_jax.models.separator import require_fitting

_WINDOW_FRAMES = 480
_CONTEXT_FRAMES = 32


def _power(spectrum: Complex[Array, "*any"]) -> Float[Array, "*any"]:
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


class ConvBlock(nn.Module):
    """Residual block: twice (batch norm, FiLM, leaky ReLU, 3x3 convolution), and a shortcut."""

    features: int
    film_gain: bool
    dtype: str
    norm_scope: str | int

    @nn.compact
    def __call__(
        self,
        maps: tuple[Float[Array, "b n f _"], ...],
        condition: Float[Array, "#b d"],
        train: bool,
    ) -> Float[Array, "b n f _"]:
        branch = maps
        for i in (1, 2):
            active = modulated_activation(
                self,
                branch,
                condition,
                train,
                norm=f"bn{i}",
                film=f"film{i}",
                with_gain=self.film_gain,
                scope=self.norm_scope,
            )
            branch = (Conv3x3(self.features, self.dtype, name=f"conv{i}")(active),)
        if len(maps) == 1 and maps[0].shape[-1] == self.features:
            return maps[0] + branch[0]
        return Conv1x1(self.features, self.dtype, name="shortcut")(*maps, onto=branch[0])


# Stores its input and, so that they are all-reduced only once, the batch statistics.
_REMAT = nn.remat(
    ConvBlock,
    static_argnums=(3,),
    policy=jax.checkpoint_policies.save_only_these_names(STATISTICS),
)


def _conv_blocks(
    level: nn.Module,
    maps: tuple[Float[Array, "b n f _"], ...],
    condition: Float[Array, "#b d"],
    train: bool,
) -> Float[Array, "b n f _"]:
    block = _REMAT if level.remat else ConvBlock
    fields = level.features, level.film_gain, level.dtype, level.norm_scope
    for j in range(1, level.blocks + 1):
        maps = (block(*fields, parent=level, name=f"conv_block{j}")(maps, condition, train),)
    return maps[0]


class Level(nn.Module):
    """The residual blocks of one encoder level or of the centre."""

    features: int
    blocks: int
    film_gain: bool
    dtype: str
    norm_scope: str | int
    remat: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n f c"], condition: Float[Array, "#b d"], train: bool
    ) -> Float[Array, "b n f _"]:
        return _conv_blocks(self, (x,), condition, train)


class DecoderLevel(nn.Module):
    """Transposed convolution up to the skip connection's size, then residual blocks.

    Attributes:
      frames: number of output frames to compute, from the first one on.
    """

    features: int
    blocks: int
    stride: tuple[int, int]
    frames: int
    film_gain: bool
    dtype: str
    norm_scope: str | int
    remat: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n f c"],
        skip: Float[Array, "b N F C"],
        condition: Float[Array, "#b d"],
        train: bool,
    ) -> Float[Array, "b frames F _"]:
        x = x[:, : -(-self.frames // self.stride[0])]
        x = modulated_activation(
            self,
            (x,),
            condition,
            train,
            norm="bn",
            film="film",
            with_gain=self.film_gain,
            scope=self.norm_scope,
        )
        x = Upsample(self.features, self.stride, self.dtype, name="up")(x)
        maps = x[:, : self.frames], skip[:, : self.frames]
        return _conv_blocks(self, maps, condition, train)


class ResUNet(nn.Module):
    """Extracts the sound described by a condition from a mixture.

    The magnitude is normalised per frequency bin. The U-Net predicts a magnitude mask (sigmoid) and
    a phase rotation (the direction of two tanh maps) for every bin but the Nyquist bin, which is
    zero as in the reference. STFT, masks and batch statistics stay float32 (float64 for float64
    input); only the U-Net computes in `dtype`.

    The defaults are the published ResUNet30: 25.7 M parameters for a condition of width 527, 38.3 M
    for 2048. The published checkpoints hold 26.6 M and 41.6 M, as some layers are in no forward
    pass.

    Attributes:
      n_fft: STFT window length in samples; half of it must be divisible by 2 ** levels.
      hop_samples: STFT hop in samples.
      channels: width of each level. Each level halves time and frequency, the last one frequency
        only. The centre has the last level's width.
      blocks_per_level: residual blocks in each encoder level, the centre and each decoder level.
      audio_channels: channels of mixture and estimate.
      condition_width: d.
      condition_norm: norm to which conditions are scaled, see `scaled_to`; 0 leaves them, as in the
        reference. Tagging probabilities are small and many classes are rare, so without it FiLM
        learns slowly.
      film_gain: whether FiLM also scales (the reference only shifts).
      dtype: compute dtype of the U-Net, "float32" or "bfloat16"; parameters stay float32.
      norm_scope: items that share batch statistics in training, see `BatchNorm.over`.
      remat: recompute the residual blocks in the backward pass instead of storing their maps.
    """

    n_fft: int = 2048
    hop_samples: int = 320
    channels: tuple[int, ...] = (32, 64, 128, 256, 384, 384)
    blocks_per_level: int = 1
    audio_channels: int = 1
    condition_width: int = 527
    condition_norm: float = 0.0
    film_gain: bool = False
    dtype: str = "float32"
    norm_scope: str | int = "global"
    remat: bool = False

    @property
    def grid_samples(self) -> int:
        """Samples per frame of the centre, the coarsest time resolution in the net."""
        return self.hop_samples * 2 ** (len(self.channels) - 1)

    @property
    def window_samples(self) -> int:
        """480 frames."""
        return _WINDOW_FRAMES * self.hop_samples

    @property
    def context_samples(self) -> int:
        """32 frames."""
        return _CONTEXT_FRAMES * self.hop_samples

    def for_training(self, norm_scope: str | int, remat: bool) -> "ResUNet":
        """Returns the net with these two fields set."""
        return self.clone(norm_scope=norm_scope, remat=remat)

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
          train: use and update batch statistics ("batch_stats" must be mutable).

        Raises:
          ValueError: audio channels, condition width or n_fft do not fit the net.
        """

        def masked(spectrum: Complex[Array, "b a n f"]) -> Complex[Array, "b a n f"]:
            return spectrum * self.mask(_power(spectrum), condition, train)

        return change_spectrum(mixture, self.n_fft, self.hop_samples, masked)

    def separate_with_shared_mask(
        self, mixture: Float[Array, "b c t"], condition: Float[Array, "#b d"]
    ) -> Float[Array, "b c t"]:
        """Separates any number of channels with a one-channel net, all by the same mask.

        The net sees the mean power over channels. For equal channels this is the power of each,
        and unlike the power of their mean it does not vanish where they are out of phase. A shared
        mask preserves level and phase differences between channels, hence the spatial image.
        """

        def masked(spectrum: Complex[Array, "b c n f"]) -> Complex[Array, "b c n f"]:
            power = jnp.mean(_power(spectrum), axis=1, keepdims=True)
            return spectrum * self.mask(power, condition, train=False)

        return change_spectrum(mixture, self.n_fft, self.hop_samples, masked)

    @nn.compact
    def mask(
        self, power: Float[Array, "b a n f"], condition: Float[Array, "#b d"], train: bool
    ) -> Complex[Array, "b a n f"]:
        """Computes the complex mask of a spectrum from its squared magnitude."""
        self._check(power, condition)
        if self.condition_norm:
            condition = scaled_to(condition, self.condition_norm)
        x = BatchNorm(self.norm_scope, name="bn0")(jnp.sqrt(jnp.maximum(power, 1e-10)), train)
        x = jnp.moveaxis(x, 1, -1)  # [b, n, f, a]

        frames, time_stride = x.shape[1], 2 ** (len(self.channels) - 1)
        x = jnp.pad(x, [(0, 0), (0, -frames % time_stride), (0, 0), (0, 0)])
        x = self._unet(x[:, :, :-1], condition, train, frames)
        x = Head(3 * self.audio_channels, name="after_conv")(x.astype(power.dtype))
        return complex_mask(x[:, :frames], self.audio_channels)

    def _check(self, power: Array, condition: Array) -> None:
        require_fitting(self, power.shape[1], condition.shape[-1])
        if (self.n_fft // 2) % 2 ** len(self.channels):
            raise ValueError(
                f"n_fft / 2 = {self.n_fft // 2} is not divisible by 2 ** {len(self.channels)} "
                "(levels); choose another n_fft or fewer levels"
            )

    def _unet(
        self,
        x: Float[Array, "b n f a"],
        condition: Float[Array, "#b d"],
        train: bool,
        frames: int,
    ) -> Float[Array, "b _ f c"]:
        """Returns the last decoder level's maps; only the first `frames` are needed."""
        common = dict(
            blocks=self.blocks_per_level,
            film_gain=self.film_gain,
            dtype=self.dtype,
            norm_scope=self.norm_scope,
            remat=self.remat,
        )
        levels = len(self.channels)
        strides = [(2, 2)] * (levels - 1) + [(1, 2)]
        x = Conv1x1(self.channels[0], self.dtype, name="pre_conv")(x)
        skips = []
        for i, (features, stride) in enumerate(zip(self.channels, strides, strict=True), start=1):
            x = Level(features, name=f"encoder_block{i}", **common)(x, condition, train)
            skips.append(x)
            x = nn.avg_pool(x, stride, stride)
        x = Level(self.channels[-1], name="centre_block", **common)(x, condition, train)
        # In training all frames are computed, since batch statistics include them.
        made = [skip.shape[1] for skip in skips] if train else self._frames_needed(frames, strides)
        for i in range(1, levels + 1):
            fields = dict(stride=strides[-i], frames=made[-i], name=f"decoder_block{i}", **common)
            x = DecoderLevel(self.channels[-i], **fields)(x, skips.pop(), condition, train)
        return x

    def _frames_needed(self, frames: int, strides: Sequence[tuple[int, int]]) -> list[int]:
        """Returns the number of frames per decoder level, last first, that the mask depends on.

        The remaining frames are padding; each 3x3 convolution reaches one frame into it.
        """
        needed = []
        for stride, _ in strides:
            frames += 2 * self.blocks_per_level
            needed.append(frames)
            frames = -(-frames // stride)
        return needed
