"""Porting rules of the front ends: STFT kernels and mel matrices stored as fixed buffers."""

import numpy as np

from uss_jax.audio.mel import mel_matrix
from uss_jax.audio.stft import hann_window
from uss_jax.errors import UserError
from uss_jax.weights.porting import Fields, StateDict

# Settings that do not follow from a tagging net's arrays: PANNs' published front ends, by n_fft.
_FRONT_ENDS = {
    1024: dict(sample_rate=32000, hop_samples=320, f_min=50.0, f_max=14000.0),
    512: dict(sample_rate=16000, hop_samples=160, f_min=50.0, f_max=8000.0),
    256: dict(sample_rate=8000, hop_samples=80, f_min=50.0, f_max=4000.0),
}


# Pattern of the names of a tagging net's counters and fixed buffers.
FOREIGN = r".*\.num_batches_tracked|(spectrogram_extractor|logmel_extractor)\..*"


def infer_front_end(state_dict: StateDict) -> Fields:
    """Returns the fields of a tagging net's front end, known by the width of its STFT."""
    n_fft = 1024
    if (kernel := state_dict.get("spectrogram_extractor.stft.conv_real.weight")) is not None:
        n_fft = kernel.shape[-1]
    if n_fft not in _FRONT_ENDS:
        raise UserError(
            f"the tagging net has an STFT of {n_fft} samples, whose sampling rate is unknown; "
            f"supported are {', '.join(map(str, _FRONT_ENDS))}"
        )
    return dict(_FRONT_ENDS[n_fft], n_fft=n_fft, mel_bins=state_dict["bn0.weight"].size)


def front_end_formulas(fields: Fields) -> StateDict:
    """Returns the fixed buffers of a tagging net's front end."""
    front_end = ("sample_rate", "n_fft", "mel_bins", "f_min", "f_max")
    return {
        "spectrogram_extractor.stft.conv_real.weight": cosine_kernel(fields["n_fft"]),
        "logmel_extractor.melW": mel_matrix(**{name: fields[name] for name in front_end}),
    }


def cosine_kernel(n_fft: int) -> np.ndarray:
    """Returns the real part of a windowed DFT as in torchlibrosa, [n_fft // 2 + 1, 1, n_fft]."""
    steps = np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) % n_fft
    return (np.cos(2 * np.pi * steps / n_fft) * hann_window(n_fft))[:, None]
