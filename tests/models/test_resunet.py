import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import GOLDEN
from tests.golden.compare import distance, relative_error, statistics_error
from tests.golden.inputs import make_batch
from tests.golden.nets import golden_separator
from tests.golden.ways import limit
from tests.tiny import quick_jit, random_variables
from uss_jax.devices.mesh import batch_sharded, make_mesh
from uss_jax.models.resunet import ResUNet
from uss_jax.training.state import parameter_count

RUNS = {run["tag"]: run for run in json.loads((GOLDEN / "resunet30_eval.json").read_text())}


def is_block(module, method):
    """Whether the reference tells statistics of this module's output."""
    name = module.name or ""
    return method == "__call__" and (
        name in ("bn0", "pre_conv", "centre_block", "after_conv")
        or name.startswith(("encoder_block", "decoder_block"))
    )


def maps_by_reference_name(captured):
    """The reference's names of the captured maps, each [batch, time, frequency, channels]."""
    for name, output in captured.items():
        x = output["__call__"][0]
        if name == "bn0":
            yield name, jnp.moveaxis(x, 1, 2)  # the reference's channels are bins
        elif name.startswith("encoder_block"):
            stride = (1, 2) if name == "encoder_block6" else (2, 2)
            yield f"{name}/skip", x
            yield f"{name}/pooled", nn.avg_pool(x, stride, stride)
        elif name == "centre_block":
            yield "conv_block7a/skip", x
        else:
            yield name, x


@pytest.fixture
def every_frame(monkeypatch):
    """Padding is computed through to the end, as the reference does."""
    monkeypatch.setattr(ResUNet, "_frames_needed", lambda self, frames, strides: [10**6] * 6)


@pytest.mark.golden
@pytest.mark.long
@pytest.mark.parametrize("tag", RUNS)
def test_golden_waveform_and_blocks(golden, tag, every_frame):
    shape = tuple(RUNS[tag][name] for name in ("batch", "channels", "samples"))
    net, variables = golden_separator(RUNS[tag]["layout"])
    # One run has a shorter seed than the others.
    seed = "broadcast" if tag == "broadcast_cond527" else tag
    mixture = make_batch(f"dev/resunet/{seed}", shape[0] * shape[1], shape[2]).reshape(shape)
    with np.load(golden / "resunet30_eval.npz") as fixture:
        run = jax.jit(lambda *arrays: net.apply(*arrays, capture_intermediates=is_block))
        estimate, captured = run(variables, mixture, fixture[f"{tag}/condition"])
        assert relative_error(fixture, f"{tag}/waveform", estimate) < limit("waveform", 1e-4)
        if f"{tag}/bn0/shape" not in fixture:  # the broadcast condition: its waveform alone
            return
        maps = dict(maps_by_reference_name(captured["intermediates"]))
        assert len(maps) == 1 + 1 + 12 + 1 + 6 + 1
        for name, x in maps.items():
            error = statistics_error(fixture, f"{tag}/{name}", x)
            assert error < limit("statistics of maps", 1e-5), name
        sample = jnp.moveaxis(maps["after_conv"], -1, 1)
        error = relative_error(fixture, f"{tag}/after_conv_sample", sample)
        assert error < limit("waveform", 1e-4)


@pytest.mark.parametrize(("width", "millions"), [(527, 25.7), (2048, 38.3)])
def test_published_net_has_its_size(width, millions):
    net = ResUNet(condition_width=width)
    inputs = jnp.zeros((1, 1, 20480)), jnp.zeros((1, width))
    variables = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    assert round(parameter_count(variables["params"]) / 1e6, 1) == millions


def tiny_net(**fields):
    return ResUNet(
        **dict(dict(n_fft=64, hop_samples=10, channels=(4, 6), condition_width=5), **fields)
    )


def tiny_case(samples=331, batch=2, **fields):
    """A small net, its variables, a mixture of noises and conditions."""
    net = tiny_net(**fields)
    shapes = (batch, net.audio_channels, samples), (batch, net.condition_width)
    variables = jax.tree.map(jnp.asarray, random_variables(net, *shapes))
    rng = np.random.default_rng(1)
    return net, variables, *(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)


@functools.partial(quick_jit, static_argnums=0)
def separate(net, variables, mixture, condition):
    return net.apply(variables, mixture, condition)


