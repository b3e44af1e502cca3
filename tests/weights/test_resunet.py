import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.golden.weights import build_state_dict, layout_tensors, make_tensor
from tests.weights.variables import (
    SEPARATOR_FIELDS,
    assert_same_tree,
    empty_arrays,
    leaf_count,
    separator_variables,
    shapes,
)
from uss_jax.errors import UserError
from uss_jax.models.resunet import ResUNet
from uss_jax.weights.resunet import convert_resunet
from uss_jax.weights.torch import state_dict_of


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


def test_separator_of_another_shape_goes_out_and_back_unchanged():
    separator = state_dict_of("separator", SEPARATOR_FIELDS, separator_variables())
    converted = convert_resunet(separator)
    assert converted.fields == SEPARATOR_FIELDS
    assert converted.foreign == {}
    assert_same_tree(converted.variables, separator_variables())


def test_a_separator_of_another_transform_is_refused():
    """No tensor tells its hop and its rate."""
    fields = dict(SEPARATOR_FIELDS, n_fft=1024)
    separator = state_dict_of("separator", fields, separator_variables(fields))
    with pytest.raises(UserError, match=r"an STFT of 1024 samples, whose hop is unknown; .* 2048"):
        convert_resunet(separator)
