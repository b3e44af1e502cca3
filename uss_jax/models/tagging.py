"""The tagging net protocol, and the use of a tagging net as detector.

Letters: `b` batch, `t` samples, `n` frames, `m` mel bands, `k` classes, `e` embedding.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from uss_jax.audio.mel import log_mel
from uss_jax.devices.precision import HIGHEST, at_precision

Augment = Callable[[Array], Array]
# Batch norm momentum of PANNs and HTS-AT in training: PyTorch's default.
TAGGING_MOMENTUM = 0.1


@runtime_checkable
class TaggingNet(Protocol):
    """A Flax module that estimates class probabilities of a clip and, optionally, its frames.

    Called with a waveform [b, t], `train` and an `augment` of the normalised log-mel, it returns
    `clipwise` [b, k], class probabilities of the clip, and `embedding` [b, e]. A net that can
    serve as detector also returns `framewise` [b, n, k], class probabilities of
    n = t // frame_hop_samples + 1 frames, the first centred on sample 0.

    Attributes:
      sample_rate: sampling rate in Hz.
      classes: k.
      embedding_width: e.
      frame_hop_samples: samples between frames.
      dtype: compute dtype, "float32" or "bfloat16".
      norm_momentum: only of a net with batch norm: weight of a batch in its running statistics.
      unknown_classes: only of a net that cannot tell all classes: indices of probability 0.
      class_vectors: only of a net that serves conditions of that name: method that returns what the
        last layer multiplies an embedding with, for each class [k, e]; 0 for unknown classes.
      resamples: only of a net that resamples waveforms, and so takes any `sample_rate`: True.
    """

    sample_rate: int
    classes: int
    dtype: str

    @property
    def embedding_width(self) -> int: ...

    @property
    def frame_hop_samples(self) -> int: ...

    def __call__(
        self, waveform: Any, train: bool = False, augment: Augment | None = None
    ) -> dict[str, Array]: ...


def front_end(net: Any, waveform: Float[Array, "b t"]) -> Float[Array, "b n m"]:
    """Computes the log-mel with the settings in the net's fields; n = t // hop_samples + 1."""
    return log_mel(
        waveform,
        sample_rate=net.sample_rate,
        n_fft=net.n_fft,
        hop_samples=net.hop_samples,
        mel_bins=net.mel_bins,
        f_min=net.f_min,
        f_max=net.f_max,
    )


def unknown_classes(net: TaggingNet) -> tuple[int, ...]:
    """Returns the class indices to which a net always gives probability 0."""
    return tuple(getattr(net, "unknown_classes", ()))


def as_detector(net: TaggingNet) -> TaggingNet:
    """Returns the net with compute dtype float32, whatever dtype it was trained in."""
    return net.clone(dtype="float32")


def at_momentum(net: TaggingNet, momentum: float) -> TaggingNet:
    """Returns the net with this momentum of its batch norms; itself if it has none."""
    return net.clone(norm_momentum=momentum) if hasattr(net, "norm_momentum") else net


def detect(net: TaggingNet, variables: Any, waveform: Float[Array, "b t"]) -> dict[str, Array]:
    """Runs a net as detector, in float32 at highest precision whatever the caller's settings.

    Anchors are placed at maxima of the probabilities, which must not depend on the device.
    """
    return at_precision(HIGHEST, as_detector(net).apply)(variables, waveform)
