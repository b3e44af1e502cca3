import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.weights import fixed_buffer
from tests.weights.variables import (
    SEPARATOR_FIELDS,
    TAGGER_FIELDS,
    assert_same_tree,
    separator_variables,
    tagger_variables,
)
from uss_jax.errors import UserError
from uss_jax.weights.cnn14 import convert_cnn14
from uss_jax.weights.lightning import convert_lightning
from uss_jax.weights.resunet import convert_resunet
from uss_jax.weights.torch import state_dict_of


@pytest.fixture
def separator():
    return state_dict_of("separator", SEPARATOR_FIELDS, separator_variables())


def test_error_lists_all_that_does_not_fit(separator):
    separator.pop("base.pre_conv.bias")
    separator.pop("film.decoder_block1->beta1.weight")
    separator["base.encoder_block2.conv_block1.conv2.weight"] = np.zeros((6, 6, 5, 5), np.float32)
    separator["base.after_conv.gamma"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        convert_resunet(separator)
    text = str(error.value)
    assert text.startswith("4 of the tensors do not fit")
    assert "base.pre_conv.bias is missing" in text
    assert "film.decoder_block1->beta1.weight is missing" in text
    conv = "base.encoder_block2.conv_block1.conv2.weight"
    assert f"{conv} has shape (6, 6, 5, 5) instead of (6, 6, 3, 3)" in text
    assert "base.after_conv.gamma is unexpected" in text


@pytest.mark.parametrize("convert", [convert_cnn14, convert_resunet, convert_lightning])
def test_tensors_of_something_else_are_refused(convert):
    with pytest.raises(UserError, match="is missing"):
        convert({"layer.weight": np.zeros((3, 3), np.float32)})


def test_given_fields_tell_what_is_missing_even_where_nothing_can_be_inferred(separator):
    separator.pop("base.bn0.weight")
    with pytest.raises(UserError, match=r"base\.bn0\.weight is missing"):
        convert_resunet(separator)
    with pytest.raises(UserError, match=r"^1 of the tensors .* base\.bn0\.weight is missing$"):
        convert_resunet(separator, SEPARATOR_FIELDS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernels_in_half_precision_are_taken_and_other_windows_are_not(dtype):
    state_dict = state_dict_of("query", TAGGER_FIELDS, tagger_variables())
    name = "spectrogram_extractor.stft.conv_real.weight"
    kernel = fixed_buffer((513, 1, 1024), "stft_real")
    state_dict[name] = kernel.astype(jnp.dtype(dtype)).astype(np.float32)
    assert convert_cnn14(state_dict).fields == TAGGER_FIELDS
    periodic, symmetric = (np.hanning(1025)[:-1], np.hanning(1024))
    other = kernel * (symmetric / np.maximum(periodic, 1e-9))
    state_dict[name] = other.astype(jnp.dtype(dtype)).astype(np.float32)
    with pytest.raises(UserError, match="does not match a periodic Hann window"):
        convert_cnn14(state_dict)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full(527, np.nan, np.float32), "fc_audioset.bias holds NaN or infinite values"),
        (np.zeros(527, np.int64), "fc_audioset.bias holds int64 instead of floats"),
        (np.zeros((), np.float32), "fc_audioset.bias has shape ()"),
    ],
)
def test_arrays_that_are_no_parameters_are_refused(array, said):
    state_dict = state_dict_of("query", TAGGER_FIELDS, tagger_variables())
    with pytest.raises(UserError) as error:
        convert_cnn14({**state_dict, "fc_audioset.bias": array}, TAGGER_FIELDS)
    assert said in str(error.value)


def test_doubles_become_floats():
    state_dict = state_dict_of("query", TAGGER_FIELDS, tagger_variables())
    doubles = {name: array.astype(np.float64) for name, array in state_dict.items()}
    assert_same_tree(convert_cnn14(doubles).variables, convert_cnn14(state_dict).variables)
    for leaf in jax.tree.leaves(convert_cnn14(doubles).variables):
        assert leaf.dtype == np.float32