def training_loss(net, variables, mixture, condition):
    """A loss in training mode."""
    estimate, _ = net.apply(variables, mixture, condition, train=True, mutable=["batch_stats"])
    return jnp.mean(jnp.square(estimate - 0.1))


@functools.partial(quick_jit, static_argnums=0)
def loss_and_gradients(net, variables, mixture, condition):
    """The loss and its gradients by parameters and mixture."""

    def loss(params, mixture):
        return training_loss(net, {**variables, "params": params}, mixture, condition)

    return jax.value_and_grad(loss, argnums=(0, 1))(variables["params"], mixture)


def assert_trees_close(actual, expected, rtol):
    """Leaf by leaf, relative to each leaf's largest value."""

    def check(path, a, b):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("samples", [81, 331, 399, 500])
def test_padding_that_does_not_count_is_left_out(samples, blocks, request):
    net, variables, *inputs = tiny_case(samples, channels=(4, 4, 6, 6), blocks_per_level=blocks)
    separate = jax.jit(net.apply)
    lean = separate(variables, *inputs)
    lean_cost = separate.lower(variables, *inputs).cost_analysis()
    request.getfixturevalue("every_frame")
    separate = jax.jit(lambda *arrays: net.apply(*arrays))
    np.testing.assert_allclose(separate(variables, *inputs), lean, rtol=0, atol=2e-6)
    whole_cost = separate.lower(variables, *inputs).cost_analysis()
    assert lean_cost["flops"] <= whole_cost["flops"]
    if samples == 81:  # 9 frames on a grid of 16
        assert lean_cost["flops"] < 0.95 * whole_cost["flops"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_computes_in_float32(dtype):
    net, variables, mixture, condition = tiny_case(dtype=dtype)
    separate = lambda *arrays: net.apply(variables, *arrays)  # noqa: E731
    text = jax.jit(separate).lower(mixture, condition).as_text(debug_info=True)
    products = [line for line in text.splitlines() if "dot_general" in line and "->" in line]
    heads = [line for line in products if "x3x" in line.split("->")[1] and "f32" in line]
    assert heads
    assert all("bf16" not in line for line in heads)


@pytest.mark.parametrize("samples", [1, 9, 640])
def test_any_length_comes_back_as_long(samples):
    net, variables, mixture, condition = tiny_case(samples)
    estimate = separate(net, variables, mixture, condition)
    assert estimate.shape == mixture.shape
    assert jnp.isfinite(estimate).all()


@pytest.mark.long
def test_gradients_are_finite_at_any_level():
    net, variables, mixture, condition = tiny_case()
    for level in (0.0, 1e-30, 1.0, 1e4):
        found = loss_and_gradients(net, variables, level * mixture, condition)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found)), level


@pytest.mark.long
def test_gradients_are_those_of_finite_differences():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        net, *case = tiny_case(batch=3, film_gain=True)
        variables, mixture, condition = jax.tree.map(np.float64, case)
        point = variables["params"], mixture
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), point)

        def loss_at(step):
            params, mixture = jax.tree.map(lambda x, d: x + step * d, point, direction)
            return loss_and_gradients(net, {**variables, "params": params}, mixture, condition)

        _, gradient = loss_at(0.0)
        slope = float(sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction))))
        rise = float(loss_at(1e-6)[0] - loss_at(-1e-6)[0])
    # Leaky ReLUs have kinks: a few of their inputs change sign within the step.
    assert rise / 2e-6 == pytest.approx(slope, rel=1e-4)


@pytest.mark.long
def test_bfloat16_inside_stays_close_and_its_gradients_too():
    net, *arrays = tiny_case(samples=640, batch=4, channels=(4,))
    narrow = net.clone(dtype="bfloat16")
    exact, rough = separate(net, *arrays), separate(narrow, *arrays)
    assert rough.dtype == jnp.float32
    # Eight bits of mantissa through eight convolutions.
    assert 1e-4 < distance(rough, exact) < 0.05
    exact, rough = (jax.tree.leaves(loss_and_gradients(n, *arrays)[1][0]) for n in (net, narrow))
    assert all(g.dtype == jnp.float32 for g in rough)
    assert distance(*(np.concatenate([g.ravel() for g in tree]) for tree in (rough, exact))) < 0.2


