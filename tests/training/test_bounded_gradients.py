"""Every division, root, logarithm and norm between a loss and parameters, at its worst inputs.

A row holds a function, an input, and the bound on each element of the gradient of its outputs'
sum. The mask's direction has tests of its own in tests/models/test_masks.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import ONE_BLOCK, RATE, TAGGER, quick_jit, tagger_variables
from tests.training.test_separation_step import BATCH, _batch, _made
from uss_jax.models.masks import Head
from uss_jax.models.norm import EPSILON, BatchNorm
from uss_jax.models.resunet import ResUNet
from uss_jax.training.losses import LOSSES, binary_cross_entropy
from uss_jax.training.optim import adamw_amsgrad

SAMPLES = 1000
SILENCE = 1e-8  # mean square to which the losses in dB are added
DECIBEL = 10 / np.log(10)
# Waveforms from exact silence over denormals to overload.
LEVELS = (0.0, 1e-45, 1e-40, 1e-30, 1e-20, 1e-12, 1e-5, 1.0, 1e4)
# Largest derivative of each loss by one sample of the estimate. Of |x|: 1 / samples. Of magnitudes:
# each of 4 frames at a hop of 320 and 1025 bins. Of decibels: the error's root over its square,
# at most 1 / (2 sqrt(SILENCE)), once for the numerator and once for the scale.
BOUNDS = {
    "l1_wav": 1 / SAMPLES,
    "l1_wav_l1_sp": 1 / SAMPLES + 2048 / SAMPLES,
    "si_sdr": 4 * DECIBEL / np.sqrt(SILENCE * SAMPLES),
    "snr_threshold": DECIBEL / np.sqrt(SILENCE * SAMPLES),
}


def wave(level, seed):
    noise = np.random.default_rng(seed).standard_normal((1, 1, SAMPLES))
    return jnp.asarray(level * noise / np.abs(noise).max(), jnp.float32)


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def assert_bounded(tree, bound):
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(tree))
    assert largest(tree) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("target", LEVELS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, target):
    gradient = jax.jit(jax.grad(lambda x, y: LOSSES[name](x, y)[0]))
    for level in LEVELS:
        assert_bounded(gradient(wave(level, 0), wave(target, 1)), BOUNDS[name])
    same = wave(target, 1)
    assert_bounded(gradient(same, same), BOUNDS[name])


@pytest.mark.parametrize("logit", [0.0, 1e-30, 20.0, 100.0, 1e4, np.inf])
def test_binary_cross_entropy_of_sure_probabilities(logit):
    logits = jnp.asarray([[logit, -logit]], jnp.float32)
    for target in (0.0, 0.5, 1.0):
        targets = jnp.full((1, 2), target)
        loss = lambda x, y=targets: binary_cross_entropy(jax.nn.sigmoid(x), y)[0]  # noqa: E731
        assert_bounded(jax.grad(loss)(logits), 1 / 2)


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-20, 1.0, 1e4])
def test_batch_norm_of_a_constant_map(value):
    x = jnp.full((2, 4, 8, 3), value, jnp.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    weight = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], x.shape), jnp.float32)

    def loss(params, x):
        y, _ = norm.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.sum(weight * y)

    by_params, by_x = jax.grad(loss, argnums=(0, 1))(variables["params"], x)
    assert_bounded(by_params, x.size / 3)
    assert_bounded(by_x, 2 / np.sqrt(EPSILON))


def training_gradient(net, variables, loss):
    """The gradient of a net's parameters in training, as a function of its inputs."""

    def objective(params, inputs):
        outputs, _ = net.apply(
            {**variables, "params": params},
            **inputs,
            train=True,
            mutable=["batch_stats"],
            rngs={"augment": jax.random.key(0)},
        )
        return loss(outputs, inputs)

    gradient = quick_jit(jax.grad(objective))
    return lambda params=variables["params"], **inputs: gradient(params, inputs)


LABELS = jnp.zeros((2, 527)).at[:, 3].set(1.0)


