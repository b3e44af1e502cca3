"""The recipe of HTS-AT's weights gives the very bits that the reference numbers were made with."""

import zlib

import numpy as np
import pytest

from tests.golden.inputs import make_signal
from tests.golden.weights import layout_tensors, make_tensor


@pytest.mark.parametrize(
    ("name", "crc"),
    [
        ("sed_model.layers.2.blocks.1.attn.qkv.weight", 0x6DB99C87),
        ("sed_model.layers.0.blocks.1.attn.relative_position_bias_table", 0x4973F962),
        ("sed_model.layers.0.blocks.0.attn.relative_position_index", 0xFA5380F6),
        ("sed_model.layers.0.blocks.1.attn_mask", 0xE48F4E2C),
        ("sed_model.tscam_conv.weight", 0x20C94BDA),
    ],
)
def test_tensors_are_bit_identical(name, crc):
    row = next(t for t in layout_tensors("htsat") if t["name"] == name)
    tensor = make_tensor(row["source_name"], row["shape"], row["kind"], model=row["model"])
    assert str(tensor.dtype) == row["dtype"]
    assert zlib.crc32(tensor.tobytes()) == crc


@pytest.mark.parametrize(("layout", "values"), [("htsat", 31325143), ("htsat_2048d", 203091063)])
def test_layouts_have_the_sizes_of_the_published_checkpoints(layout, values):
    rows = layout_tensors(layout)
    assert len(rows) == 200
    buffers = ("running_mean", "running_var", "num_batches_tracked", "_index", "attn_mask")
    parameters = [t["shape"] for t in rows if not t["name"].endswith(buffers)]
    assert sum(int(np.prod(shape)) for shape in parameters) == values


def test_inputs_are_those_of_the_reference_run(golden):
    with np.load(golden / "htsat.npz") as fixture:
        signal = make_signal("dev/htsat/exact1024/0", 327500).astype(np.float64)
        np.testing.assert_allclose(  # sums in another order
            (signal**2).sum(), fixture["exact1024/input_sumsq"][0], rtol=1e-12
        )
