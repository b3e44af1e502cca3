import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import distance
from uss_jax.devices.mesh import batch_sharded, make_mesh
from uss_jax.models.norm import EPSILON, MOMENTUM, BatchNorm

SHAPE = (8, 6, 5, 3)
NORM = BatchNorm()


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def random_variables(channels=3, dtype=np.float32):
    scale, bias, mean, var = np.random.default_rng(9).uniform(0.5, 2, (4, channels)).astype(dtype)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    return {"params": params, "batch_stats": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}}


@jax.jit
def train(variables, x, **modulation):
    return NORM.apply(variables, x, True, mutable=["batch_stats"], **modulation)


def literal_torch(variables, x):
    """torch.nn.BatchNorm2d in training, in float64: the output and the new statistics."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    params, stats = variables["params"], variables["batch_stats"]
    y = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    count = x.size / x.shape[-1]
    return y, {
        "mean": 0.99 * stats["mean"] + 0.01 * mean,
        "var": 0.99 * stats["var"] + 0.01 * var * count / (count - 1),
    }


@pytest.mark.parametrize("shape", [SHAPE, (4, 3), (1, 2, 3), (2, 1, 1, 1, 3)])
def test_trains_as_torch_does(shape):
    variables = random_variables()
    for step in range(3):
        x = 3 * normal(*shape, seed=step) + 2
        expected, expected_stats = literal_torch(variables, x)
        y, variables["batch_stats"] = train(variables, x)
        variables = variables | variables["batch_stats"]
        np.testing.assert_allclose(y, expected, atol=2e-5)  # a few steps of float32
        for name, value in expected_stats.items():
            np.testing.assert_allclose(variables["batch_stats"][name], value, rtol=1e-6)


def test_statistics_move_by_the_momentum():
    variables, x = random_variables(), normal(*SHAPE)
    x = 3 * x + 2
    before = variables["batch_stats"]
    slow, fast = (
        BatchNorm(momentum=momentum).apply(variables, x, True, mutable=["batch_stats"])[1]
        for momentum in (0.01, 0.1)
    )
    for name, old in before.items():
        moved = [found["batch_stats"][name] - old for found in (slow, fast)]
        np.testing.assert_allclose(10 * moved[0], moved[1], rtol=1e-4, atol=2e-6)


def test_equals_torch_itself():
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(3, momentum=MOMENTUM, eps=EPSILON)
    variables = BatchNorm().init(jax.random.key(0), jnp.zeros(SHAPE), True)
    for step in range(3):
        x = 3 * normal(*SHAPE, seed=step) + 2
        y, updates = train(variables, x)
        variables = variables | updates
        expected = layer(torch.from_numpy(np.moveaxis(np.array(x), -1, 1)))
        np.testing.assert_allclose(y, np.moveaxis(expected.detach().numpy(), 1, -1), atol=1e-5)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], layer.running_mean, rtol=1e-5)
    np.testing.assert_allclose(variables["batch_stats"]["var"], layer.running_var, rtol=1e-5)


def test_evaluates_with_the_running_statistics():
    variables, x = random_variables(), normal(*SHAPE)
    params, stats = variables["params"], variables["batch_stats"]
    y = NORM.apply(variables, x, False)
    expected = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(y, expected * params["scale"] + params["bias"], atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [1, SHAPE[0]])
def test_gain_and_shift_act_on_the_output_of_each_item(training, rows):
    variables, x = random_variables(), normal(*SHAPE)
    shift, gain = normal(rows, 3, seed=1), normal(rows, 3, seed=2)
    apply = lambda **kw: NORM.apply(variables, x, training, mutable=["batch_stats"], **kw)[0]  # noqa: E731
    per_item = lambda v: v.reshape(rows, 1, 1, 3)  # noqa: E731
    expected = (1 + per_item(gain)) * apply() + per_item(shift)
    np.testing.assert_allclose(apply(shift=shift, gain=gain), expected, atol=1e-5)


def test_small_variance_far_from_zero_is_seen():
    x = 100 + 0.01 * normal(8, 40, 50, 3)
    y, updates = train(
        random_variables() | {"batch_stats": {"mean": jnp.zeros(3), "var": jnp.zeros(3)}}, x
    )
    expected, _ = literal_torch(random_variables(), x)
    # A float32 near 100 has steps of 8e-6, a thousandth of the deviation.
    assert distance(y, expected) < 1e-3
    variance = np.asarray(x, np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(updates["batch_stats"]["var"] / 0.01, variance, rtol=1e-3)


def on_mesh(function, x):
    """The function on x with its rows on eight devices, and the compiled code."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        x = jax.device_put(x, batch_sharded(mesh))
        compiled = jax.jit(function).lower(x).compile()
        return compiled(x), compiled.as_text()


