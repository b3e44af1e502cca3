"""The nets that the benchmark calls PyTorch compute what the original computes."""

import numpy as np
import pytest

from tests.golden.compare import relative_error
from tests.golden.inputs import make_batch
from tests.golden.weights import build_state_dict

torch = pytest.importorskip("torch")

# README's aim for outputs: a hundred times the rounding noise of the reference.
TOLERANCE = 1e-4


@pytest.mark.long
def test_cnn14_equals_the_reference(golden):
    from tests.benchmarks.torch_nets import Cnn14, load

    net = load(Cnn14(), build_state_dict("cnn14"))
    with np.load(golden / "cnn14.npz") as fixture, torch.inference_mode():
        waveform = make_batch("dev/cnn14/64000", 3, 64000)
        clipwise, embedding = net(torch.from_numpy(waveform))
        assert relative_error(fixture, "b3n64000/clipwise_output", clipwise.numpy()) < TOLERANCE
        assert relative_error(fixture, "b3n64000/embedding", embedding.numpy()) < TOLERANCE


@pytest.mark.long
def test_cnn14_decision_level_max_equals_the_reference(golden):
    from tests.benchmarks.torch_nets import Cnn14DecisionLevelMax, load

    net = load(Cnn14DecisionLevelMax(), build_state_dict("cnn14_decision_level_max"))
    with np.load(golden / "cnn14_decision_level_max.npz") as fixture, torch.inference_mode():
        waveform = make_batch("dev/cnn14_decision_level_max/64000", 3, 64000)
        clipwise, _ = net(torch.from_numpy(waveform))
        assert relative_error(fixture, "b3n64000/clipwise_output", clipwise.numpy()) < TOLERANCE


@pytest.mark.long
def test_htsat_equals_the_reference(golden):
    from tests.benchmarks.torch_htsat import HTSAT
    from tests.benchmarks.torch_nets import load

    tensors = build_state_dict("htsat")
    net = load(HTSAT(), {name.removeprefix("sed_model."): x for name, x in tensors.items()})
    with np.load(golden / "htsat.npz") as fixture, torch.inference_mode():
        waveform = make_batch("dev/htsat/exact1024", 1, 327500)
        clipwise, embedding = net(torch.from_numpy(waveform))
        for name, found in (("clipwise_output", clipwise), ("latent_output", embedding)):
            assert relative_error(fixture, f"exact1024/{name}", found.numpy()) < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize(
    ("tag", "layout", "shape"),
    [
        ("mono_cond527", "resunet30_cond527", (2, 1, 64000)),
        ("stereo_cond527", "resunet30_cond527_stereo", (1, 2, 64000)),
        ("odd_cond527", "resunet30_cond527", (1, 1, 63999)),
    ],
)
def test_resunet30_equals_the_reference(golden, tag, layout, shape):
    from tests.benchmarks.torch_nets import ResUNet30, load

    b, channels, samples = shape
    net = load(ResUNet30(channels), build_state_dict(layout))
    mixture = make_batch(f"dev/resunet/{tag}", b * channels, samples).reshape(shape)
    with np.load(golden / "resunet30_eval.npz") as fixture, torch.inference_mode():
        condition = torch.from_numpy(fixture[f"{tag}/condition"])
        estimate = net(torch.from_numpy(mixture), condition)
        assert relative_error(fixture, f"{tag}/waveform", estimate.numpy()) < TOLERANCE