def noise(level, *shape):
    return jnp.asarray(level * np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("net", [TAGGER, ONE_BLOCK], ids=["cnn14", "htsat"])
def test_taggers_of_silence_and_overload_and_attention_that_is_sure(net):
    variables = tagger_variables(net=net)
    gradient = training_gradient(
        net, variables, lambda y, _: jnp.sum(binary_cross_entropy(y["clipwise"], LABELS))
    )
    for level in (0.0, 1e-40, 1e-6, 1.0, 1e4):
        assert_bounded(gradient(waveform=noise(level, 2, RATE)), 10.0)
    sure = jax.tree_util.tree_map_with_path(
        lambda path, x: 1e4 * x if "qkv" in jax.tree_util.keystr(path) else x, variables["params"]
    )
    assert_bounded(gradient(sure, waveform=noise(1.0, 2, RATE)), 1e5)


SEPARATOR = ResUNet(n_fft=64, hop_samples=32, channels=(4, 4), condition_width=5)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_separators_of_any_level_and_condition(dtype):
    net = SEPARATOR.clone(dtype=dtype)
    variables = net.init(jax.random.key(0), noise(1, 2, 1, SAMPLES), jnp.zeros((2, 5)))
    gradient = training_gradient(
        net,
        variables,
        lambda estimate, x: jnp.mean(LOSSES["l1_wav"](estimate, 0.5 * x["mixture"])),
    )
    for level in (0.0, 1e-40, 1e-12, 1e-5, 1e-3, 1.0):
        for asked in (0.0, 1e-40, 1e4):
            mixture = noise(level, 2, 1, SAMPLES)
            found = gradient(mixture=mixture, condition=jnp.full((2, 5), asked))
            # The estimate is the mixture times a mask; a condition multiplies FiLM's gradient.
            # Below the floor of magnitudes, 1e-5, all maps are constant, and each batch norm may
            # multiply a gradient by 2 / sqrt(EPSILON): finite, and for the guard to judge.
            bound = 10 * level * max(asked, 1) if level == 0 or level > 1e-5 else np.inf
            assert_bounded(found, bound)


def without_direction(share):
    """Makes the two maps of the direction exactly 0 in a share of the bins, gradients kept."""
    lost = np.random.default_rng(0).random((BATCH, 32, 32, 1)) < share
    lost = np.concatenate([np.zeros_like(lost), lost, lost], axis=-1)

    def intercept(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if isinstance(context.module, Head) and context.method_name == "__call__":
            output = output - jnp.where(lost, jax.lax.stop_gradient(output), 0)
        return output

    return nn.intercept_methods(intercept)


def run(state, step, ninth):
    """The last state and all metrics of 24 steps, of which the ninth is another."""
    metrics = []
    for number in range(24):
        step_now = ninth if number == 8 else step
        state, values = step_now(state, {}, _batch(0), jax.random.key(0))
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.mark.long
def test_masks_without_direction_do_not_end_a_run():
    # As bfloat16 heads had them: one in some thousands. Unbounded, their gradient is 1e10 times as
    # long, and amsgrad makes no step afterwards that moves anything.
    step, state = _made(optimizer=adamw_amsgrad(1e-3))
    zeroed, _ = _made(optimizer=adamw_amsgrad(1e-3))
    with without_direction(3e-4):
        zeroed = zeroed.lower(state, {}, _batch(0), jax.random.key(0)).compile()
    last, metrics = run(state, step, zeroed)
    wanted, ordinary = run(state, step, step)
    norms = [float(m["grad_norm"]) for m in metrics]
    assert norms[8] != float(ordinary[8]["grad_norm"])
    assert max(norms) < 100 * np.median(norms)
    assert largest(last.params) < 1.1 * largest(wanted.params)
    fallen = [float(m[8]["loss"] - m[-1]["loss"]) for m in (metrics, ordinary)]
    assert fallen[0] > 0.4 * fallen[1] > 0