def test_small_variance_far_from_zero_is_seen_on_many_devices_once_the_mean_is_known():
    x = 100 + 0.01 * normal(8, 40, 50, 3)
    stats = {"mean": jnp.full(3, 100.002), "var": jnp.full(3, 1e-4)}
    variables = random_variables() | {"batch_stats": stats}
    (y, _), _ = on_mesh(functools.partial(train, variables), x)
    expected, _ = literal_torch(variables, x)
    assert distance(y, expected) < 1e-3


def loss(variables, weight, x, shift=None, gain=None, norm=NORM):
    """A scalar in which every output has another weight; its gradient by x needs them all."""
    y, _ = norm.apply(variables, x, True, shift=shift, gain=gain, mutable=["batch_stats"])
    return jnp.sum(weight * y)


def plain_loss(variables, weight, x, shift=None, gain=None):
    axes = tuple(range(x.ndim - 1))
    mean, var = jnp.mean(x, axes), jnp.var(x, axes)
    params = variables["params"]
    y = (x - mean) / jnp.sqrt(var + EPSILON) * params["scale"] + params["bias"]
    per_item = lambda v: v.reshape(v.shape[0], 1, 1, -1)  # noqa: E731
    if gain is not None:
        y = (1 + per_item(gain)) * y + per_item(shift)
    return jnp.sum(weight * y)


@pytest.mark.parametrize("training", [False, True])
def test_parts_and_activation_are_those_of_the_whole(training):
    """Maps that lie apart, normalised and activated, as their concatenation would be."""

    def apart(variables, weight, x):
        parts = (x[..., :1], x[..., 1:])
        y, updates = NORM.apply(variables, parts, training, leak=0.1, mutable=["batch_stats"])
        return jnp.sum(weight * jnp.concatenate(y, axis=-1)), updates

    def whole(variables, weight, x):
        y, updates = NORM.apply(variables, x, training, mutable=["batch_stats"])
        return jnp.sum(weight * jnp.where(y >= 0, y, 0.1 * y)), updates

    with jax.enable_x64(True):
        arrays = random_variables(dtype=float), normal(*SHAPE, seed=3, dtype=float)
        x = normal(*SHAPE, dtype=float)
        found, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 2), has_aux=True))(*arrays, x)
            for f in (apart, whole)
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected
    )


@pytest.mark.parametrize("rows", [None, 1, SHAPE[0]])
def test_gradient_is_that_of_the_plain_formula(rows):
    with jax.enable_x64(True):
        arrays = [random_variables(dtype=float), normal(*SHAPE, seed=3, dtype=float)]
        arrays += [normal(*SHAPE, dtype=float) + 5]
        if rows:
            arrays += [normal(rows, 3, seed=seed, dtype=float) for seed in (4, 5)]
        which = tuple(range(len(arrays)))
        actual = jax.jit(jax.grad(loss, argnums=which))(*arrays)
        expected = jax.jit(jax.grad(plain_loss, argnums=which))(*arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), actual, expected
    )
    assert np.abs(actual[2]).max() > 0.1