@pytest.mark.long
def test_rematerialised_blocks_are_the_same_and_so_are_their_gradients():
    net, variables, mixture, condition = tiny_case(channels=(4,))
    again = net.clone(remat=True)
    arrays = mixture, condition
    layout = jax.eval_shape(again.init, jax.random.key(0), *arrays)
    assert jax.tree.structure(layout) == jax.tree.structure(variables)
    _, (actual, _) = loss_and_gradients(again, variables, *arrays)
    _, (expected, _) = loss_and_gradients(net, variables, mixture, condition)
    assert_trees_close(actual, expected, rtol=1e-4)


def test_vmap_gives_what_a_batch_gives():
    net, variables, mixture, condition = tiny_case()

    def alone(variables, mixture, condition):
        return net.apply(variables, mixture[None], condition[None])[0]

    actual = quick_jit(jax.vmap(alone, in_axes=(None, 0, 0)))(variables, mixture, condition)
    np.testing.assert_allclose(actual, separate(net, variables, mixture, condition), atol=1e-5)


def test_one_condition_serves_the_whole_batch():
    net, variables, mixture, condition = tiny_case(audio_channels=2)
    repeated = separate(net, variables, mixture, condition[1:].repeat(2, axis=0))
    broadcast = separate(net, variables, mixture, condition[1:])
    np.testing.assert_allclose(broadcast, repeated, atol=1e-6)
    other = separate(net, variables, mixture, condition)
    assert distance(other[0], repeated[0]) > 0.01


def test_gain_of_zero_changes_nothing_and_another_does():
    net, variables, mixture, condition = tiny_case(film_gain=True)
    gains = lambda path: any(key.key == "gain" for key in path)  # noqa: E731
    without = jax.tree_util.tree_map_with_path(lambda p, x: 0 * x if gains(p) else x, variables)
    plain = net.clone(film_gain=False)
    expected = separate(plain, variables, mixture, condition)  # ignores what it does not have
    np.testing.assert_allclose(separate(net, without, mixture, condition), expected, atol=1e-6)
    assert distance(separate(net, variables, mixture, condition), expected) > 0.01


def test_further_blocks_of_a_level_add_to_it():
    net, variables, mixture, condition = tiny_case(blocks_per_level=2)
    # Their last convolution zero, the second blocks are shortcuts only.
    levels = variables["params"].values()
    seconds = [level["conv_block2"] for level in levels if "conv_block2" in level]
    assert len(seconds) == 2 + 1 + 2
    actual = separate(net, variables, mixture, condition)
    for block in seconds:
        block["conv2"]["kernel"] = jnp.zeros_like(block["conv2"]["kernel"])
    expected = separate(net.clone(blocks_per_level=1), variables, mixture, condition)
    np.testing.assert_allclose(separate(net, variables, mixture, condition), expected, atol=1e-6)
    assert distance(actual, expected) > 0.01


def test_sharded_training_equals_that_on_one_device():
    with jax.enable_x64(True):
        net, *arrays = tiny_case(batch=8, channels=(4,))
        variables, mixture, condition = jax.tree.map(np.float64, arrays)
        train = quick_jit(functools.partial(net.apply, train=True, mutable=["batch_stats"]))
        alone = train(variables, mixture, condition)
        mesh = make_mesh()
        with jax.set_mesh(mesh):
            rows = jax.device_put((mixture, condition), batch_sharded(mesh))
            sharded = train(variables, *rows)
        assert sharded[0].sharding.is_equivalent_to(batch_sharded(mesh), 3)
        assert_trees_close(sharded, alone, rtol=1e-10)


@pytest.mark.parametrize(
    ("fields", "shapes", "message"),
    [
        ({}, ((1, 2, 100), (1, 5)), "takes 1 audio channels, the mixture has 2"),
        ({"audio_channels": 2}, ((1, 1, 100), (1, 5)), "takes 2 audio channels, the mixture has 1"),
        ({}, ((1, 1, 100), (1, 6)), "takes a condition of width 5, this one has 6"),
        ({"n_fft": 36}, ((1, 1, 100), (1, 5)), r"18 is not divisible by 2 \*\* 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fields, shapes, message):
    net = tiny_net(**fields)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), *inputs)
