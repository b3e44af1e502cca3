import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.golden.weights import build_state_dict, fixed_buffer, layout_tensors, make_tensor
from uss_jax.errors import UserError
from uss_jax.models.cnn14 import Cnn14, Cnn14DecisionLevelMax
from uss_jax.models.resunet import ResUNet
from uss_jax.weights.torch import (
    LIGHTNING_PREFIXES,
    convert_cnn14,
    convert_lightning,
    convert_resunet,
    state_dict_of,
)

TAGGER_FIELDS = dict(
    sample_rate=32000,
    n_fft=1024,
    hop_samples=320,
    mel_bins=8,
    f_min=50.0,
    f_max=14000.0,
    channels=(4, 6),
    classes=527,
)
SEPARATOR_FIELDS = dict(
    n_fft=64,
    hop_samples=320,
    channels=(4, 6, 6),
    blocks_per_level=2,
    audio_channels=2,
    condition_width=527,
)


def random_variables(module, *shapes, seed=0):
    """Variables of a module with random numbers everywhere."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), tree)


def tagger_variables(fields=TAGGER_FIELDS, seed=0):
    return random_variables(Cnn14(**fields), (1, 3200), seed=seed)


def separator_variables(fields=SEPARATOR_FIELDS, seed=0):
    shapes = (1, fields["audio_channels"], 640), (1, fields["condition_width"])
    return random_variables(ResUNet(**fields), *shapes, seed=seed)


@pytest.fixture
def separator():
    return state_dict_of("separator", SEPARATOR_FIELDS, separator_variables())


@pytest.fixture
def lightning():
    return {
        **state_dict_of("separator", SEPARATOR_FIELDS, separator_variables(), "ss_model."),
        **state_dict_of("sed", TAGGER_FIELDS, tagger_variables(seed=1), LIGHTNING_PREFIXES["sed"]),
        "anchor_segment_detector.anchor_segment_scorer.smooth_filter": np.ones((1, 1, 201)) / 201,
        **state_dict_of(
            "query", TAGGER_FIELDS, tagger_variables(seed=2), LIGHTNING_PREFIXES["query"]
        ),
    }


def assert_same_tree(actual, expected):
    actual, expected = (flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


@pytest.mark.parametrize("module", [Cnn14, Cnn14DecisionLevelMax])
@pytest.mark.parametrize("layout", ["cnn14", "cnn14_decision_level_max"])
def test_golden_tagger_fills_every_leaf(layout, module):
    rows = layout_tensors(layout)
    converted = convert_cnn14(empty_arrays(rows))
    module = module(**converted.fields)
    assert module == type(module)()
    expected = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32000)))
    assert shapes(converted.variables) == shapes(expected)
    assert len(converted.foreign) + leaf_count(expected) == len(rows)


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("resunet30_cond527", {}),
        ("resunet30_cond2048", {"condition_width": 2048}),
        ("resunet30_cond527_stereo", {"audio_channels": 2}),
    ],
)
def test_golden_separator_fills_every_leaf(layout, fields):
    rows = layout_tensors(layout)
    converted = convert_resunet(empty_arrays(rows))
    module = ResUNet(**converted.fields)
    assert module == ResUNet(**fields)
    inputs = jnp.zeros((1, module.audio_channels, 4096)), jnp.zeros((1, module.condition_width))
    expected = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    assert shapes(converted.variables) == shapes(expected)
    assert len(converted.foreign) + leaf_count(expected) == len(rows)


def empty_arrays(rows):
    """Arrays of the right shapes: formulas are real, all else is zero."""
    formulas = ("stft.conv_real.weight", "melW")
    return {
        row["name"]: fixed_buffer(tuple(row["shape"]), *row["kind"].split(":"))
        if row["name"].endswith(formulas) and "istft" not in row["name"]
        else np.zeros(row["shape"], row["dtype"])
        for row in rows
    }


def shapes(tree):
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}


def leaf_count(tree):
    return len(jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("torch_name", "path", "axes"),
    [
        ("base.bn0.running_var", "batch_stats/bn0/var", "i->i"),
        ("base.pre_conv.bias", "params/pre_conv/bias", "i->i"),
        (
            "base.encoder_block2.conv_block1.conv1.weight",
            "params/encoder_block2/conv_block1/conv1/kernel",
            "oihw->hwio",
        ),
        (
            "base.decoder_block5.conv1.weight",
            "params/decoder_block5/up/kernel",
            "iohw->hwoi",
        ),
        ("base.decoder_block5.bn1.weight", "params/decoder_block5/bn/scale", "i->i"),
        (
            "base.decoder_block5.conv_block2.shortcut.weight",
            "params/decoder_block5/conv_block1/shortcut/kernel",
            "oihw->hwio",
        ),
        (
            "base.conv_block7a.conv_block1.bn2.running_mean",
            "batch_stats/centre_block/conv_block1/bn2/mean",
            "i->i",
        ),
        (
            "film.conv_block7a->conv_block1->beta2.weight",
            "params/centre_block/conv_block1/film2/shift/kernel",
            "od->do",
        ),
        ("film.decoder_block3->beta1.bias", "params/decoder_block3/film/shift/bias", "i->i"),
        (
            "film.decoder_block3->conv_block2->beta1.weight",
            "params/decoder_block3/conv_block1/film1/shift/kernel",
            "od->do",
        ),
    ],
)
def test_tensors_of_the_separator_go_where_they_belong(golden_separator, torch_name, path, axes):
    row = next(t for t in layout_tensors("resunet30_cond527") if t["name"] == torch_name)
    tensor = make_tensor(row["source_name"], row["shape"], row["kind"], model=row["model"])
    leaf = flatten_dict(golden_separator.variables, sep="/")[path]
    np.testing.assert_array_equal(leaf, np.einsum(axes, tensor))


@pytest.fixture(scope="module")
def golden_separator():
    return convert_resunet(build_state_dict("resunet30_cond527"))


def test_foreign_tensors_of_the_separator_are_those_without_use(golden_separator):
    assert {re.sub(r"\d+", "N", name) for name in golden_separator.foreign} >= {
        "base.stft.conv_real.weight",
        "base.istft.ola_window",
        "base.bnN.num_batches_tracked",
        "base.decoder_blockN.bnN.weight",
        "base.decoder_blockN.bnN.running_mean",
        "film.decoder_blockN->betaN.weight",
    }
    used = ("bn1.weight", "beta1.weight", "conv1.weight")
    assert not [name for name in golden_separator.foreign if name.endswith(used)]


def test_separator_of_another_shape_goes_out_and_back_unchanged(separator):
    converted = convert_resunet(separator)
    assert converted.fields == SEPARATOR_FIELDS
    assert converted.foreign == {}
    assert_same_tree(converted.variables, separator_variables())


def test_tagger_of_another_shape_goes_out_and_back_unchanged():
    converted = convert_cnn14(state_dict_of("query", TAGGER_FIELDS, tagger_variables()))
    assert converted.fields == TAGGER_FIELDS
    assert_same_tree(converted.variables, tagger_variables())


def test_whole_checkpoint_goes_in_and_back_with_all_its_tensors(lightning):
    lightning["ss_model.base.bn0.num_batches_tracked"] = np.array(7)
    lightning["query_net.base.conv_block1.bn1.num_batches_tracked"] = np.array(8)
    parts = convert_lightning(lightning)
    assert_same_tree(parts["sed"].variables, tagger_variables(seed=1))
    assert_same_tree(parts["query"].variables, tagger_variables(seed=2))
    back = {}
    for part, converted in parts.items():
        prefix = LIGHTNING_PREFIXES[part]
        back |= state_dict_of(part, converted.fields, converted.variables, prefix)
        back |= converted.foreign
    assert back.keys() == lightning.keys()
    for name, tensor in lightning.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name, strict=True)


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


def test_error_of_a_whole_checkpoint_names_tensors_in_full(lightning):
    lightning.pop("query_net.base.fc1.bias")
    lightning["anchor_segment_detector.sed_model.fc1.bias"] = np.zeros(7, np.float32)
    lightning["loss_weights"] = np.zeros(1, np.float32)
    with pytest.raises(UserError) as error:
        convert_lightning(lightning)
    text = str(error.value)
    assert "query_net.base.fc1.bias is missing" in text
    assert "anchor_segment_detector.sed_model.fc1.bias has shape (7,) instead of (6,)" in text
    assert "loss_weights is unexpected" in text


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


def test_checkpoint_without_tagging_nets_gives_a_separator_alone(lightning):
    only = {name: t for name, t in lightning.items() if name.startswith("ss_model.")}
    assert convert_lightning(only).keys() == {"separator"}


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


def test_front_end_of_unknown_sample_rate_is_refused():
    state_dict = state_dict_of("query", TAGGER_FIELDS, tagger_variables())
    state_dict["spectrogram_extractor.stft.conv_real.weight"] = np.zeros((401, 1, 800), np.float32)
    with pytest.raises(UserError, match="STFT of 800 samples"):
        convert_cnn14(state_dict)


def test_net_that_torch_has_no_names_for_is_not_written():
    fields = dict(SEPARATOR_FIELDS, film_gain=True)
    with pytest.raises(UserError, match=r"no tensor for .*film1/gain/kernel"):
        state_dict_of("separator", fields, separator_variables(fields))
