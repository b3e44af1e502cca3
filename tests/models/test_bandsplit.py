"""The band-split separator: its blocks beside PyTorch's, and its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import distance
from tests.tiny import quick_jit, random_variables
from uss_jax.bundles.fingerprint import by_path
from uss_jax.devices.mesh import batch_sharded, make_mesh
from uss_jax.models.bandsplit import (
    Attention,
    BandSplit,
    FeedForward,
    PerBand,
    attended,
    cut_bands,
    mel_bands,
    normalised,
    rotated,
    runs,
)
from uss_jax.models.separator import SeparatorNet

BANDS = (1, 1, 2, 2, 4, 4, 4, 8, 6)


def tiny_net(**fields):
    fields = dict(
        dict(n_fft=64, hop_samples=16, bands=BANDS, width=8, layers=1, head_width=4),
        hidden_width=12,
        condition_width=5,
        **fields,
    )
    return BandSplit(**fields)


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


@functools.partial(quick_jit, static_argnums=0)
def loss_and_gradients(net, variables, mixture, condition):
    """A loss and its gradients by parameters and mixture."""

    def loss(params, mixture):
        estimate = net.apply({"params": params}, mixture, condition, train=True)
        return jnp.mean(jnp.square(estimate - 0.1))

    return jax.value_and_grad(loss, argnums=(0, 1))(variables["params"], mixture)


@pytest.mark.parametrize(
    ("count", "n_fft", "sample_rate"),
    [(60, 2048, 32000), (24, 512, 16000), (30, 1024, 44100), (8, 64, 8000), (100, 128, 16000)],
)
def test_bands_cover_all_bins_and_are_as_wide_as_mels(count, n_fft, sample_rate):
    widths = mel_bands(count, n_fft, sample_rate)
    assert sum(widths) == n_fft // 2
    assert list(widths[:-1]) == sorted(widths[:-1])
    assert all(width & (width - 1) == 0 for width in widths[:-1])
    assert len(widths) <= 1.2 * count
    edges = np.cumsum((0, *widths)) * sample_rate / n_fft
    mels = np.diff(2595 * np.log10(1 + edges / 700))
    wide = np.array(widths[:-1]) > 1  # no band is narrower than a bin
    ratio = mels[:-1][wide] / (mels.sum() / count)
    assert ((ratio > 0.6) & (ratio < 1.6)).all()


@pytest.mark.parametrize("span", [0, 3])
def test_attention_is_that_of_pytorch_with_rotary_positions(span):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((3, 11, 16)).astype(np.float32)
    net = Attention(head_width=8, dtype="float32", span=span)
    params = random_variables(net, x.shape)["params"]

    def linear(name, value):
        return value @ torch.tensor(params[name]["kernel"])

    def turned(value):
        """Rotary positions by complex numbers, [3, heads, 11, 8]."""
        pairs = torch.complex(value[..., :4], value[..., 4:])
        angle = torch.outer(torch.arange(11.0), 10_000.0 ** (-torch.arange(4) / 4))
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    query, key, value = (
        linear(name, torch.tensor(x)).reshape(3, 11, 2, 8).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    place = torch.arange(11)
    near = (place[:, None] - place).abs() <= (span or 11)
    found = torch.nn.functional.scaled_dot_product_attention(
        turned(query), turned(key), value, attn_mask=near
    )
    expected = linear("out", found.transpose(1, 2).reshape(3, 11, 16))
    actual = net.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


def test_norm_and_feed_forward_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((3, 11, 16)).astype(np.float32)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (16,), eps=1e-6)
    np.testing.assert_allclose(normalised(jnp.asarray(x)), expected.numpy(), atol=1e-5)
    net = FeedForward(hidden_width=24, dtype="float32")
    params = random_variables(net, x.shape)["params"]
    kernel = {name: torch.tensor(params[name]["kernel"]) for name in params}
    inner = torch.nn.functional.silu(torch.tensor(x) @ kernel["gate"]) * (
        torch.tensor(x) @ kernel["inner"]
    )
    actual = net.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(actual, (inner @ kernel["outer"]).numpy(), atol=1e-5)


def test_bands_are_mapped_as_by_a_linear_module_each():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 7, sum(BANDS))).astype(np.float32)
    split, merge = PerBand(BANDS, 8), PerBand(BANDS, None)
    parts = cut_bands(jnp.asarray(x), BANDS)
    tree = jax.eval_shape(split.init, jax.random.key(0), parts)
    rng = np.random.default_rng(1)
    first = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), tree)
    made = split.apply(first, parts)
    tree = jax.eval_shape(merge.init, jax.random.key(0), made)
    second = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), tree)
    merged = merge.apply(second, made)

    inside, outside, bin_ = [], [], 0
    for number, (count, width) in enumerate(runs(BANDS)):
        for band in range(count):
            into, out = torch.nn.Linear(width, 8), torch.nn.Linear(8, width)
            for module, tree in ((into, first), (out, second)):
                module.weight.data = torch.tensor(tree["params"][f"kernel{number}"][band].T)
                module.bias.data = torch.tensor(tree["params"][f"bias{number}"][band])
            with torch.no_grad():
                inside.append(into(torch.tensor(x[..., bin_ : bin_ + width])))
                outside.append(out(inside[-1]))
            bin_ += width
    expected = torch.stack(inside, 2).numpy()
    np.testing.assert_allclose(np.concatenate(made, axis=2), expected, atol=1e-5)
    joined = np.concatenate([part.reshape(2, 7, -1) for part in merged], axis=2)
    np.testing.assert_allclose(joined, torch.cat(outside, 2).numpy(), atol=2e-5)


def test_rotary_products_depend_on_distance_only():
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8)).astype(np.float32)
    turned = [rotated(jnp.asarray(v).repeat(40, axis=1))[0, :, 0] for v in (query, key)]
    products = np.asarray(turned[0] @ turned[1].T)
    for distance_ in (-7, 0, 20):
        along = np.diagonal(products, distance_)
        np.testing.assert_allclose(along, along[0], atol=1e-5)
    assert np.ptp(products[0]) > 0.1


def test_it_starts_at_half_the_mixture_whatever_is_asked():
    net, _, mixture, condition = tiny_case()
    assert isinstance(net, SeparatorNet)
    variables = quick_jit(net.init)(jax.random.key(0), mixture, condition)
    assert set(variables) == {"params"}
    estimate = separate(net, variables, mixture, condition)
    assert distance(estimate, mixture / 2) < 0.2
    other = separate(net, variables, mixture, -condition)
    np.testing.assert_array_equal(other, estimate)


def test_the_condition_reaches_the_estimate():
    net, variables, mixture, condition = tiny_case(condition_norm=3.0)
    estimate = separate(net, variables, mixture, condition)
    assert distance(separate(net, variables, mixture, -condition), estimate) > 0.01
    # Only its direction counts.
    again = separate(net, variables, mixture, 5 * condition)
    np.testing.assert_allclose(again, estimate, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 15, 16, 640])
def test_any_length_comes_back_as_long(samples):
    net, variables, mixture, condition = tiny_case(samples)
    estimate = separate(net, variables, mixture, condition)
    assert estimate.shape == mixture.shape
    assert jnp.isfinite(estimate).all()


@pytest.mark.parametrize(("length", "span"), [(12, 3), (13, 3), (20, 3), (50, 1), (41, 10)])
def test_attention_in_blocks_is_that_to_all_keys_in_reach(length, span):
    rng = np.random.default_rng(length)
    query, key, value = jnp.asarray(rng.standard_normal((3, 2, length, 2, 4)), jnp.float32)
    place = np.arange(length)

    def whole(query, key, value):
        products = jnp.einsum("bqhe,bkhe->bhqk", query, key) / 2
        near = np.abs(place[:, None] - place) <= span
        weights = jnp.where(near, jnp.exp(products), 0)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return jnp.einsum("bhqk,bkhe->bqhe", weights, value)

    found = attended(query, key, value, span)
    np.testing.assert_allclose(found, whole(query, key, value), atol=1e-6)
    for ours, theirs in zip(
        *(
            jax.grad(lambda *x, of=of: jnp.square(of(*x)).sum(), (0, 1, 2))(query, key, value)
            for of in (lambda *x: attended(*x, span), whole)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_long_sequences_take_memory_in_proportion_to_their_length():
    def scores(length):
        """Elements of the largest array of the computation."""
        x = jax.ShapeDtypeStruct((1, length, 1, 2), np.float32)
        made = jax.make_jaxpr(lambda q, k, v: attended(q, k, v, 8))(x, x, x)
        return max(out.aval.size for step in made.eqns for out in step.outvars)

    assert scores(4096) == 2 * scores(2048) == 3 * 8 * 4096


def test_with_a_span_windows_with_context_agree_with_one_pass():
    net, variables, _, condition = tiny_case(time_span=2, batch=1)
    grid, context = net.grid_samples, -(-net.reach_samples // net.grid_samples)
    rng = np.random.default_rng(4)
    mixture = jnp.asarray(rng.standard_normal((1, 1, 12 * context * grid)), jnp.float32)
    whole = separate(net, variables, mixture, condition)
    for start in (0, context + 3, 5 * context):  # any multiple of the hop
        begin, end = start * grid, (start + 4 * context) * grid
        window = separate(net, variables, mixture[..., begin:end], condition)
        kept = slice(context * grid, 3 * context * grid)
        np.testing.assert_allclose(
            window[..., kept], whole[..., begin:end][..., kept], atol=1e-5 * jnp.abs(whole).max()
        )
    # Without one, or with less context, they differ.
    less = slice(0, context * grid)
    assert distance(window[..., less], whole[..., begin:end][..., less]) > 1e-3
    everywhere = net.clone(time_span=0)
    one = separate(everywhere, variables, mixture, condition)[..., begin:end][..., kept]
    part = separate(everywhere, variables, mixture[..., begin:end], condition)[..., kept]
    assert distance(part, one) > 1e-3


@pytest.mark.parametrize("gain", [0.1, 10.0])
def test_the_level_of_the_mixture_hardly_changes_the_mask(gain):
    net, variables, mixture, condition = tiny_case()
    estimate = separate(net, variables, mixture, condition)
    assert distance(separate(net, variables, gain * mixture, condition) / gain, estimate) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite_at_any_level(dtype):
    net, variables, mixture, condition = tiny_case(dtype=dtype)
    for level in (0.0, 1e-30, 1.0, 1e4):
        found = loss_and_gradients(net, variables, level * mixture, condition)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found)), level
        # A bin's features have a root mean square of at most 1, so no input is amplified.
        assert jnp.abs(found[1][1]).max() < 1e4 * max(level, 1)
    silent = loss_and_gradients(net, variables, mixture, 0 * condition)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(silent))


@pytest.mark.long
def test_gradients_are_those_of_finite_differences():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        net, *case = tiny_case(batch=3)
        variables, mixture, condition = jax.tree.map(np.float64, case)
        point = variables["params"], mixture
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), point)

        def loss_at(step):
            params, mixture = jax.tree.map(lambda x, d: x + step * d, point, direction)
            return loss_and_gradients(net, {"params": params}, mixture, condition)

        _, gradient = loss_at(0.0)
        slope = float(sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction))))
        rise = float(loss_at(1e-6)[0] - loss_at(-1e-6)[0])
    assert rise / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.long
def test_bfloat16_inside_stays_close_and_its_gradients_too():
    net, *arrays = tiny_case(samples=640, batch=4, layers=2)
    narrow = net.clone(dtype="bfloat16")
    exact, rough = separate(net, *arrays), separate(narrow, *arrays)
    assert rough.dtype == jnp.float32
    assert 1e-4 < distance(rough, exact) < 0.05
    exact, rough = (jax.tree.leaves(loss_and_gradients(n, *arrays)[1][0]) for n in (net, narrow))
    assert all(g.dtype == jnp.float32 for g in rough)
    assert distance(*(np.concatenate([g.ravel() for g in tree]) for tree in (rough, exact))) < 0.2


@pytest.mark.long
def test_rematerialised_layers_are_the_same_and_so_are_their_gradients():
    net, variables, mixture, condition = tiny_case(layers=2)
    again = net.for_training("global", remat=True)
    assert again.remat
    _, (actual, _) = loss_and_gradients(again, variables, mixture, condition)
    _, (expected, _) = loss_and_gradients(net, variables, mixture, condition)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        actual,
        expected,
    )


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
    np.testing.assert_allclose(broadcast, repeated, atol=1e-5)
    other = separate(net, variables, mixture, condition)
    assert distance(other[0], repeated[0]) > 0.01


def test_channels_share_a_mask_that_is_that_of_equal_ones():
    net, variables, mixture, condition = tiny_case()

    @quick_jit
    def shared(mixture, condition):
        return net.apply(variables, mixture, condition, method=net.separate_with_shared_mask)

    alone = separate(net, variables, mixture, condition)
    np.testing.assert_allclose(shared(mixture, condition), alone, atol=1e-5)
    gains = jnp.array([1.0, 1.0, -1.0])[None, :, None]  # the last is out of phase
    three = shared(gains * mixture, condition)
    np.testing.assert_allclose(three, gains * three[:, :1], atol=1e-5)
    assert distance(three[:, :1], alone) > 1e-3  # the mask of a negative is another
    silent = shared(jnp.concatenate([mixture, 0 * mixture], axis=1), condition[:1])
    np.testing.assert_allclose(silent[0, :1], alone[0], atol=1e-5)


def test_a_net_of_two_channels_hears_both_in_each():
    net, variables, mixture, condition = tiny_case(audio_channels=2)
    before = separate(net, variables, mixture, condition)
    after = separate(net, variables, mixture.at[:, 1].multiply(-0.5), condition)
    assert distance(after[:, 0], before[:, 0]) > 1e-3


def test_a_condition_that_is_added_enters_nowhere_else():
    net, variables, mixture, condition = tiny_case(condition_added=True)
    leaves = by_path(variables["params"])
    assert not any(path.endswith("modulation/kernel") for path in leaves)
    assert leaves["layer1/time_attention_norm/modulation"].shape == (1, 3 * net.width)
    before = separate(net, variables, mixture, condition)
    assert distance(separate(net, variables, mixture, condition[::-1]), before) > 1e-3
    deaf = {
        **variables["params"],
        "added": jax.tree.map(jnp.zeros_like, variables["params"]["added"]),
    }
    before = separate(net, {"params": deaf}, mixture, condition)
    np.testing.assert_allclose(
        separate(net, {"params": deaf}, mixture, condition[::-1]), before, atol=1e-6
    )


def test_sharded_training_equals_that_on_one_device():
    with jax.enable_x64(True):
        net, *arrays = tiny_case(batch=8)
        variables, mixture, condition = jax.tree.map(np.float64, arrays)
        alone = loss_and_gradients(net, variables, mixture, condition)
        mesh = make_mesh()
        with jax.set_mesh(mesh):
            rows = jax.device_put((mixture, condition), batch_sharded(mesh))
            sharded = loss_and_gradients(net, variables, *rows)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(b).max()),
            sharded,
            alone,
        )


@pytest.mark.parametrize(
    ("fields", "shapes", "message"),
    [
        ({}, ((1, 2, 100), (1, 5)), "takes 1 audio channels, the mixture has 2"),
        ({}, ((1, 1, 100), (1, 6)), "takes a condition of width 5, this one has 6"),
        ({"n_fft": 32}, ((1, 1, 100), (1, 5)), "add up to 32 bins, not to n_fft / 2 = 16"),
        ({"head_width": 6}, ((1, 1, 100), (1, 5)), "head_width=6 is odd or does not divide"),
        ({"head_width": 1}, ((1, 1, 100), (1, 5)), "head_width=1 is odd or does not divide"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fields, shapes, message):
    net = tiny_net(**fields)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), *inputs)


def test_it_is_exported_for_any_batch():
    net, variables, mixture, condition = tiny_case(batch=3, samples=320)
    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (mixture, condition)]
    exported = jax.export.export(jax.jit(functools.partial(net.apply, variables)))(*shapes)
    np.testing.assert_allclose(
        exported.call(mixture, condition), separate(net, variables, mixture, condition), atol=1e-5
    )
