"""The tagging net and the sound event detector of PANNs (Kong et al. 2020, arXiv:1912.10211).

Both have the same parameters and differ in how they pool time. Letters: `b` batch, `t` samples,
`n` frames, `m` mel bands, `s` segments (frames after pooling), `k` classes, `e` embedding.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from uss_jax.models.conv import Conv3x3
from uss_jax.models.norm import BatchNorm
from uss_jax.models.tagging import TAGGING_MOMENTUM, Augment, front_end

_INIT = nn.initializers.xavier_uniform()
# Initialises the bias to the class prior: an AudioSet clip has 2.6 of 527 classes. PANNs starts at
# a probability of 1/2 and needs hundreds of steps to come down.
_RARE = nn.initializers.constant(-5.3)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU."""

    features: int
    dtype: str
    norm_momentum: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n m c"], train: bool) -> Float[Array, "b n m _"]:
        for i in (1, 2):
            x = Conv3x3(self.features, self.dtype, name=f"conv{i}")(x)
            norm = BatchNorm(momentum=self.norm_momentum, name=f"bn{i}")
            x = nn.relu(norm(x, train))
        return x


class Cnn14(nn.Module):
    """Audio tagging net: class probabilities and an embedding of a waveform.

    Attributes:
      sample_rate: sampling rate in Hz.
      n_fft: STFT window length in samples.
      hop_samples: STFT hop in samples; all shipped configs give 100 frames per second.
      mel_bins: number of mel bands.
      f_min: lowest frequency in Hz.
      f_max: highest frequency in Hz.
      channels: widths of the blocks, each but the last followed by 2x2 average pooling; the last
        one is also the width of the embedding.
      classes: k.
      dtype: compute dtype of the convolutions; log-mel, statistics and outputs are float32.
      norm_momentum: weight of a batch in the running statistics.
    """

    sample_rate: int = 32000
    n_fft: int = 1024
    hop_samples: int = 320
    mel_bins: int = 64
    f_min: float = 50.0
    f_max: float = 14000.0
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    classes: int = 527
    dtype: str = "float32"
    norm_momentum: float = TAGGING_MOMENTUM

    def setup(self) -> None:
        self.bn0 = BatchNorm(momentum=self.norm_momentum)
        self.conv_block = [
            ConvBlock(width, self.dtype, self.norm_momentum, name=f"conv_block{i}")
            for i, width in enumerate(self.channels, start=1)
        ]
        self.fc1 = nn.Dense(self.channels[-1], kernel_init=_INIT)
        self.fc_audioset = nn.Dense(self.classes, kernel_init=_INIT, bias_init=_RARE)
        self.dropout = nn.Dropout(0.5, rng_collection="augment")
        self.block_dropout = nn.Dropout(0.2, rng_collection="augment")

    def __call__(
        self,
        waveform: Float[Array, "b t"],
        train: bool = False,
        augment: Augment | None = None,
    ) -> dict[str, Array]:
        """Tags clips.

        Args:
          waveform: samples in [-1, 1].
          train: use batch statistics and dropout (random keys "augment").
          augment: applied to the normalised log-mel, [b, n, m] to [b', n, m].

        Returns:
          `clipwise` [b, k] in [0, 1] and `embedding` [b, e].
        """
        features = self.features(self.log_mel(waveform), train, augment)
        embedding = self.embed(features, train)
        return {"clipwise": self.classify(embedding), "embedding": embedding}

    def log_mel(self, waveform: Float[Array, "b t"]) -> Float[Array, "b n m"]:
        """Computes the mel power in dB; n = t // hop_samples + 1."""
        return front_end(self, waveform)

    def features(
        self, mel: Float[Array, "b n m"], train: bool, augment: Augment | None
    ) -> Float[Array, "_ s e"]:
        """Runs the convolution blocks and averages over frequency."""
        x = self.bn0(mel, train)
        x = (augment(x) if augment else x)[..., None]
        for i, block in enumerate(self.conv_block):
            x = block(x, train)
            if i < len(self.channels) - 1:
                x = nn.avg_pool(x, (2, 2), (2, 2))
            x = self.block_dropout(x, deterministic=not train)
        return jnp.mean(x, axis=2).astype(mel.dtype)

    def embed(self, features: Float[Array, "b s e"], train: bool) -> Float[Array, "b e"]:
        """Embeds clips: maximum plus mean over time, then a dense layer with ReLU."""
        pooled = jnp.max(features, axis=1) + jnp.mean(features, axis=1)
        return nn.relu(self.fc1(self.dropout(pooled, deterministic=not train)))

    def classify(self, embedding: Float[Array, "*b e"]) -> Float[Array, "*b k"]:
        """Returns class probabilities."""
        return nn.sigmoid(self.fc_audioset(embedding))

    def class_vectors(self) -> Float[Array, "k e"]:
        """Returns the last layer's vector of each class."""
        return jnp.asarray(self.fc_audioset.variables["params"]["kernel"]).T

    @property
    def embedding_width(self) -> int:
        """Width of the embedding."""
        return self.channels[-1]

    @property
    def frame_hop_samples(self) -> int:
        """Samples between frames of the log-mel, and of a detector's `framewise`."""
        return self.hop_samples

    @property
    def frame_stride(self) -> int:
        """STFT frames per segment."""
        return 2 ** (len(self.channels) - 1)


class Cnn14DecisionLevelMax(Cnn14):
    """Sound event detector: class probabilities per frame; the clip's are their maximum over time.

    The embedding is that of `Cnn14` with the same parameters, so that one net can serve as detector
    and query net.
    """

    def __call__(
        self,
        waveform: Float[Array, "b t"],
        train: bool = False,
        augment: Augment | None = None,
    ) -> dict[str, Array]:
        """Detects sound events; arguments as for `Cnn14`.

        Returns:
          `clipwise` [b, k], `framewise` [b, n, k] for the n frames of the log-mel, `embedding`
          [b, e], and `tagging` [b, k], the probabilities `Cnn14` computes from that embedding.
        """
        mel = self.log_mel(waveform)
        features = self.features(mel, train, augment)
        segmentwise = self.detect(features, train)
        embedding = self.embed(features, train)
        return {
            "clipwise": jnp.max(segmentwise, axis=1),
            "framewise": repeat_to_frames(segmentwise, self.frame_stride, mel.shape[1]),
            "embedding": embedding,
            "tagging": self.classify(embedding),
        }

    def detect(self, features: Float[Array, "b s e"], train: bool) -> Float[Array, "b s k"]:
        """Returns class probabilities of every segment of `frame_stride` frames."""
        window = dict(window_shape=(3,), strides=(1,), padding=((1, 1),))
        x = nn.max_pool(features, **window) + nn.avg_pool(features, **window)
        x = nn.relu(self.fc1(self.dropout(x, deterministic=not train)))
        return self.classify(self.dropout(x, deterministic=not train))


def repeat_to_frames(
    segmentwise: Float[Array, "b s k"], stride: int, frames: int
) -> Float[Array, "b n k"]:
    """Repeats each segment `stride` times, then extends the last one or cuts to `frames`."""
    repeated = jnp.repeat(segmentwise, stride, axis=1)
    missing = max(frames - repeated.shape[1], 0)
    return jnp.pad(repeated, ((0, 0), (0, missing), (0, 0)), mode="edge")[:, :frames]
