import os

import ml_dtypes
import numpy as np
import pytest

from tests.weights.variables import (
    SEPARATOR_FIELDS,
    TAGGER_FIELDS,
    assert_same_tree,
    separator_variables,
    tagger_variables,
)
from uss_jax.errors import UserError
from uss_jax.weights.lightning import LIGHTNING_PREFIXES, convert_lightning, write_lightning
from uss_jax.weights.torch import state_dict_of


def test_arrays_in_bfloat16_are_written_into_a_new_folder_in_float32(tmp_path):
    torch = pytest.importorskip("torch")
    half = np.array([1.5, 3e38], ml_dtypes.bfloat16)
    write_lightning(tmp_path / "new" / "a.ckpt", {"x": half, "n": np.array(3)})
    found = torch.load(tmp_path / "new" / "a.ckpt", weights_only=True)["state_dict"]
    assert found["x"].dtype == torch.float32
    np.testing.assert_array_equal(found["x"].numpy(), half.astype(np.float32))
    assert found["n"] == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_said(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, _: save(content, "/dev/full"))
    with pytest.raises(UserError, match=r"a\.ckpt cannot be written, perhaps the disk is full"):
        write_lightning(tmp_path / "a.ckpt", {"x": np.ones(100_000, np.float32)})
    assert list(tmp_path.iterdir()) == []


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


def test_checkpoint_without_tagging_nets_gives_a_separator_alone(lightning):
    only = {name: t for name, t in lightning.items() if name.startswith("ss_model.")}
    assert convert_lightning(only).keys() == {"separator"}
