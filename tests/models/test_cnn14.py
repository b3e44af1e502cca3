import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import relative_error, statistics_error, stored
from tests.golden.inputs import make_batch
from tests.golden.nets import golden_tagger
from tests.golden.ways import limit
from tests.tiny import RATE, TAGGER, quick_jit, tagger_variables
from uss_jax.bundles.nets import build_sed, fields_of
from uss_jax.models.cnn14 import repeat_to_frames

OUTPUTS = {
    "cnn14": {"clipwise": "clipwise_output", "embedding": "embedding"},
    "cnn14_decision_level_max": {"clipwise": "clipwise_output", "framewise": "framewise_output"},
}


@pytest.mark.golden
@pytest.mark.long
@pytest.mark.parametrize("samples", [64000, 320000])
@pytest.mark.parametrize("layout", OUTPUTS)
def test_golden_outputs_and_blocks(golden, layout, samples):
    net, variables = golden_tagger(layout)

    @jax.jit
    def run(variables, waveform):
        blocks = lambda module, _: module.name and module.name.startswith(("bn0", "conv_block"))  # noqa: E731
        return net.apply(variables, waveform, capture_intermediates=blocks)

    output, captured = run(variables, make_batch(f"dev/{layout}/{samples}", 3, samples))
    captured = {name: maps["__call__"][0] for name, maps in captured["intermediates"].items()}
    with np.load(golden / f"{layout}.npz") as fixture:
        for name, key in OUTPUTS[layout].items():
            key = f"b3n{samples}/{key}"
            assert relative_error(fixture, key, output[name]) < limit("tags", 1e-4)
            values, atol = stored(fixture, key, output[name]), limit("tags, absolute", 1e-4)
            np.testing.assert_allclose(values, fixture[key], rtol=0, atol=atol)
        if "framewise" in output:
            some = output["framewise"][:, :, fixture["framewise_classes"]]
            key = f"b3n{samples}/framewise_classes_output"
            assert relative_error(fixture, key, some) < limit("tags", 1e-4)

        maps = {"bn0": captured["bn0"][:, :, None]}  # the reference's channels are mel bands
        for i in range(1, 7):
            x = captured[f"conv_block{i}"]
            maps[f"conv_block{i}"] = nn.avg_pool(x, (2, 2), (2, 2)) if i < 6 else x
        for name, x in maps.items():
            error = statistics_error(fixture, f"b3n{samples}/{name}", x)
            assert error < limit("statistics of maps", 1e-5), name


@pytest.fixture(scope="module")
def tiny():
    """A detector, its variables, which are a tagger's too, and a second of noise."""
    net = build_sed(fields_of(TAGGER))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(jnp.asarray, tagger_variables())
    return net, variables, jnp.asarray(0.1 * rng.standard_normal((2, RATE)), jnp.float32)


def test_detector_and_tagger_share_parameters_and_embedding(tiny):
    net, variables, waveform = tiny
    tags = quick_jit(TAGGER.apply)(variables, waveform)
    detected = quick_jit(net.apply)(variables, waveform)
    np.testing.assert_array_equal(detected["embedding"], tags["embedding"])
    np.testing.assert_array_equal(detected["tagging"], tags["clipwise"])
    np.testing.assert_array_equal(detected["clipwise"], detected["framewise"].max(axis=1))
    assert detected["framewise"].shape == (2, RATE // net.hop_samples + 1, net.classes)


def test_repeats_segments_to_frames_and_the_last_one_on():
    segmentwise = jnp.arange(3.0)[None, :, None]
    repeat = lambda frames: repeat_to_frames(segmentwise, 4, frames)[0, :, 0].tolist()  # noqa: E731
    assert repeat(12) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert repeat(15) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert repeat(10) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_items_do_not_see_each_other_in_evaluation(tiny):
    net, variables, waveform = tiny
    both = quick_jit(net.apply)(variables, waveform)
    alone = quick_jit(net.apply)(variables, waveform[1:])
    for name in both:
        np.testing.assert_allclose(both[name][1:], alone[name], rtol=1e-5, atol=1e-6)


def test_training_drops_out_by_its_key_and_updates_every_statistic(tiny):
    net, variables, waveform = tiny

    @quick_jit
    def train(variables, key):
        return net.apply(
            variables, waveform, train=True, rngs={"augment": key}, mutable=["batch_stats"]
        )

    (first, stats), (again, _), (other, _) = (
        train(variables, jax.random.key(k, impl="rbg")) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first["tagging"], again["tagging"])
    assert np.abs(first["tagging"] - other["tagging"]).max() > 1e-3
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), stats, {"batch_stats": variables["batch_stats"]}
    )
    assert all(jax.tree.leaves(changed))


def test_bfloat16_inside_keeps_outputs_float32_and_close(tiny):
    net, variables, waveform = tiny
    exact = quick_jit(net.apply)(variables, waveform)
    rough = quick_jit(net.clone(dtype="bfloat16").apply)(variables, waveform)
    for name in exact:
        assert rough[name].dtype == jnp.float32
        # Eight bits of mantissa through six convolutions.
        np.testing.assert_allclose(rough[name], exact[name], rtol=0.05, atol=0.02)
    assert np.abs(rough["embedding"] - exact["embedding"]).max() > 0


def test_augmentation_sees_the_normalised_log_mel(tiny):
    net, variables, waveform = tiny
    silence = quick_jit(lambda *arrays: net.apply(*arrays, augment=jnp.zeros_like))
    silenced = silence(variables, waveform)
    np.testing.assert_allclose(silenced["clipwise"][0], silenced["clipwise"][1], rtol=1e-6)
    assert (
        np.abs(silenced["clipwise"] - quick_jit(net.apply)(variables, waveform)["clipwise"]).max()
        > 1e-3
    )
