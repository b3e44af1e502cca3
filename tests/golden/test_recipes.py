"""The recipes give the very bits that the reference numbers were made with."""

import hashlib
import json
import zlib

import numpy as np
import pytest

from tests.golden.compare import relative_error
from tests.golden.inputs import make_batch, make_signal, query_signal
from tests.golden.weights import build_state_dict, layout_tensors, make_tensor


@pytest.mark.parametrize(
    ("layout", "name", "crc"),
    [
        ("resunet30_cond527", "base.encoder_block1.conv_block1.conv1.weight", 0xEEF01ADD),
        ("resunet30_cond2048", "film.decoder_block6->beta1.weight", 0xA951CB99),
        ("resunet30_cond527", "base.decoder_block5.conv1.weight", 0x1FF01267),
        ("cnn14", "conv_block1.conv2.weight", 0xB0627F24),
        ("cnn14", "bn0.running_mean", 0xCE7B06E7),
        ("lit_separation_cond527", "query_net.base.fc_audioset.bias", 0x7229CD5F),
        (
            "lit_separation_cond527",
            "anchor_segment_detector.anchor_segment_scorer.smooth_filter",
            0x4935DAFA,
        ),
    ],
)
def test_random_tensors_are_bit_identical(layout, name, crc):
    row = next(t for t in layout_tensors(layout) if t["name"] == name)
    tensor = make_tensor(row["source_name"], row["shape"], row["kind"], model=row["model"])
    assert zlib.crc32(tensor.tobytes()) == crc


def test_checksum_of_the_published_recipe():
    row = next(
        t
        for t in layout_tensors("resunet30_cond527")
        if t["name"] == "base.encoder_block1.conv_block1.conv1.weight"
    )
    tensor = make_tensor(row["source_name"], row["shape"], row["kind"], model=row["model"])
    assert tensor.astype(np.float64).sum() == pytest.approx(-4.997262174, abs=1e-8)


@pytest.mark.parametrize(
    ("layout", "tensors", "values"),
    [
        ("cnn14", 84, 81_837_071),
        ("cnn14_decision_level_max", 84, 81_837_071),
        ("lit_separation_cond527", 501, 202_856_931),
        ("lit_separation_cond2048", 501, 217_847_907),
    ],
)
def test_layouts_have_the_sizes_of_the_published_checkpoints(layout, tensors, values):
    rows = layout_tensors(layout)
    assert len(rows) == tensors
    buffers = ("running_mean", "running_var", "num_batches_tracked", "ola_window", "smooth_filter")
    parameters = [t["shape"] for t in rows if not t["name"].endswith(buffers)]
    assert sum(int(np.prod(shape)) for shape in parameters) == values


def test_without_fixed_buffers_only_formulas_are_left_out():
    # The stereo separator is the smallest layout with all kinds of kernels.
    names = [t["name"] for t in layout_tensors("resunet30_cond527_stereo")]
    kept = list(build_state_dict("resunet30_cond527_stereo", fixed=False))
    assert set(names) - set(kept) == {
        "base.stft.conv_real.weight",
        "base.stft.conv_imag.weight",
        "base.istft.ola_window",
        "base.istft.conv_real.weight",
        "base.istft.conv_imag.weight",
    }


def test_signals_are_bit_identical():
    signals = [
        make_signal("dev/frontend/64000", 64000),
        make_batch("dev/cnn14/64000", 2, 64000),
        query_signal("query", 9000, (100, 3000)),
    ]
    digest = hashlib.sha256(b"".join(s.tobytes() for s in signals)).hexdigest()
    assert digest == "2d3e089a79616061a29ea77caaf24ae44df9fd8603fcc50db47fa27e8a9d15e6"


def test_inputs_are_those_of_the_reference_run(golden):
    with np.load(golden / "cnn14.npz") as fixture:
        batch = make_batch("dev/cnn14/64000", 3, 64000).astype(np.float64)
        np.testing.assert_allclose(  # sums in another order
            (batch**2).sum(axis=1), fixture["b3n64000/input_sumsq"], rtol=1e-12
        )


def test_every_stored_file_is_plain_and_whole(golden):
    for path in golden.glob("*.npz"):
        with np.load(path, allow_pickle=False) as fixture:
            for key in fixture.files:
                if key.endswith("@stride"):
                    shape = fixture[key.replace("@stride", "@shape")]
                    stored = fixture[key.removesuffix("@stride")]
                    assert stored.size == -(-int(np.prod(shape)) // int(fixture[key]))
    for path in golden.glob("*.json"):
        json.loads(path.read_text())


def test_relative_error_thins_the_actual_tensor_as_the_reference_was():
    whole = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    fixture = {"x": whole.ravel()[::5], "x@shape": np.array([3, 4]), "x@stride": np.array(5)}
    assert relative_error(fixture, "x", whole) == 0
    assert relative_error(fixture, "x", 1.5 * whole) == pytest.approx(0.5)
    with pytest.raises(AssertionError):
        relative_error(fixture, "x", whole.T)
