"""What every tagging net is asked, whatever it is made of.

Letters: `b` batch, `t` samples, `n` frames, `m` mel bands, `k` classes, `e` embedding.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from uss_jax.audio.mel import log_mel
from uss_jax.precision import HIGHEST, at_precision

Augment = Callable[[Array], Array]
# Of the batch norms of PANNs and HTS-AT in training: PyTorch's default.
TAGGING_MOMENTUM = 0.1


@runtime_checkable
class TaggingNet(Protocol):
    """A Flax module that tells what sounds in a waveform, and when.

    Called with a waveform [b, t], `train` and an `augment` of the normalised log-mel, it returns
    `clipwise` [b, k], probabilities of the clip, and `embedding` [b, e]. One that can serve as
    detector also returns `framewise` [b, n, k], probabilities of n = t // frame_hop_samples + 1
    frames, the first one centred on sample 0.

    Attributes:
      sample_rate: Hz.
      classes: k.
      embedding_width: e.
      frame_hop_samples: samples between frames.
      dtype: compute dtype, "float32" or "bfloat16".
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
    """The log-mel spectrogram that a net's fields describe; n = t // hop_samples + 1."""
    return log_mel(
        waveform,
        sample_rate=net.sample_rate,
        n_fft=net.n_fft,
        hop_samples=net.hop_samples,
        mel_bins=net.mel_bins,
        f_min=net.f_min,
        f_max=net.f_max,
    )


def as_detector(net: TaggingNet) -> TaggingNet:
    """Returns the net computing in float32, whatever dtype it was trained in."""
    return net.clone(dtype="float32")


def detect(net: TaggingNet, variables: Any, waveform: Float[Array, "b t"]) -> dict[str, Array]:
    """Runs a net as detector: in float32 at highest precision, whatever surrounds the call.

    An anchor is where a maximum lies, so probabilities must not depend on the device.
    """
    return at_precision(HIGHEST, as_detector(net).apply)(variables, waveform)
