"""YAMNet: MobileNet v1 on patches of a log-mel spectrogram (Plakal and Ellis 2020, after
arXiv:1704.04861 and arXiv:1609.09430).

Batch norms are folded into the convolutions. Letters: `b` batch, `t` samples, `n` frames, `m` mel
bands, `p` patches, `q` patches of all clips, `c` and `d` channels, `k` classes, `e` embedding.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uss_jax.audio.mel import htk_mel_matrix
from uss_jax.audio.polyphase import resample_on_device
from uss_jax.audio.precise_dft import magnitudes
from uss_jax.models.compute_dtype import in_compute_dtype
from uss_jax.models.tagging import Augment

# The front end; waveforms at other rates are resampled to this one.
_RATE = 16000
_WINDOW, _HOP, _FFT = 400, 160, 512
_MEL_BINS, _F_MIN, _F_MAX = 64, 125.0, 7500.0
_BINS = (4, 241)  # those that reach into a mel band
_FLOOR = 1e-3
_SILENCE = float(np.log(_FLOOR))
_PATCH_FRAMES = 96
_PATCH_SAMPLES = (_PATCH_FRAMES - 1) * _HOP + _WINDOW
# Stride of each depthwise convolution; the first convolution has stride 2.
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class YAMNet(nn.Module):
    """Audio tagging net and sound event detector: class probabilities of patches of 0.96 s.

    Attributes:
      sample_rate: sampling rate of the waveform, in Hz; resampled to 16 kHz on the device.
      patch_hop_frames: frames of 10 ms between patches; 48 as published. Patches share the log-mel
        only, since a convolution pads at a patch's borders, so the cost grows as 1 / hop.
      channels: widths of the convolutions; the last one is that of the embedding.
      classes: k.
      unknown_classes: class indices without an output, of probability 0; six of AudioSet's in the
        published weights.
      dtype: compute dtype of the convolutions; log-mel, embedding and outputs are float32.
    """

    sample_rate: int = _RATE
    patch_hop_frames: int = 48
    channels: tuple[int, ...] = (32, 64, 128, 128, 256, 256, *6 * (512,), 1024, 1024)
    classes: int = 527
    unknown_classes: tuple[int, ...] = ()
    dtype: str = "float32"

    resamples: ClassVar[bool] = True

    def setup(self) -> None:
        if len(self.channels) != len(_STRIDES) + 1:
            raise ValueError(f"channels must be {len(_STRIDES) + 1} widths")
        unknown = set(self.unknown_classes)
        if not all(k < self.classes for k in unknown) or len(unknown) == self.classes:
            raise ValueError("unknown_classes must be class indices, but not all of them")
        self.stem = Stem(self.channels[0], self.dtype)
        self.block = [
            Block(width, stride, self.dtype, name=f"block{i}")
            for i, (width, stride) in enumerate(zip(self.channels[1:], _STRIDES, strict=True))
        ]
        self.classifier = nn.Dense(self.classes - len(set(self.unknown_classes)))

    def __call__(
        self, waveform: Float[Array, "b t"], train: bool = False, augment: Augment | None = None
    ) -> dict[str, Array]:
        """Tags clips.

        Args:
          waveform: samples in [-1, 1]; what is missing of a first patch counts as zero.
          train: unused, since the net has neither batch norm nor dropout.
          augment: applied to the log-mel less that of silence, [b, n, m] to [b', n, m].

        Returns:
          `clipwise` [b, k], the maximum over patches; `framewise` [b, n, k], interpolated between
          the centres of patches at t // frame_hop_samples + 1 frames; `embedding` [b, e], the mean
          over patches.
        """
        mel = self.log_mel(waveform)
        mel = _SILENCE + augment(mel - _SILENCE) if augment else mel
        embedding = self.embed(mel)
        patchwise = self.classify(embedding)
        return {
            "clipwise": jnp.max(patchwise, axis=1),
            "framewise": self._at_frames(patchwise, waveform.shape[1]),
            "embedding": jnp.mean(embedding, axis=1),
        }

    def log_mel(self, waveform: Float[Array, "b t"]) -> Float[Array, "b n m"]:
        """Computes log(mel magnitude + 0.001) of whole frames, at least those of one patch."""
        waveform = jnp.asarray(waveform, jnp.float32)
        at_rate = resample_on_device(waveform, self.sample_rate, _RATE)
        missing = max(_PATCH_SAMPLES - at_rate.shape[1], 0)
        at_rate = jnp.pad(at_rate, ((0, 0), (0, missing)))
        magnitude = magnitudes(
            at_rate, window_samples=_WINDOW, hop_samples=_HOP, n_fft=_FFT, bins=_BINS
        )
        weights = htk_mel_matrix(_RATE, _FFT, _MEL_BINS, _F_MIN, _F_MAX)[slice(*_BINS)]
        mel = jnp.matmul(magnitude, weights.astype(np.float32), precision=jax.lax.Precision.HIGHEST)
        return jnp.log(mel + _FLOOR)

    def embed(self, mel: Float[Array, "b n m"]) -> Float[Array, "b p e"]:
        """Embeds every whole patch of the log-mel."""
        batch, frames, bands = mel.shape
        begins = range(0, frames - _PATCH_FRAMES + 1, self.patch_hop_frames)
        patches = jnp.stack([mel[:, i : i + _PATCH_FRAMES] for i in begins], axis=1)
        x = self.stem(patches.reshape(batch * len(begins), _PATCH_FRAMES, bands))
        for block in self.block:
            x = block(x)
        pooled = jnp.mean(x.astype(mel.dtype), axis=(1, 2))
        return pooled.reshape(batch, len(begins), -1)

    def classify(self, embedding: Float[Array, "b p e"]) -> Float[Array, "b p k"]:
        """Returns class probabilities, 0 for the unknown classes."""
        return self._of_all_classes(nn.sigmoid(self.classifier(embedding)))

    def class_vectors(self) -> Float[Array, "k e"]:
        """Returns the classifier's vector of each class, 0 for the unknown classes."""
        return self._of_all_classes(jnp.asarray(self.classifier.variables["params"]["kernel"])).T

    def _of_all_classes(self, known: Float[Array, "*_ d"]) -> Float[Array, "*_ k"]:
        """Inserts 0 for the unknown classes."""
        if not self.unknown_classes:
            return known
        column = np.full(self.classes, known.shape[-1])
        column[np.setdiff1d(np.arange(self.classes), self.unknown_classes)] = np.arange(
            known.shape[-1]
        )
        return jnp.pad(known, [(0, 0)] * (known.ndim - 1) + [(0, 1)])[..., column]

    def _at_frames(self, patchwise: Float[Array, "b p k"], samples: int) -> Float[Array, "b n k"]:
        """Interpolates between centres of patches; the first and last one hold beyond theirs."""
        patches = patchwise.shape[1]
        seconds = np.arange(samples // self.frame_hop_samples + 1) * (
            self.frame_hop_samples / self.sample_rate
        )
        at = (seconds * _RATE - _PATCH_SAMPLES / 2) / (self.patch_hop_frames * _HOP)
        at = np.clip(at, 0, patches - 1)
        below = np.minimum(at.astype(int), max(patches - 2, 0))
        share = (at - below).astype(np.float32)[:, None]
        above = np.minimum(below + 1, patches - 1)
        return patchwise[:, below] * (1 - share) + patchwise[:, above] * share

    @property
    def embedding_width(self) -> int:
        """Width of the embedding."""
        return self.channels[-1]

    @property
    def frame_hop_samples(self) -> int:
        """Samples between frames of `framewise`: 10 ms."""
        return round(self.sample_rate / 100)


class Stem(nn.Module):
    """3x3 convolution of one map with stride 2, bias and ReLU."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "q n f"]) -> Float[Array, "q _ _ d"]:
        kernel = self.param("kernel", nn.initializers.he_normal(), (3, 3, 1, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = in_compute_dtype(self.dtype, x, kernel, bias)
        taps = jnp.stack([tap for row in _taps(x[..., None], 2) for tap in row], axis=-1)
        return nn.relu(jnp.matmul(taps[..., 0, :], kernel.reshape(9, -1)) + bias)


class Block(nn.Module):
    """Depthwise 3x3 and 1x1 convolution, each with bias and ReLU."""

    features: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "q n f c"]) -> Float[Array, "q _ _ d"]:
        zeros, init = nn.initializers.zeros_init(), nn.initializers.he_normal()
        width = x.shape[-1]
        depthwise = self.param("depthwise", nn.initializers.normal(0.47), (3, 3, width))
        depthwise_bias = self.param("depthwise_bias", zeros, (width,))
        kernel = self.param("kernel", init, (width, self.features))
        bias = self.param("bias", zeros, (self.features,))
        arrays = in_compute_dtype(self.dtype, x, depthwise, depthwise_bias, kernel, bias)
        x, depthwise, depthwise_bias, kernel, bias = arrays
        taps = _taps(x, self.stride)
        x = sum(taps[i][j] * depthwise[i, j] for i in range(3) for j in range(3))
        x = nn.relu(x + depthwise_bias)
        return nn.relu(jnp.matmul(x, kernel) + bias)


def _taps(x: Float[Array, "q n f c"], stride: int) -> list[list[Array]]:
    """Returns the nine shifted maps that a 3x3 convolution with "same" padding multiplies.

    Where the stride is 2, sizes are even and TensorFlow pads zeros after the map only.
    """
    before, after = (1, 1) if stride == 1 else (0, 1)
    padded = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    rows, columns = x.shape[1], x.shape[2]
    return [
        [padded[:, i : i + rows : stride, j : j + columns : stride] for j in range(3)]
        for i in range(3)
    ]
