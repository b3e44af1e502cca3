import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import GOLDEN
from uss_jax.errors import UserError
from uss_jax.training.optim import adamw_amsgrad, clipped, make_schedule, unfinished_warm_up

SCHEDULES = json.loads((GOLDEN / "lr_schedules.json").read_text())
STEPS = 300


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", SCHEDULES, ids=lambda c: f"{c['lr_lambda_type']}-{c['warm_up_steps']}"
)
def test_golden_schedules(case):
    name = case["lr_lambda_type"]
    arguments = {"warm_up_steps": case["warm_up_steps"]}
    if name == "linear_warm_up":
        arguments["reduce_lr_steps"] = case["reduce_lr_steps"]
    schedule = make_schedule(name, 0.5, **arguments)
    expected = 0.5 * np.array(case["scale"])
    # As in training, where the step is on the device. Float32 knows nothing below 1e-38.
    actual = jax.jit(jax.vmap(schedule))(jnp.array(case["steps"], jnp.int32))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-37)


def test_warm_up_of_no_steps_is_none():
    schedule = make_schedule("linear_warm_up", 0.5, warm_up_steps=0, reduce_lr_steps=10)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 10)], [0.5, 0.5, 0.45])
    schedule = make_schedule("constant_warm_up", 0.5, warm_up_steps=0)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 10)], [0.5] * 3)


def test_cosine_warms_up_and_ends_at_a_hundredth():
    rate = make_schedule("cosine", 1e-3, warm_up_steps=10, total_steps=110)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 110)], [0, 5e-4, 1e-3, 1e-5], atol=1e-9)
    np.testing.assert_allclose(rate(60), (1e-3 + 1e-5) / 2, rtol=1e-5)


def gradients():
    """[steps, 2, 3], larger in the first steps: the maximum of the moments then stays for long."""
    drawn = np.random.default_rng(0).standard_normal((STEPS, 2, 3))
    drawn[:, 0, 0] = 0  # a parameter without gradient
    return drawn * np.where(np.arange(STEPS) < 5, 30, 1)[:, None, None]


def ours(optimizer, start, dtype):
    """The weights after each step."""

    def step(carry, gradient):
        weights, state = carry
        updates, state = optimizer.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        return (weights, state), weights

    start = jnp.asarray(start, dtype)
    carry = start, optimizer.init(start)
    return np.asarray(
        jax.jit(lambda c, g: jax.lax.scan(step, c, g)[1])(carry, jnp.asarray(gradients(), dtype))
    )


def literal_amsgrad(start, rate, decay):
    """torch.optim.AdamW(amsgrad=True), line by line, in float64."""
    weights, m, v, v_max = start.copy(), *(np.zeros_like(start) for _ in range(3))
    for t, g in enumerate(gradients(), start=1):
        weights -= rate(t - 1) * decay * weights
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        v_max = np.maximum(v_max, v)
        denominator = np.sqrt(v_max) / np.sqrt(1 - 0.999**t) + 1e-8
        weights -= rate(t - 1) / (1 - 0.9**t) * m / denominator
        yield weights.copy()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_optimiser_is_torchs_line_by_line(decay):
    start = np.random.default_rng(1).standard_normal((2, 3))
    schedule = make_schedule("constant_warm_up", 0.1, warm_up_steps=20)
    with jax.enable_x64(True):
        expected = np.stack(list(literal_amsgrad(start, schedule, decay)))
        actual = ours(adamw_amsgrad(schedule, decay), start, np.float64)
        other = ours(optax.amsgrad(schedule), start, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    # What optax calls AMSGrad is something else: the numbers above can tell.
    assert np.abs(other - expected).max() > 1e-3


def test_optimiser_equals_torch_itself():
    torch = pytest.importorskip("torch")
    start = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)
    weights = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([weights], lr=1e-2, weight_decay=0.1, amsgrad=True)
    for gradient in gradients():
        weights.grad = torch.from_numpy(gradient.astype(np.float32))
        optimizer.step()
    actual = ours(adamw_amsgrad(1e-2, 0.1), start, np.float32)[-1]
    # 300 steps of float32.
    np.testing.assert_allclose(actual, weights.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_state_holds_no_buffer_twice():
    # A donated buffer may be given once only.
    state = adamw_amsgrad(1e-3).init(jnp.ones((4, 4)))
    leaves = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(leaves)) == len(leaves) > 3


def test_clipping_keeps_the_direction_of_a_gradient_and_bounds_its_norm():
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    optimizer = clipped(optax.sgd(1.0), 2.0)
    updates, _ = optimizer.update(gradient, optimizer.init(gradient))
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, -g * 2 / 5, rtol=1e-6), updates, gradient
    )
    small = jax.tree.map(lambda g: g / 10, gradient)
    updates, _ = optimizer.update(small, optimizer.init(small))
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -g), updates, small)
    assert clipped(optimizer, 0.0) is optimizer


def test_the_first_steps_have_their_length_to_the_last_digits_of_float32():
    gradients = np.float32([3e-4, -7.0, 1e-6, 0.02])
    state = adamw_amsgrad(1.0).init(jnp.zeros(4))
    m, v = np.zeros(4), np.zeros(4)
    for step in range(1, 6):
        updates, state = adamw_amsgrad(1.0).update(jnp.asarray(gradients), state, jnp.zeros(4))
        m, v = 0.9 * m + 0.1 * gradients, 0.999 * v + 0.001 * np.float64(gradients) ** 2
        expected = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(updates, -expected, rtol=1e-6)


@pytest.mark.parametrize("total", [50, 40])
def test_a_schedule_no_longer_than_its_warm_up_is_refused(total):
    with pytest.raises(UserError, match=f"total_steps={total} is not above .*warm_up_steps=50"):
        make_schedule("cosine", 1e-3, warm_up_steps=50, total_steps=total)


@pytest.mark.parametrize(
    ("schedule", "steps", "said"),
    [
        (dict(name="cosine", warm_up_steps=20, total_steps=400), 20, "it reaches 0.095, not"),
        (dict(name="cosine", warm_up_steps=20, total_steps=400), 21, ""),
        (dict(name="constant_warm_up", warm_up_steps=10), 30, "it reaches 0.01, not"),
        (dict(name="constant_warm_up", warm_up_steps=10), 31, ""),
        (dict(name="constant_warm_up", warm_up_steps=0), 1, ""),
        (dict(name="stepped", boundaries=(5,), scales=(0.5, 0.1)), 3, ""),
        (dict(name="stepped", boundaries=(5, 9), scales=(0.1, 1.0, 0.5)), 6, ""),
        (
            dict(name="stepped", boundaries=(5, 9), scales=(0.1, 1.0, 0.5)),
            5,
            "it reaches 0.01, not",
        ),
    ],
)
def test_a_run_that_ends_in_its_warm_up_is_said(schedule, steps, said):
    told = unfinished_warm_up({**schedule, "learning_rate": 0.1}, steps)
    assert bool(told) == bool(said)
    assert said in told
