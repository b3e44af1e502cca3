import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.golden.weights import build_state_dict, fixed_buffer, layout_tensors, make_tensor
from tests.weights.variables import all_random, assert_same_tree, empty_arrays, leaf_count, shapes
from uss_jax.errors import UserError
from uss_jax.models.htsat import HTSAT
from uss_jax.weights.htsat import HTSAT_PREFIX, convert_htsat
from uss_jax.weights.torch import state_dict_of

FIELDS = dict(
    sample_rate=32000,
    n_fft=1024,
    hop_samples=320,
    mel_bins=64,
    f_min=50.0,
    f_max=14000.0,
    image_size=256,
    token_width=8,
    depths=(2, 1, 3),
    heads=(2, 4, 8),
    classes=527,
)


def htsat_variables(fields=FIELDS, seed=0):
    return all_random(HTSAT(**fields), (1, 32000), seed=seed)


def state_dict(fields=FIELDS, seed=0):
    section = {"net": "htsat", **fields}
    return state_dict_of("query", section, htsat_variables(fields, seed), HTSAT_PREFIX)


@pytest.mark.parametrize(
    ("layout", "fields"), [("htsat", {}), ("htsat_2048d", {"token_width": 256})]
)
def test_published_net_fills_every_leaf(layout, fields):
    rows = layout_tensors(layout)
    converted = convert_htsat(empty_arrays(rows))
    assert converted.build() == HTSAT(**fields)
    second = jax.ShapeDtypeStruct((1, 32000), np.float32)
    expected = jax.eval_shape(converted.build().init, jax.random.key(0), second)
    assert shapes(converted.variables) == shapes(expected)
    assert leaf_count(expected) == 175 + 2
    assert len(converted.foreign) + leaf_count(expected) == len(rows)


@pytest.mark.parametrize(
    ("torch_name", "path", "axes"),
    [
        ("bn0.running_var", "batch_stats/bn0/var", "i->i"),
        ("patch_embed.proj.weight", "params/patch_embedding/kernel", "oihw->hwio"),
        ("patch_embed.norm.bias", "params/patch_embedding/norm/bias", "i->i"),
        ("layers.0.blocks.1.norm2.weight", "params/stage1/block2/norm2/scale", "i->i"),
        (
            "layers.2.blocks.5.attn.relative_position_bias_table",
            "params/stage3/block6/attention/relative_position_bias",
            "ph->ph",
        ),
        (
            "layers.3.blocks.0.attn.qkv.weight",
            "params/stage4/block1/attention/qkv/kernel",
            "oi->io",
        ),
        (
            "layers.1.blocks.0.attn.proj.bias",
            "params/stage2/block1/attention/projection/bias",
            "i->i",
        ),
        ("layers.1.blocks.1.mlp.fc2.weight", "params/stage2/block2/fc2/kernel", "oi->io"),
        ("layers.2.downsample.norm.weight", "params/stage3/merge_norm/scale", "i->i"),
        ("layers.0.downsample.reduction.weight", "params/stage1/merge/kernel", "oi->io"),
        ("norm.weight", "params/norm/scale", "i->i"),
        ("tscam_conv.weight", "params/token_semantic/kernel", "oihw->hwio"),
    ],
)
def test_tensors_go_where_they_belong(golden_htsat, torch_name, path, axes):
    row = next(t for t in layout_tensors("htsat") if t["source_name"] == torch_name)
    tensor = make_tensor(torch_name, row["shape"], row["kind"], model=row["model"])
    leaf = flatten_dict(golden_htsat[1].variables, sep="/")[path]
    np.testing.assert_array_equal(leaf, np.einsum(axes, tensor))


@pytest.fixture(scope="module")
def golden_htsat():
    tensors = build_state_dict("htsat")
    return tensors, convert_htsat(tensors)


def test_golden_checkpoint_goes_in_and_back_bit_by_bit(golden_htsat):
    tensors, converted = golden_htsat
    section = {"net": "htsat", **converted.fields}
    back = state_dict_of("sed", section, converted.variables, HTSAT_PREFIX)
    assert not back.keys() & converted.foreign.keys()
    back |= converted.foreign
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("prefix", [HTSAT_PREFIX, ""])
def test_net_of_another_shape_goes_out_and_back_unchanged(prefix):
    tensors = {prefix + name.removeprefix(HTSAT_PREFIX): t for name, t in state_dict().items()}
    converted = convert_htsat(tensors)
    assert converted.fields == FIELDS
    assert converted.foreign == {}
    assert_same_tree(converted.variables, htsat_variables())


def test_error_lists_all_that_does_not_fit():
    tensors = state_dict()
    tensors.pop(f"{HTSAT_PREFIX}norm.bias")
    tensors[f"{HTSAT_PREFIX}layers.0.blocks.0.mlp.fc1.weight"] = np.zeros((7, 8), np.float32)
    tensors[f"{HTSAT_PREFIX}absolute_pos_embed"] = np.zeros((1, 4096, 8), np.float32)
    tensors["other.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        convert_htsat(tensors)
    text = str(error.value)
    assert text.startswith("4 of the tensors do not fit")
    assert "sed_model.norm.bias is missing" in text
    assert "sed_model.layers.0.blocks.0.mlp.fc1.weight has shape (7, 8) instead of (32, 8)" in text
    assert "sed_model.absolute_pos_embed is unexpected" in text
    assert "other.weight is unexpected" in text


def test_tensors_of_something_else_are_refused():
    with pytest.raises(UserError, match="is missing"):
        convert_htsat({"layer.weight": np.zeros((3, 3), np.float32)})


def test_widths_that_make_no_net_are_refused():
    tensors = state_dict()
    name = f"{HTSAT_PREFIX}layers.0.blocks.0.attn.relative_position_bias_table"
    tensors[name] = np.zeros((225, 3), np.float32)
    with pytest.raises(UserError, match="8 channels, not a multiple of 3 heads"):
        convert_htsat(tensors)


def test_kernels_of_another_window_are_refused():
    name = f"{HTSAT_PREFIX}spectrogram_extractor.stft.conv_real.weight"
    tensors = {**state_dict(), name: np.sqrt(np.abs(fixed_buffer((513, 1, 1024), "stft_real")))}
    with pytest.raises(UserError, match=f"{name} does not match a periodic Hann window"):
        convert_htsat(tensors)
