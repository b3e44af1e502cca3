import numpy as np
import pytest

from tests.golden.weights import fixed_buffer
from tests.weights.variables import TAGGER_FIELDS, tagger_variables
from uss_jax.errors import UserError
from uss_jax.weights.cnn14 import convert_cnn14
from uss_jax.weights.torch import state_dict_of


def test_another_front_end_is_told_apart_by_its_kernels():
    fields = dict(TAGGER_FIELDS, n_fft=512, sample_rate=16000, hop_samples=160, f_max=8000.0)
    state_dict = state_dict_of("query", fields, tagger_variables())
    kernel = fixed_buffer((257, 1, 512), "stft_real")
    state_dict["spectrogram_extractor.stft.conv_real.weight"] = kernel
    assert convert_cnn14(state_dict).fields == fields


def test_kernels_of_another_window_are_refused():
    state_dict = state_dict_of("query", TAGGER_FIELDS, tagger_variables())
    name = "spectrogram_extractor.stft.conv_real.weight"
    state_dict[name] = np.sqrt(np.abs(fixed_buffer((513, 1, 1024), "stft_real")))
    with pytest.raises(UserError, match=f"{name} does not match a periodic Hann window"):
        convert_cnn14(state_dict)


def test_front_end_of_unknown_sample_rate_is_refused():
    state_dict = state_dict_of("query", TAGGER_FIELDS, tagger_variables())
    state_dict["spectrogram_extractor.stft.conv_real.weight"] = np.zeros((401, 1, 800), np.float32)
    with pytest.raises(UserError, match="STFT of 800 samples"):
        convert_cnn14(state_dict)