def test_sharded_batch_has_global_statistics_and_gradients():
    with jax.enable_x64(True):
        variables, weight = random_variables(dtype=float), normal(*SHAPE, seed=3, dtype=float)
        x = normal(*SHAPE, dtype=float) * np.arange(1, 9).reshape(8, 1, 1, 1)  # items differ

        def both(x):
            gradients = jax.grad(loss, argnums=(0, 2))(variables, weight, x)
            return train(variables, x), gradients

        sharded, _ = on_mesh(both, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), sharded, both(x)
        )


def test_devices_speak_once_forward_and_once_backward():
    variables, weight = random_variables(), normal(*SHAPE, seed=3)
    forward = lambda x: train(variables, x)  # noqa: E731
    backward = jax.grad(functools.partial(loss, variables, weight))
    for function, times in ((forward, 1), (backward, 2)):
        _, code = on_mesh(function, normal(*SHAPE))
        assert code.count(" all-reduce(") == times
        assert "all-gather" not in code


def test_bfloat16_maps_keep_float32_statistics():
    x = normal(*SHAPE) + 3
    y, updates = train(random_variables(), x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert updates["batch_stats"]["mean"].dtype == jnp.float32
    _, expected = train(random_variables(), x.astype(jnp.bfloat16).astype(jnp.float32))
    for name, value in expected["batch_stats"].items():
        np.testing.assert_allclose(updates["batch_stats"][name], value, rtol=1e-6)


@pytest.mark.parametrize("rows", [None, 1, SHAPE[0]])
def test_parts_of_a_batch_are_normalised_as_batches_of_their_own(rows):
    part = 4
    with jax.enable_x64(True):
        variables, weight = random_variables(dtype=float), normal(*SHAPE, seed=3, dtype=float)
        x = normal(*SHAPE, dtype=float) * np.arange(1, 9).reshape(8, 1, 1, 1)
        arguments = [variables, weight, x]
        if rows:
            arguments += [normal(rows, 3, seed=seed, dtype=float) for seed in (4, 5)]

        def apart(variables, weight, x, *modulation):
            total = 0
            for begin in range(0, 8, part):
                rows = slice(begin, begin + part)
                own = [v if v.shape[0] == 1 else v[rows] for v in modulation]
                total += plain_loss(variables, weight[rows], x[rows], *own)
            return total

        which = tuple(range(len(arguments)))
        together = functools.partial(loss, norm=BatchNorm(part))
        actual = jax.jit(jax.value_and_grad(together, argnums=which))(*arguments)
        expected = jax.jit(jax.value_and_grad(apart, argnums=which))(*arguments)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), actual, expected
        )
        _, found = BatchNorm(part).apply(variables, x, True, mutable=["batch_stats"])
        halves = [literal_torch(variables, x[at : at + part])[1] for at in range(0, 8, part)]
        for name, value in found["batch_stats"].items():
            mean = np.mean([half[name] for half in halves], axis=0)
            np.testing.assert_allclose(value, mean, rtol=1e-11)


@pytest.mark.parametrize(("over", "alike"), [("replica", 2), (2, 2), (4, 4)])
def test_parts_of_a_sharded_batch_are_those_of_one_device(over, alike):
    """Parts of one device need no word between devices; only their mean statistics do."""
    x = normal(16, 6, 5, 3) * np.arange(1, 17).reshape(16, 1, 1, 1).astype(np.float32)
    variables = random_variables()

    def apply(over, x):
        return BatchNorm(over).apply(variables, x, True, mutable=["batch_stats"])

    (y, stats), code = on_mesh(functools.partial(apply, over), x)
    one_y, one_stats = jax.jit(functools.partial(apply, alike))(x)
    np.testing.assert_allclose(y, one_y, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, one_stats)
    if alike == 2:
        _, output_only = on_mesh(lambda x: apply(over, x)[0], x)
        assert not re.search("all-(reduce|gather|to-all)|collective-permute", output_only)
        assert code.count(" all-reduce(") == 1


def test_parts_that_do_not_divide_a_batch_are_refused():
    for over in (3, 16, 0):
        with pytest.raises(ValueError, match=f"a batch of 8 items .* in equal groups of {over}"):
            BatchNorm(over).apply(random_variables(), normal(*SHAPE), True, mutable=["batch_stats"])
